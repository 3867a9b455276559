"""What every store is: image files by index, with their labels or text."""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen.arrays import digest
from gen.data import labels, text
from gen.data.transforms import FORMATS, decode, decode_pixels, encode_png
from gen.data.vanished import mapped_files, still_there
from gen.errors import GenError

__all__ = ["MAX_FILE", "ArrayStore", "Store", "some_bytes", "targets"]

MAX_FILE = 256 << 20  # bytes of one image file


@dataclasses.dataclass
class Store:
    """Image files by index, with labels.

    Attributes:
      path: where they lie, for messages.
      names: of the images, in order.
      read_file: index -> the image file's bytes. Safe from several threads.
      label: classes (N,) int32 from 0, or None.
      text: one vector per image (N, D) float32, or sequences (N, T, D) float16 or float32, or None.
      text_mask: where `text` of sequences holds tokens, (N, T) bool; None for vectors.
      class_names: names of the classes, in order, where they are known.
      ignored: files that are no images, or are left out on purpose (`gen.data.stores.strays`).
      notes: sentences that whoever uses the data should read once.
      unlabelled: why there are no classes, as the continuation of a sentence; "" where there is nothing to say.
      content: fingerprint of the files; see `identity`.
    """

    path: str
    names: Sequence[str]
    read_file: Callable[[int], bytes]
    label: np.ndarray | None = None
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    ignored: Sequence[str] = ()
    notes: Sequence[str] = ()
    unlabelled: str = ""
    content: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int | None:
        """Tells how many classes there are; None without labels. Raises GenError when the names do not cover them."""
        return labels.class_count(self.label, self.class_names, self.title)

    def title(self, index: int) -> str:
        """Tells how messages call image `index`."""
        return f"{self.path}:{self.names[index]}"

    def read(self, index: int) -> tuple[str, bytes]:
        """Gives (extension, bytes) of image `index` as stored. Raises GenError when they cannot be read."""
        data = self.read_file(index)
        return Path(self.names[index]).suffix.lower() or _extension(data), data

    def image(self, index: int, channels: int = 3) -> Image.Image:
        """Gives the image `index`, decoded (`gen.data.transforms.decode`)."""
        return decode(self.read_file(index), self.title(index), channels)

    def pixels(self, index: int, channels: int = 3) -> np.ndarray:
        """Gives the image `index`, decoded, as (H, W, channels) uint8: quicker than by way of `image`."""
        return decode_pixels(self.read_file(index), self.title(index), channels)

    def identity(self) -> str:
        """Gives the fingerprint (16 hex digits) of names, labels and content.

        Content is known by the zip's checksums, or by the sizes of all files and the bytes of some.
        """
        digest = hashlib.sha256(self.content.encode())
        digest.update("\n".join(self.names).encode("utf-8", "surrogateescape"))
        for array in (self.label, self.text):
            digest.update(b"-" if array is None else array.tobytes())
        if self.text_mask is not None:
            digest.update(self.text_mask.tobytes())
        return digest.hexdigest()[:16]


class ArrayStore(Store):
    """Images (N, H, W, C) uint8 in an array; the other arguments are those of `Store`."""

    def __init__(self, path: str, images: np.ndarray, **known: Any) -> None:
        self.images, self.files = images, mapped_files(images)
        names = [f"{i:08d}.png" for i in range(len(images))]
        super().__init__(path, names, self._png, **known)
        self._identity = functools.partial(digest, {"image": images})

    def image(self, index: int, channels: int = 3) -> Image.Image:
        """Gives the image `index` as RGB (channels 3) or L (1)."""
        still_there(self.files)
        pixels = np.asarray(self.images[index])
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert(
            "RGB" if channels == 3 else "L"
        )

    def pixels(self, index: int, channels: int = 3) -> np.ndarray:
        """Gives the image `index` as (H, W, channels) uint8."""
        if self.images.shape[-1] != channels:
            return np.asarray(self.image(index, channels)).reshape(*self.images.shape[1:3], channels)
        still_there(self.files)
        return np.array(self.images[index])

    def identity(self) -> str:
        """Gives the fingerprint of everything; reads it all."""
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


def some_bytes(read: Callable[[int], bytes], count: int) -> list[str]:
    """Digests of about 64 files spread over all, for `Store.content`."""
    return [hashlib.sha256(read(i)).hexdigest() for i in range(0, count, max(1, count // 64))]


def targets(values: Sequence[Any], title: Callable[[int], str]) -> dict[str, Any]:
    """Gives what belongs to the images, as `Store` has it: "label", or "text", or "text" with "text_mask".

    Args:
      values: one for each image: class numbers; or vectors of numbers of one length; or arrays (T_i, D) of tokens.
      title: how messages call image i.

    Raises GenError that names the first image whose value does not fit.
    """
    if not isinstance(values[0], list | np.ndarray):
        for row, value in enumerate(values):
            if type(value) is not int:
                raise GenError(
                    f"{title(row)} has label {str(value)[:40]}; expected a class number for every image, or a list of "
                    "numbers for every image"
                )
        # Numbers of any length are valid JSON; NumPy's end at 64 bits.
        return {"label": labels.checked(np.array([min(max(v, -(2**63)), 2**63 - 1) for v in values]), title)}
    arrays = [_numbers(value, title(row)) for row, value in enumerate(values)]
    if arrays[0].ndim == 2:
        sequences, mask = text.padded(arrays, title)
        return {"text": sequences, "text_mask": mask}
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape or not array.size:
            raise GenError(
                f"{title(row)} has a vector of {array.size} numbers; expected {arrays[0].size} as the first has"
            )
    vectors = np.stack(arrays).astype(np.float32)
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        raise GenError(f"{title(int(np.argmin(finite)))} has a NaN or infinite vector; expected finite numbers")
    return {"text": vectors}


def _numbers(value: Any, title: str) -> np.ndarray:
    """A vector (D,), or tokens (T, D), of a list or an array."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths within one
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
        raise GenError(
            f"{title} has label {str(value)[:40]}; expected a class number for every image, or a list of numbers for "
            "every image"
        )
    return array if array.dtype.kind == "f" else array.astype(np.float32)
