"""Trees of arrays: their paths, their digest, and safetensors files, of which this module is the only codec.

The path of a leaf is the keys that lead to it, joined by "/". A file holds flat names; `save` and `load` put the paths
of a nested dict there, `write` and `read` take the names as they are (those of published weights).
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import ml_dtypes
import numpy as np

from gen.errors import GenError
from gen.files import atomic

__all__ = ["digest", "flatten", "load", "map_paths", "metadata", "read", "save", "unflatten", "write"]

_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


def flatten(tree: Any) -> dict[str, Any]:
    """Gives the leaves of a tree by path, in the order of JAX (keys of a dict sorted, level by level).

    Args:
      tree: any pytree; a bare leaf has the path "".

    Raises GenError for a key that is empty, is no string or number, or holds "/".
    """
    import jax  # not above: commands that only name arrays start without it

    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Gives the tree of ``function(path, leaf)``. Raises as `flatten` does."""
    import jax

    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(_path(keys), leaf), tree)


def _path(keys: tuple[Any, ...]) -> str:
    import jax

    parts = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    if any(not part or "/" in part for part in parts):
        raise GenError(f"array name '{'/'.join(parts)}' is not made of strings without '/'; rename the parameter")
    return "/".join(parts)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the nested dict whose leaves have these paths. Raises GenError where one path runs on behind another's
    leaf.
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf in node:
            raise GenError(f"'{path}' stands both for an array and for a group of arrays; rename one of them")
        node[leaf] = value
    return tree


def digest(arrays: Mapping[str, Any], rows: int = 65536) -> str:
    """Gives the SHA-256 (16 hex digits) of named arrays: names, types, shapes and bytes, in the order of their names.

    Args:
      arrays: by name (`flatten` of a tree); a scalar counts as an array of one.
      rows: how many rows of an array are read at a time.
    """
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.atleast_1d(arrays[name])
        found.update(f"{name} {array.dtype.str} {array.shape};".encode())
        for first in range(0, len(array), rows):
            found.update(np.ascontiguousarray(array[first : first + rows]).tobytes())
    return found.hexdigest()[:16]


def save(path: str | Path, tree: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a nested dict of arrays as one safetensors file; see `write`. Names in the file are the paths."""
    write(path, flatten(tree), metadata)


def load(path: str | Path) -> dict[str, Any]:
    """Gives the nested dict of NumPy arrays that `save` wrote, in memory and writable. Raises as `read` does."""
    try:
        # copies: rows of the file may be misaligned
        return unflatten({name: np.array(array) for name, array in read(path).items()})
    except OSError as error:
        raise _unreadable(Path(path), error) from None


def write(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes named arrays as one safetensors file, in the order of their names; whole or not at all.

    Written by hand (length, JSON header, bytes) because the package's NumPy side has no bfloat16.

    Args:
      path: the file; its folder is made.
      arrays: NumPy or JAX arrays by name.
      metadata: strings for the file's header.

    Raises GenError for a type that the format lacks, and when the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    chunks, offset = [], 0
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype not in _NAMES:
            raise GenError(f"'{name}' is {array.dtype}; safetensors holds {', '.join(map(str, _NAMES))}: convert it")
        end = offset + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
        chunks.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def put(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in chunks:
            file.write(array.tobytes())

    atomic(path, put)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Gives the arrays of a safetensors file by name, mapped from the disk and read-only.

    No number in the file is believed before it has been checked against the size of the file.

    Raises GenError for a file that is missing, cut off, damaged or of another format.
    """
    path = Path(path)
    header, base = _header(path)
    header.pop("__metadata__", None)
    try:
        entries = {name: _entry(name, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError) as error:
        _damaged(path, f"unreadable header: {error}")
    end = 0
    for begin, stop, name in sorted((begin, stop, name) for name, (_, _, begin, stop) in entries.items()):
        if begin != end:
            _damaged(path, f"'{name}' overlaps its neighbour or leaves a gap")
        end = stop
    try:
        size = path.stat().st_size - base
        if size != end:
            _damaged(path, f"{size} bytes of data, its header claims {end}")
        data = np.memmap(path, np.uint8, "r", base, (end,)) if end else np.zeros(0, np.uint8)
    except OSError as error:
        raise _unreadable(path, error) from None
    return {name: data[a:b].view(dtype).reshape(shape) for name, (dtype, shape, a, b) in entries.items()}


def metadata(path: str | Path) -> dict[str, str]:
    """Gives the strings in the header of a safetensors file. Raises GenError as `read` does."""
    found = _header(Path(path))[0].get("__metadata__", {})
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of the header, and where the data begin."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                _damaged(path, f"its header claims {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"unreadable header: {error}")
    if not isinstance(header, dict):
        _damaged(path, "unreadable header: no table of arrays")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """(type, shape, first byte, byte after the last) of an array, checked for sense."""
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"'{name}' has the unknown type {str(entry['dtype'])[:20]}")
    dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or len(shape) > 32:
        raise ValueError(f"'{name}' has sizes that are no sizes")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {end - begin} bytes for shape {shape}")
    return dtype, shape, begin, end


def _damaged(path: Path, what: str) -> NoReturn:
    what = " ".join(what.split())[:120]
    raise GenError(f"{path} is not a whole safetensors file ({what}); make or fetch it again") from None


def _unreadable(path: Path, error: OSError) -> GenError:
    return GenError(f"cannot read {path}: {error.strerror or error}; check the path")
