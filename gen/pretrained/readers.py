"""Published weight files as dicts of NumPy arrays: safetensors, torch's .pt/.pth and NVIDIA's .pkl, without torch.

Nothing in a file is ever executed (see `gen.pretrained.pickles`), and no number in it is believed before it has been
checked against the size of the file.
"""

import io
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from gen import arrays
from gen.errors import GenError
from gen.files import read_json
from gen.pretrained.containers import choose
from gen.pretrained.nvidia_pickle import read_modules
from gen.pretrained.pickles import Storage, read_pickle
from gen.pretrained.torchscript import names as script_names
from gen.pretrained.torchscript import state_dict as script_state

__all__ = ["read_state", "read_weights"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+$")


def read_weights(path: str | Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Gives the state dict in a .safetensors, .pt, .pth or .pkl file: official name -> array (read-only, as stored).

    The names are those of the network: what wrappers add to them is taken away.

    Args:
      path: the file; of weights cut into several files, their ``*.index.json``.
      key: which entry of a training checkpoint such as {"model", "ema", "opt", "args"}; the averaged weights by
        default (see `read_state`, which also tells the choice).
    Raises GenError naming the file for one that is missing, truncated, damaged, hostile, or holds no weights.
    """
    return read_state(path, key)[0]


def read_state(path: str | Path, key: str | None = None) -> tuple[dict[str, np.ndarray], str]:
    """As `read_weights`, with the name of the entry that was taken ("" when the file is the state dict itself).

    Raises GenError for one file of several.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return choose(_read_shards(path), key, path)
    shard = _SHARD.search(path.name)
    if shard is not None and int(shard[2]) > 1:
        raise GenError(f"{path} is one of {int(shard[2])} files; give the .index.json beside them, or their folder")
    return choose(_read_file(path), key, path)


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of the files that an index of Hugging Face names: {"weight_map": {name: file}}."""
    listed = read_json(index)
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not files:
        raise GenError(f"{index} has no weight_map; give the index that save_pretrained wrote beside the weights")
    names = sorted({str(file) for file in files.values()})
    if strange := [name for name in names if Path(name).name != name]:
        raise GenError(f"{index} names the file '{strange[0][:60]}' outside of its folder; refused")
    shards = {name: _read_file(index.parent / name) for name in names}
    if lost := [name for name, file in files.items() if name not in shards[str(file)]]:
        raise GenError(f"{index.parent / str(files[lost[0]])} lacks '{lost[0]}' of {index.name}; fetch it again")
    return {name: shards[str(file)][name] for name, file in files.items()}


def _read_file(path: Path) -> Any:
    """What one file holds: a state dict, or a training checkpoint with several."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(0)
            if head[:4] == b"PK\x03\x04":
                return _read_zip(file, path)
            if len(head) == 8 and (head[:2] == b"\x80\x02" and _is_legacy(file, path)):
                return _read_legacy(file, path, path.stat().st_size)
            if head[:1] == b"\x80" and head[1:2] in (b"\x03", b"\x04", b"\x05"):
                return _read_modules(file, path)
            if path.suffix == ".safetensors" or _looks_safe(head, path):
                return arrays.read(path)
    except FileNotFoundError:
        raise GenError(f"no weights file at {path}; check the path") from None
    except OSError as error:
        raise GenError(f"cannot read {path} ({error.strerror or error}); check the path and its permissions") from None
    if tarfile.is_tarfile(path):
        raise GenError(f"{path} is in torch's format of before 2017; load and save it once with a newer torch")
    raise GenError(f"{path} is neither safetensors, a torch .pt file nor a .pkl of modules; give one of these")


def _damaged(path: Path, what: str) -> GenError:
    return GenError(f"{path} is damaged ({what}); download or write it again")


def _looks_safe(head: bytes, path: Path) -> bool:
    if len(head) < 8 or struct.unpack("<Q", head)[0] > path.stat().st_size - 8:
        return False
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _storage(value: Any, path: Path, found: dict[str, Storage]) -> Storage:
    """The storage that a persistent id ("storage", type, key, device, numel, ...) stands for."""
    match value:
        case ("storage", np.dtype() as dtype, str(key), _, int(numel), *rest) if numel >= 0 and not any(rest):
            known = found.setdefault(key, Storage(key, dtype, numel))
            if (known.dtype, known.numel) != (dtype, numel):
                raise _damaged(path, f"storage {key[:20]} is described in two ways")
            return known
    raise _damaged(path, "a storage is described in a way torch does not write")


def _read_zip(file: IO[bytes], path: Path) -> Any:
    """torch.save since 1.6, and torch.jit.save: a zip of <root>/data.pkl and <root>/data/<key>, all uncompressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            if sum(info.compress_size for info in entries.values()) > path.stat().st_size:
                raise _damaged(path, "its entries overlap")
            pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise GenError(f"{path} is a zip without torch weights in it (no data.pkl); give a file of torch.save")
            root = pickles[0].removesuffix("data.pkl")
            order = f"{root}byteorder"
            if order in entries and _stored(archive, entries[order], path) != b"little":
                raise GenError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
            found: dict[str, Storage] = {}
            text = io.BytesIO(_stored(archive, entries[pickles[0]], path))
            content = read_pickle(text, lambda value: _storage(value, path, found), str(path), script_names)
            for key, storage in found.items():
                info = entries.get(f"{root}data/{key}")
                if info is None or info.file_size != storage.numel * storage.dtype.itemsize:
                    raise _damaged(path, f"the bytes of storage {key[:20]} are missing or of another length")
                storage.data = np.frombuffer(_stored(archive, info, path), storage.dtype)
            return script_state(content)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, ValueError, RuntimeError) as error:
        raise _damaged(path, " ".join(str(error).split())[:100]) from None


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    """The bytes of an entry, checked against its CRC. Only uncompressed entries: those cannot grow."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise GenError(f"{path} has the compressed entry '{info.filename[:60]}', which torch never writes; refused")
    return archive.read(info)


def _is_legacy(file: IO[bytes], path: Path) -> bool:
    try:
        return bool(read_pickle(file, lambda _: None, str(path)) == _LEGACY_MAGIC)
    except GenError:
        return False
    finally:
        file.seek(0)


def _read_modules(file: IO[bytes], path: Path) -> Any:
    """pickle.dump of NVIDIA's modules; every tensor's bytes are a file of torch.save before 1.6."""

    def storage(data: bytes) -> Any:
        inner = io.BytesIO(data)
        return _read_legacy(inner, path, len(data)) if _is_legacy(inner, path) else None

    return read_modules(file, str(path), storage)


def _read_legacy(file: IO[bytes], path: Path, size: int) -> Any:
    """torch.save before 1.6: five pickles (magic, version, system, object, storage keys), then the storages."""
    found: dict[str, Storage] = {}

    def next_object() -> Any:
        return read_pickle(file, lambda value: _storage(value, path, found), str(path))

    _, version, system = next_object(), next_object(), next_object()
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise GenError(f"{path} is in an old torch format that is not read; load and save it once with a newer torch")
    content, keys = next_object(), next_object()
    if not isinstance(keys, list) or any(not isinstance(k, str) for k in keys) or sorted(keys) != sorted(found):
        raise _damaged(path, "its list of storages does not match its tensors")
    for key in keys:
        storage = found[key]
        head = file.read(8)
        if len(head) != 8 or struct.unpack("<q", head)[0] != storage.numel:
            raise _damaged(path, f"storage {key[:20]} is cut off or of another length")
        nbytes = storage.numel * storage.dtype.itemsize
        if nbytes > size - file.tell():
            raise _damaged(path, f"storage {key[:20]} is cut off")
        storage.data = np.frombuffer(file.read(nbytes), storage.dtype)
    return content
