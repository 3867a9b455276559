"""Where image files lie: folders, EDM and StyleGAN zips, tar shards, ArrayRecord, npz and npy, read by index.

`open_store` tells them apart by name and content. Nothing in a file is executed, no name inside an archive becomes
a path on disk, and sizes are checked before memory is taken.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen.arrays import digest
from gen.data.transforms import FORMATS, MAX_PIXELS, decode, decode_pixels, encode_png
from gen.data.vanished import mapped_files, still_there
from gen.errors import GenError

__all__ = ["EXTENSIONS", "MAX_FILE", "ArrayStore", "Store", "load_arrays", "open_store"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
MAX_FILE = 256 << 20  # bytes of one image file
MAX_JSON = 1 << 16  # bytes of dataset.json per image: a vector of 4096 numbers; parsed it takes ten times as much
MAX_LABEL = 2**31 - 1


@dataclasses.dataclass
class Store:
    """Image files by index, with labels.

    Attributes:
      path: where they lie, for messages.
      names: of the images, in order.
      read_file: index -> the image file's bytes. Safe from several threads.
      label: classes (N,) int32 from 0, or None.
      text: one vector per image (N, D) float32, or None.
      class_names: names of the classes where they are known.
      ignored: files that are no images.
      content: fingerprint of the files; see `identity`.
    """

    path: str
    names: Sequence[str]
    read_file: Callable[[int], bytes]
    label: np.ndarray | None = None
    text: np.ndarray | None = None
    class_names: list[str] | None = None
    ignored: Sequence[str] = ()
    content: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def title(self, index: int) -> str:
        """How messages call image `index`."""
        return f"{self.path}:{self.names[index]}"

    def read(self, index: int) -> tuple[str, bytes]:
        """(extension, bytes) of image `index` as stored. Raises GenError when they cannot be read."""
        data = self.read_file(index)
        return Path(self.names[index]).suffix.lower() or _extension(data), data

    def image(self, index: int, channels: int = 3) -> Image.Image:
        """Image `index`, decoded (`gen.data.transforms.decode`)."""
        return decode(self.read_file(index), self.title(index), channels)

    def pixels(self, index: int, channels: int = 3) -> np.ndarray:
        """Image `index`, decoded, as (H, W, channels) uint8: quicker than by way of `image`."""
        return decode_pixels(self.read_file(index), self.title(index), channels)

    def identity(self) -> str:
        """Fingerprint (16 hex digits) of names, labels and content.

        Content is known by the zip's checksums, or by the sizes of all files and the bytes of some.
        """
        digest = hashlib.sha256(self.content.encode())
        digest.update("\n".join(self.names).encode("utf-8", "surrogateescape"))
        for array in (self.label, self.text):
            digest.update(b"-" if array is None else array.tobytes())
        return digest.hexdigest()[:16]


class ArrayStore(Store):
    """Images (N, H, W, C) uint8 in an array."""

    def __init__(self, path: str, images: np.ndarray, label: np.ndarray | None, text: np.ndarray | None) -> None:
        self.images, self.files = images, mapped_files(images)
        names = [f"{i:08d}.png" for i in range(len(images))]
        super().__init__(path, names, self._png, label, text)
        self._identity = functools.partial(digest, {"image": images})

    def image(self, index: int, channels: int = 3) -> Image.Image:
        """Image `index` as RGB (channels 3) or L (1)."""
        still_there(self.files)
        pixels = np.asarray(self.images[index])
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(
            "RGB" if channels == 3 else "L"
        )

    def pixels(self, index: int, channels: int = 3) -> np.ndarray:
        """Image `index` as (H, W, channels) uint8."""
        if self.images.shape[-1] != channels:
            return np.asarray(self.image(index, channels)).reshape(*self.images.shape[1:3], channels)
        still_there(self.files)
        return np.array(self.images[index])

    def identity(self) -> str:
        """Fingerprint of everything; reads it all."""
        self.content = self.content or self._identity()
        return super().identity()

    def _png(self, index: int) -> bytes:
        return encode_png(self.image(index, self.images.shape[-1]))


def _extension(data: bytes) -> str:
    """What the name of an image file with these bytes ends in; "" when they are none."""
    try:
        kind = Image.open(io.BytesIO(data), formats=FORMATS).format or ""
    except Exception:  # damaged in one of many ways; whoever decodes it will say so
        return ""
    return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")


def open_store(path: str | Path) -> Store:
    """The images at `path`.

    - a folder: image files below it in the order of their names; classes from ``dataset.json`` or, without it, from
      the first level of folders when every image lies in one. A folder of .tar files: shards.
    - .zip: EDM's and StyleGAN's layout; classes (or vectors) from ``dataset.json``.
    - .tar: one WebDataset shard: KEY.jpg with KEY.cls (a number), KEY.json ({"label": n}) or KEY.npy (a vector).
    - .npz and .npy: uint8 (N, H, W, C) or (N, H, W); in an npz as image, images or arr_0, with label, labels or arr_1.
    - .array_record: as ``gen data convert`` writes it.
    - hf:NAME or hf:NAME:SPLIT: a Hugging Face data set (needs the extra hf-datasets).

    Raises:
      GenError: nothing there, no images in it, a damaged container, labels that do not fit the images.
    """
    text = str(path)
    store = _hugging_face(text) if text.startswith("hf:") else _local(Path(path))
    if not len(store):
        raise GenError(f"no images in {path}; expected files such as {', '.join(EXTENSIONS[:4])}, check the path")
    return store


def _local(path: Path) -> Store:
    try:
        if path.is_dir():
            shards = sorted(path.glob("*.tar"))
            return _tars(path, shards) if shards else _folder(path)
        if not path.exists():
            raise GenError(f"no data at {path}; expected a folder, .zip, .tar, .npz, .npy or .array_record")
        kinds: dict[str, Callable[[Path], Store]] = {
            ".zip": _zip,
            ".tar": lambda p: _tars(p, [p]),
            ".npz": _array_file,
            ".npy": _array_file,
            ".array_record": _array_record,
        }
        if path.suffix.lower() not in kinds:
            raise GenError(f"{path} is no known kind of data; expected a folder or {', '.join(kinds)}")
        return kinds[path.suffix.lower()](path)
    except OSError as error:
        raise GenError(f"cannot read {path} ({error.strerror or error}); check the path and its permissions") from None


# --- folders


def _folder(path: Path) -> Store:
    names: list[str] = []
    ignored: list[str] = []

    def failed(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(path, onerror=failed):
        folders.sort()
        for file in files:
            name = (Path(folder) / file).relative_to(path).as_posix()
            if not file.startswith(".") and name != "dataset.json":
                (names if Path(file).suffix.lower() in EXTENSIONS else ignored).append(name)
    names.sort()

    def read(index: int) -> bytes:
        with _reading(path / names[index]), open(path / names[index], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise GenError(f"{path / names[index]} has {size} bytes; expected at most {MAX_FILE}, leave it out")
            return file.read()

    described = path / "dataset.json"
    if described.exists():
        with _reading(described):
            labels = _dataset_json(described.read_bytes(), names, str(path))
    else:
        labels = _folder_classes(names)
    sizes = [os.stat(path / name).st_size for name in names]
    some = [hashlib.sha256(read(i)).hexdigest() for i in range(0, len(names), max(1, len(names) // 64))]
    return Store(str(path), names, read, **labels, ignored=ignored, content=f"{sizes} {some}")


def _folder_classes(names: list[str]) -> dict[str, Any]:
    if not names or not all("/" in name for name in names):
        return {}
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: i for i, name in enumerate(classes)}
    return {"label": np.array([number[n.split("/")[0]] for n in names], np.int32), "class_names": classes}


class _reading:
    """Turns an OSError into a GenError that names the file."""

    def __init__(self, what: str | Path) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise GenError(
                f"cannot read {self.what} ({error.strerror or error}); check that the disk or network folder is "
                "there, then start again"
            ) from None


# --- labels


def _dataset_json(data: bytes, names: Sequence[str], where: str) -> dict[str, Any]:
    """label, text and class_names of a dataset.json: {"labels": [[file, class or vector], ...] or null}."""
    advice = 'expected {"labels": [[file, class], ...]}, write it again with gen data convert'
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise GenError(f"dataset.json of {where} is not valid JSON; {advice}") from None
    if not isinstance(found, dict):
        raise GenError(f"dataset.json of {where} is no object; {advice}")
    rows = found.get("labels")
    if rows is None:
        return {}
    try:
        by_name = {str(file).replace("\\", "/"): value for file, value in rows}
    except (TypeError, ValueError):
        raise GenError(f"dataset.json of {where} has labels of another form; {advice}") from None
    missing = [name for name in names if name not in by_name]
    if missing:
        raise GenError(
            f"dataset.json of {where} has no label for {len(missing)} of {len(names)} images, the first "
            f"{missing[0]}; label all of them or none"
        )
    names_of = found.get("class_names")
    if names_of is not None and not (isinstance(names_of, list) and all(isinstance(n, str) for n in names_of)):
        raise GenError(f"class_names in dataset.json of {where} are no list of names; {advice}")
    return _labels([by_name[name] for name in names], names, where) | {"class_names": names_of}


def _labels(values: list[Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """Integers from 0 as "label", lists of numbers of one length as "text"."""
    if all(type(value) is int for value in values):
        for name, value in zip(names, values, strict=True):
            if not 0 <= value <= MAX_LABEL:
                raise GenError(f"{where}:{name} has label {value}; expected a class from 0 on, correct the labels")
        return {"label": np.array(values, np.int32)}
    width = len(values[0]) if isinstance(values[0], list) else 0
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
            raise GenError(
                f"{where}:{name} has label {str(value)[:40]}; expected a class number for every image, or a list of "
                "numbers for every image"
            )
        if len(value) != width or not width:
            raise GenError(f"{where}:{name} has a vector of {len(value)} numbers; expected {width} as the first has")
    text = np.array(values, np.float32)
    if not np.isfinite(text).all():
        row = int(np.argmin(np.isfinite(text).all(axis=1)))
        raise GenError(f"{where}:{names[row]} has a NaN or infinite vector; expected finite numbers")
    return {"text": text}


# --- zip


def _zip(path: Path) -> Store:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if info.filename and not info.is_dir()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise GenError(f"{path} is no readable zip ({error}); copy or make it again") from None
    file = open(path, "rb")  # noqa: SIM115 - stays open as long as the store
    names = sorted(n for n in members if Path(n).suffix.lower() in EXTENSIONS)
    ignored = sorted(set(members) - set(names) - {"dataset.json"})

    def read(index: int) -> bytes:
        return _zip_member(file, path, members[names[index]], MAX_FILE)

    labels: dict[str, Any] = {}
    if "dataset.json" in members:
        data = _zip_member(file, path, members["dataset.json"], MAX_JSON * (16 + len(names)))
        labels = _dataset_json(data, names, str(path))
    sums = [members[name].CRC for name in names]
    return Store(str(path), names, read, **labels, ignored=ignored, content=f"{sums}")


def _zip_member(file: io.BufferedReader, path: Path, info: zipfile.ZipInfo, limit: int) -> bytes:
    """One member's bytes, at a given place: unlike `zipfile`, without a shared file position."""
    name = f"{path}:{info.filename}"
    bad = GenError(f"{name} is damaged in the zip; copy the archive again")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise GenError(f"{name} is encrypted or compressed in a rare way; pack the archive again, stored or deflated")
    if max(info.file_size, info.compress_size) > limit:
        raise GenError(f"{name} has {info.file_size} bytes; expected at most {limit}, leave it out")
    with _reading(path):
        head = os.pread(file.fileno(), 30, info.header_offset) if info.header_offset >= 0 else b""
        if len(head) < 30 or head[:4] != b"PK\3\4":
            raise bad
        start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = os.pread(file.fileno(), info.compress_size, start)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, info.file_size + 1)
        except zlib.error:
            raise bad from None
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise bad
    return data


