"""Arrays in .npz and .npy files, and images that lie in them."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gen.data import labels, text
from gen.data.stores.base import ArrayStore, Store
from gen.data.transforms import MAX_PIXELS
from gen.errors import GenError

__all__ = ["load_arrays", "npy", "open_arrays"]


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Gives the arrays of an .npz, or of an .npy under the name "image".

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
                    arrays[info.filename[:-4]] = npy(member, info.file_size, title, info.compress_size * 1100)
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


def npy(file: Any, length: int, name: str, believable: int) -> np.ndarray:
    """Gives an array from a stream that holds `length` bytes; `believable` bounds what the packed bytes can unpack
    to.

    Raises GenError for a member that is cut off, or claims more than its bytes can hold.
    """
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


def open_arrays(path: Path) -> Store:
    """Gives the images of an .npz or .npy; see `gen.data.stores.open_store`.

    Raises GenError for a file without images, images that are not uint8 (N, H, W, 1 or 3), and labels of another
    number.
    """
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

    def title(row: int) -> str:
        return f"{path}:{row:08d}"

    known: dict[str, np.ndarray] = {}
    label = _first(arrays, "label", "labels", "arr_1")
    for name, array in (("labels", label), ("text", arrays.get("text"))):
        if array is not None and (not array.ndim or len(array) != len(images)):
            raise GenError(
                f"{path} has {name} {array.dtype} {array.shape} for {len(images)} images; expected one for each"
            )
    if label is not None:
        known["label"] = labels.checked(label, title)
    if "text" in arrays:
        known |= text.checked({n: arrays[n] for n in ("text", "text_mask") if n in arrays}, title)
        if known["text"].ndim == 2:
            known["text"] = known["text"].astype(np.float32)
    return ArrayStore(str(path), images, **known)


def _first(arrays: dict[str, np.ndarray], *names: str) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)
