"""Two data sets in one batch, each shuffled for itself: real data, and what a model made."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

from gen.data.loader import Record, Source

__all__ = ["Alongside"]


@dataclasses.dataclass(frozen=True)
class Alongside:
    """Batches of `data`, and as many rows of `other` under the same names with `prefix` before them.

    Attributes:
      data: a data configuration.
      other: another one, of any length.
      prefix: before the names of the other's arrays.
    """

    data: Any
    other: Any
    prefix: str = "fake_"

    def source(self) -> Source:
        """Gives the records of `data` by index."""
        source: Source = self.data.source()
        return source

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Endless shuffled batches of both, this process's slice, from global step `start`."""
        where = {"batch": batch, "start": start, "process": process, "processes": processes}
        first, second = self.data.batches(seed=seed, **where), self.other.batches(seed=seed + 1, **where)
        return _joined(first, second, self.prefix)

    def identity(self) -> str:
        """Gives the fingerprint of both."""
        return hashlib.sha256(f"{self.data.identity()} {self.other.identity()}".encode()).hexdigest()[:16]


def _joined(first: Iterator[Record], second: Iterator[Record], prefix: str) -> Iterator[Record]:
    """Batches of both; closing it closes them."""
    try:
        for rows, others in zip(first, second, strict=True):
            yield rows | {prefix + name: value for name, value in others.items()}
    finally:
        for stream in (first, second):
            stream.close()  # type: ignore[attr-defined]