# --- tar


def _tars(path: Path, shards: list[Path]) -> Store:
    entries: list[tuple[int, str, int, int]] = []  # shard, name, offset, size
    values: list[Any] = []
    for number, shard in enumerate(shards):
        for name, offset, size, value in _tar_index(shard):
            entries.append((number, name, offset, size))
            values.append(value)
    files = [open(shard, "rb") for shard in shards]  # noqa: SIM115 - stay open as long as the store
    names = [f"{shards[n].name}/{name}" if len(shards) > 1 else name for n, name, _, _ in entries]

    def read(index: int) -> bytes:
        number, _, offset, size = entries[index]
        with _reading(shards[number]):
            data = os.pread(files[number].fileno(), size, offset)
        if len(data) != size:
            raise GenError(f"{shards[number]} is shorter than when it was indexed; copy it again")
        return data

    labels: dict[str, Any] = {}
    labelled = sum(value is not None for value in values)
    if labelled not in (0, len(values)):
        first = names[values.index(None)]
        raise GenError(f"{path} has no label for {len(values) - labelled} images, the first {first}; label all or none")
    if labelled:
        labels = _labels(values, names, str(path))
    some = [hashlib.sha256(read(i)).hexdigest() for i in range(0, len(names), max(1, len(names) // 64))]
    return Store(str(path), names, read, **labels, content=f"{[e[3] for e in entries]} {some}")


def _tar_index(shard: Path) -> list[list[Any]]:
    """[name, offset, size, label] of every image. Kept beside the shard, where the folder takes it."""
    stat = os.stat(shard)
    tag = [stat.st_size, stat.st_mtime_ns]
    kept = shard.with_name(f".{shard.name}.index.json")
    try:
        found = json.loads(kept.read_text())
        if found["tag"] == tag:
            return [[str(n), int(o), int(s), v] for n, o, s, v in found["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or another version's: indexed again
    images = _scan_tar(shard, stat.st_size)
    try:
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"tag": tag, "images": images}))
        os.replace(temporary, kept)
    except OSError:
        pass  # a folder that is only read is indexed each time
    return images


def _scan_tar(shard: Path, length: int) -> list[list[Any]]:
    images: dict[str, list[Any]] = {}
    values: dict[str, Any] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.sparse is not None:
                    continue
                if member.offset_data + member.size > length:
                    raise GenError(f"{shard} ends within {member.name}; copy it again")
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if extension in EXTENSIONS:
                    if member.size > MAX_FILE:
                        raise GenError(f"{shard}:{member.name} has {member.size} bytes; expected at most {MAX_FILE}")
                    if key in images:
                        raise GenError(f"{shard} has two images for the key {key.lstrip('/')}; give each its own name")
                    images[key] = [member.name, member.offset_data, member.size, None]
                elif extension in (".cls", ".json", ".npy") and member.size <= 1 << 20:
                    file = archive.extractfile(member)
                    value = _tar_label(file.read() if file else b"", extension, f"{shard}:{member.name}")
                    values[key] = values.get(key) if value is None else value
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise GenError(f"{shard} is no readable tar ({error}); copy or make it again") from None
    for key, image in images.items():
        image[3] = values.get(key)
    return list(images.values())


def _tar_label(data: bytes, extension: str, name: str) -> Any:
    try:
        if extension == ".cls":
            return int(data.decode().strip())
        if extension == ".json":
            found = json.loads(data)
            return found.get("label") if isinstance(found, dict) else None
        vector = _npy(io.BytesIO(data), len(data), name, len(data))
        return [float(v) for v in vector.reshape(-1)]
    except (ValueError, TypeError, RecursionError):
        raise GenError(f"{name} is no label; expected a class number in .cls, or a .npy vector") from None


# --- arrays


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or of an .npy under the name "image".

    An .npy, and every array that lies unpacked in an .npz (`numpy.savez`), is memory-mapped: the file may be larger
    than memory. The checksums of an .npz are verified, which reads all of it once.

    Raises:
      GenError: missing, damaged, Python objects inside, or packed arrays larger than this machine's memory.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                dtype, shape, fortran, offset = _npy_header(file, path.stat().st_size, str(path))
            return {"image": _mapped(path, dtype, shape, fortran, offset)}
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        arrays = {}
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            total = sum(info.file_size for info in members if info.compress_type != zipfile.ZIP_STORED)
            if total > memory:
                raise GenError(f"{path} unpacks to {total} bytes, more than the memory here; save it with numpy.savez")
            for info in members:
                title = f"{path}:{info.filename}"
                if info.compress_type == zipfile.ZIP_STORED:
                    arrays[info.filename[:-4]] = _stored(archive, info, path, title)
                    continue
                with archive.open(info) as member:
                    arrays[info.filename[:-4]] = _npy(member, info.file_size, title, info.compress_size * 1100)
        return arrays
    except OSError as error:
        raise GenError(f"cannot read {path} ({error.strerror or error}); check the path") from None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        raise GenError(f"{path} cannot be read ({error}); make it again") from None


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool, offset: int) -> np.ndarray:
    if 0 in shape:
        return np.zeros(shape, dtype)
    mapped = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    return mapped.view(np.ndarray)  # np.memmap's own indexing is slow


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, title: str) -> np.ndarray:
    """An array that lies unpacked in a zip: where it starts, once all of it has been read and its checksum holds."""
    if info.file_size != info.compress_size or info.flag_bits & 1:
        raise GenError(f"{title} is damaged or encrypted; copy or make it again")
    with archive.open(info) as member:
        dtype, shape, fortran, header = _npy_header(member, info.file_size, title)
        while member.read(1 << 22):  # raises where the checksum does not hold
            pass
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return _mapped(path, dtype, shape, fortran, start + header)


