"""Random arrays in place of data: to plan a run, or to time one, where no data are at hand."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from gen.data import loader
from gen.data.loader import Record

__all__ = ["RANDOM", "Random", "RandomSource"]

RANDOM = "random"  # what stands for such data where a path is asked for: --data random
_POOL = 64  # different rows
_ROWS = 2**20


class RandomSource:
    """Records of random arrays, where row i is that of i mod 64: reading costs next to nothing.

    Args:
      shapes: of a row by name. "image" is uint8, "label" the class 0, "tokens" and "bits" are 0 and 1, a name that ends
        in "_mask" is true everywhere, what is left standard normal float32.
    """

    class_names = None
    num_classes = None  # nobody knows how many classes such data have: any number of them goes

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        rng = np.random.default_rng(0)
        self._arrays = {name: _values(rng, name, (_POOL, *shape)) for name, shape in shapes.items()}
        self.label = np.zeros(_ROWS, np.int32) if "label" in shapes else None

    def __len__(self) -> int:
        return _ROWS

    def __getitem__(self, index: int) -> Record:
        return {name: array[index % _POOL] for name, array in self._arrays.items()}

    def gather(self, indices: np.ndarray) -> Record:
        """Gives records `indices` (B,) as one batch."""
        return {name: array[indices % _POOL] for name, array in self._arrays.items()}

    def title(self, index: int) -> str:
        """Gives what messages call record `index`."""
        return f"random row {index}"


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name == "image":
        return rng.integers(0, 256, shape, np.uint8)
    if name == "label":
        return np.zeros(shape, np.int32)
    if name in ("tokens", "bits"):
        return rng.integers(0, 2, shape, np.int32 if name == "tokens" else np.uint8)
    return np.ones(shape, bool) if name.endswith("_mask") else rng.standard_normal(shape, np.float32)


@dataclasses.dataclass(frozen=True)
class Random:
    """Random latents, or other arrays, stand for training data.

    Attributes:
      shapes: of a row by name, see `RandomSource`.
    """

    shapes: Mapping[str, tuple[int, ...]]
    path: ClassVar[str] = RANDOM
    tokenizer: ClassVar[str] = ""  # nothing encoded them

    def source(self) -> RandomSource:
        """Gives the records by index."""
        return RandomSource(self.shapes)

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Gives endless shuffled batches, this process's slice, from global step `start` (see `gen.data.loader`)."""
        return loader.batches(self.source(), batch=batch, seed=seed, start=start, process=process, processes=processes)

    def normalizer(self) -> dict[str, np.ndarray]:
        """Gives "shift" and "scale" (C,) float32 that leave latents as they are."""
        channels = self.shapes["latent"][-1]
        return {"shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}

    def identity(self) -> str:
        """Says that these are no data."""
        return f"random {dict(self.shapes)}"
