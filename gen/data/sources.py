"""Where records come from: sources by index, and the embedded digits."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Literal

import numpy as np

from gen.arrays import digest
from gen.data import labels, loader, text
from gen.data.loader import Source
from gen.data.vanished import mapped_files, still_there
from gen.errors import GenError

__all__ = ["ArraySource", "Digits", "Source", "digits"]


class ArraySource:
    """Records held as arrays that share their leading axis, in memory or memory-mapped.

    Numbers of 64 bits come out with 32 bits, which is what jax computes with. Sequences of text come out with their
    mask (`gen.data.text`).

    Args:
      class_names: names of the classes that "label" counts, where they are known.
      arrays: name -> (N, ...).

    Raises GenError when there are no arrays, their lengths differ, or "label" or "text" holds what is none.
    """

    def __init__(self, class_names: Sequence[str] | None = None, /, **arrays: np.ndarray):
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) != 1:
            listed = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "none"
            raise GenError(f"arrays of one source must share their length, got {listed}; give one row per record")
        self.files = mapped_files(*arrays.values())
        self._length = next(iter(sizes.values()))
        self.label = labels.checked(arrays["label"], self.title) if "label" in arrays and self._length else None
        self.class_names = tuple(class_names) if class_names else None
        self.num_classes = labels.class_count(self.label, self.class_names, self.title)
        self.arrays = text.checked(arrays, self.title)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        still_there(self.files)
        return {name: _narrowed(np.asarray(array[index])) for name, array in self.arrays.items()}

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Gives rows `indices` of every array, copied."""
        still_there(self.files)
        return {name: _narrowed(array[indices]) for name, array in self.arrays.items()}

    def title(self, index: int) -> str:
        """Tells how messages call record `index`."""
        return f"record {index} of {', '.join(self.files) or 'arrays in memory'}"

    def identity(self) -> str:
        """Gives the fingerprint of the content; reads everything."""
        return digest(self.arrays)


_NARROW = {np.dtype(np.int64): np.int32, np.dtype(np.uint64): np.uint32, np.dtype(np.float64): np.float32}


def _narrowed(array: np.ndarray) -> np.ndarray:
    return array.astype(_NARROW.get(array.dtype, array.dtype), copy=False)


@functools.cache
def digits(split: Literal["train", "test", "all"] = "train") -> ArraySource:
    """Gives the UCI handwritten digits that come with the package (gen/data/DIGITS.md says where from).

    Args:
      split: "train" (1438), "test" (359, held out, stratified) or "all" (1797, in the original order).

    Returns a source of "image" (8, 8, 1) uint8 in 0..255 and "label" () int32. The stored values 0..16
    are round(value * 255 / 16) here; `round(image * 16 / 255)` gives them back exactly.
    """
    with resources.files("gen.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        images, classes, test = stored["images"], stored["labels"], stored["test"]
    chosen = {"train": ~test, "test": test, "all": np.ones_like(test)}
    if split not in chosen:
        raise GenError(f"unknown split '{split}' of the digits; expected train, test or all")
    image = np.rint(images[chosen[split], :, :, None] * (255 / 16)).astype(np.uint8)
    return ArraySource(tuple("0123456789"), image=image, label=classes[chosen[split]].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Digits:
    """The embedded 8x8 digits as training data: "image" (B, 8, 8, 1) uint8 and "label" (B,) int32.

    Attributes:
      split: which of them.
      text: (T, D) of made-up caption features "text" (B, T, D) float32 beside them, for toys of models that read text:
        one fixed random sequence for each digit. None for no text.
    """

    split: Literal["train", "test", "all"] = "train"
    text: tuple[int, int] | None = None

    def source(self) -> ArraySource:
        """Gives the records by index."""
        rows = digits(self.split)
        if self.text is None:
            return rows
        captions = np.random.default_rng(0).normal(size=(10, *self.text)).astype(np.float32)
        return ArraySource(rows.class_names, **rows.arrays, text=captions[rows.arrays["label"]])

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        return loader.batches(self.source(), batch=batch, seed=seed, start=start, process=process, processes=processes)

    def identity(self) -> str:
        """Gives the fingerprint of the content."""
        return self.source().identity()