def _npy(file: Any, length: int, name: str, believable: int) -> np.ndarray:
    """An array from a stream that holds `length` bytes; `believable` bounds what the packed bytes can unpack to."""
    dtype, shape, fortran, offset = _npy_header(file, length, name)
    if length > believable + 1024:
        raise GenError(f"{name} claims {length} bytes, more than its packed bytes can hold; make it again")
    data = file.read(length - offset)
    if len(data) != length - offset:
        raise GenError(f"{name} is cut off; make it again")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(file: Any, length: int, name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, Fortran order and data offset; refuses objects and sizes that the file does not have."""
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        offset = file.tell()
    except Exception as error:  # the header is a Python literal: anything can be wrong with it
        reason = " ".join(str(error).split())[:120]
        raise GenError(f"{name} is no npy array ({reason}); make it again") from None
    if dtype.hasobject or dtype.kind not in "biuf":
        raise GenError(f"{name} holds {dtype}; expected plain numbers, store it again")
    count = 1
    for side in shape:
        if side < 0:
            raise GenError(f"{name} claims the shape {shape}; make it again")
        count *= side
    if count * dtype.itemsize != length - offset:
        raise GenError(f"{name} claims {dtype} {shape} but holds {length - offset} bytes; copy or make it again")
    return dtype, tuple(shape), fortran, offset


def _array_file(path: Path) -> Store:
    arrays = load_arrays(path)
    images = _first(arrays, "image", "images", "arr_0")
    if images is None:
        raise GenError(f"{path} has no image, images or arr_0; it has {', '.join(arrays) or 'nothing'}")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise GenError(f"{path} holds {images.dtype} {images.shape}; expected uint8 (N, H, W, 1 or 3)")
    if images[:1].size > 3 * MAX_PIXELS or (len(images) and not images[0].size):
        raise GenError(f"{path} holds images of {images.shape[1:]}; expected 1 to {MAX_PIXELS} pixels")
    label, text = _first(arrays, "label", "labels", "arr_1"), arrays.get("text")
    if label is not None:
        if label.shape != (len(images),) or label.dtype.kind not in "iu":
            raise GenError(
                f"{path} has labels {label.dtype} {label.shape} for {len(images)} images; expected one integer each"
            )
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) <= MAX_LABEL:
            raise GenError(f"{path} has labels from {label.min()} to {label.max()}; expected classes from 0 on")
        label = label.astype(np.int32)
    if text is not None:
        if text.ndim != 2 or len(text) != len(images) or text.dtype.kind != "f":
            raise GenError(f"{path} has text {text.dtype} {text.shape} for {len(images)} images; expected (N, D) float")
        text = text.astype(np.float32)
    return ArrayStore(str(path), images, label, text)


def _first(arrays: dict[str, np.ndarray], *names: str) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


# --- ArrayRecord and Hugging Face


def _array_record(path: Path) -> Store:
    """Records of a line of JSON ({"name", "label"}) and the image file's bytes.

    The native reader is used without `ArrayRecordDataSource`, which starts 64 Python threads to count records; where
    memory is limited one of them may not come up, and it waits for that one for ever.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise GenError(f"{path} needs the package array_record; pip install array_record") from None
    with open(path, "rb"):
        pass  # a missing permission is said in Python's words
    if not path.stat().st_size:
        raise GenError(f"{path} is empty; copy or make it again")
    lock, process = threading.Lock(), os.getpid()
    damaged = (RuntimeError, ValueError, IndexError)

    def record(index: int) -> bytes:
        if os.getpid() != process:  # its threads did not come along, and it would wait for them for ever
            raise GenError(f"{path} was opened before this process was forked; start worker processes by spawn")
        with lock:
            return bytes(reader.read([index])[0])

    try:
        reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768)
        heads = [_record_head(record(i), path) for i in range(reader.num_records())]
    except damaged as error:
        raise GenError(f"{path} is no readable ArrayRecord ({error}); copy or make it again") from None
    names = [head["name"] for head, _ in heads]
    labels = [head.get("label") for head, _ in heads]

    def read(index: int) -> bytes:
        try:
            return record(index).partition(b"\n")[2]
        except damaged as error:
            raise GenError(f"{path} record {index} cannot be read ({error}); copy the file again") from None

    found = _labels(labels, names, str(path)) if names and labels[0] is not None else {}
    return Store(str(path), names, read, **found, content=" ".join(digest for _, digest in heads))


def _record_head(record: bytes, path: Path) -> tuple[dict[str, Any], str]:
    try:
        head = json.loads(record.partition(b"\n")[0])
        return {"name": str(head["name"]), "label": head.get("label")}, f"{zlib.crc32(record):08x}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GenError(f"{path} has records of another layout; expected those of gen data convert") from None


def _hugging_face(text: str) -> Store:
    match = re.fullmatch(r"hf:([^:]+)(?::([^:]+))?", text)
    if not match:
        raise GenError(f"'{text}' names no data set; write hf:NAME or hf:NAME:SPLIT")
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise GenError(f"{text} needs an extra package; pip install 'gen-image[hf-datasets]'") from None
    name, split = match[1], match[2] or "train"
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, names, permissions: the library has its own errors for each
        raise GenError(f"cannot load {text} ({' '.join(str(error).split())[:160]}); check name and network") from None
    return _rows_store(text, rows, datasets.Image(decode=False))


def _rows_store(text: str, rows: Any, undecoded: Any) -> Store:
    """The images of a Hugging Face data set: its first column of images, its classes, or its vectors.

    Classes are its first ClassLabel column, or whole numbers under "label" or "labels"; vectors are lists of numbers
    under "text" or "embedding".
    """
    kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
    column = next((name for name, kind in kinds.items() if kind == "Image"), None)
    if column is None:
        raise GenError(f"{text} has no column of images; it has {', '.join(kinds)}")
    rows = rows.cast_column(column, undecoded)
    classes = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
    known = None if classes is None else list(rows.features[classes].names)
    names = [f"{i:08d}" for i in range(len(rows))]

    def read(index: int) -> bytes:
        try:
            cell = rows[index][column] or {}
        except OSError as error:
            raise GenError(f"cannot read {text} ({error.strerror or error}); load it again") from None
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise GenError(f"{text}:{names[index]} has no image; leave it out")
        with _reading(cell["path"]):
            return Path(cell["path"]).read_bytes()

    plain = [n for n in ("label", "labels", "text", "embedding") if kinds.get(n) in ("Value", "Sequence", "List")]
    values = next((v for v in (list(rows[n]) for n in plain) if v and not isinstance(v[0], str)), None)
    if classes is not None:
        values = list(rows[classes])
    labels = {} if values is None or not values else _labels(values, names, text)
    return Store(text, names, read, **labels, class_names=known, content=str(getattr(rows, "_fingerprint", "")))
