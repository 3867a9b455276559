"""Classes divided among several models, and data in which each model finds its own classes.

A partition is one part for each class. Three ways to make one: neighbouring numbers (ImageNet's are ordered by
WordNet, so neighbours are akin), chance, and clusters of equal size in an embedding of the classes.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from gen.data import loader
from gen.data.loader import Record, Source
from gen.errors import GenError

__all__ = ["Partitioned", "class_means", "clustered", "contiguous", "shuffled"]

Partition = tuple[int, ...]  # class -> part


def contiguous(classes: int, parts: int) -> Partition:
    """Gives parts of neighbouring classes, of equal size up to one. Raises GenError for more parts than classes."""
    if not 1 <= parts <= classes:
        raise GenError(f"{classes} classes in {parts} parts; expected between one part and one for each class")
    return tuple(c * parts // classes for c in range(classes))


def shuffled(classes: int, parts: int, seed: int = 0) -> Partition:
    """Gives parts of classes drawn by chance, of equal size up to one."""
    order = np.random.default_rng(seed).permutation(classes)
    even = contiguous(classes, parts)
    return tuple(even[place] for place in order)


def clustered(embedding: np.ndarray, parts: int, seed: int = 0, rounds: int = 50) -> Partition:
    """Gives parts of classes that lie together: k-means with clusters of equal size up to one.

    Args:
      embedding: (classes, D), a vector for each class.
      parts: how many.
      seed: of the first centres.
      rounds: at most; it stops when nothing changes.
    """
    x = np.asarray(embedding, np.float64).reshape(len(embedding), -1)
    seats = np.asarray(contiguous(len(x), parts))  # the part of each place that a class can take
    centres = x[np.random.default_rng(seed).choice(len(x), parts, replace=False)]
    found = seats
    for _ in range(rounds):
        squares = np.square(x[:, None] - centres[None]).sum(-1)
        before, found = found, seats[linear_sum_assignment(squares[:, seats])[1]]
        if (before == found).all():
            break
        centres = np.stack([x[found == k].mean(0) for k in range(parts)])
    return tuple(int(part) for part in found)


def class_means(source: Source, classes: int, name: str, most: int = 100) -> np.ndarray:
    """Gives the mean of up to `most` records of each class, (classes, D) float64, to cluster by.

    Args:
      name: of the array that is averaged: "latent" or "image".

    Raises GenError for records without labels, or without one of the classes.
    """
    if source.label is None:
        raise GenError("the data have no labels; classes without them cannot be divided by what they look like")
    means = []
    for c in range(classes):
        rows = np.flatnonzero(source.label == c)[:most]
        if not len(rows):
            raise GenError(f"the data have no record of class {c}; divide the classes by number or by chance")
        means.append(source.gather(rows)[name].astype(np.float64).reshape(len(rows), -1).mean(0))
    return np.stack(means)


class _Rows:
    """Some records of a source, by index."""

    def __init__(self, source: Source, rows: np.ndarray):
        self.inner, self.rows = source, rows
        self.label = None if source.label is None else source.label[rows]
        self.class_names, self.num_classes = source.class_names, source.num_classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.inner[int(self.rows[index])]

    def gather(self, indices: np.ndarray) -> Record:
        return self.inner.gather(self.rows[indices])

    def title(self, index: int) -> str:
        return self.inner.title(int(self.rows[index]))


@dataclasses.dataclass(frozen=True)
class Partitioned:
    """Other data, in whose batches the parts of a partition stand one after the other with equally many rows each.

    Attributes:
      data: a data configuration with ``source()``, whose records have labels; random flips and crops do not apply.
      partition: the part of each class.

    Raises GenError for images that are mirrored or cropped at random, and a part without classes.
    """

    data: Any
    partition: Partition

    def __post_init__(self) -> None:
        if getattr(self.data, "flip", False) or getattr(self.data, "crop", "none") == "random":
            raise GenError("images that are divided by class take no flip and no random crop; turn them off")
        if sorted(set(self.partition)) != list(range(self.parts)):
            raise GenError(f"the partition {self.partition} leaves a part without classes; number parts from 0")

    @property
    def parts(self) -> int:
        """Gives the number of parts."""
        return 1 + max(self.partition)

    def source(self) -> Source:
        """Gives all records by index, undivided."""
        source: Source = self.data.source()
        return source

    def batches(self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1) -> Iterator[Record]:
        """Endless batches of all parts, each shuffled for itself; this process's slice, from global step `start`.

        A batch of fewer rows than there are parts is a sample of the data, undivided.

        Raises GenError where parts and processes do not divide the batch, and for a part of too few records.
        """
        source, parts = self.source(), self.parts
        if batch < parts:
            return loader.batches(source, batch=batch, seed=seed, start=start, process=process, processes=processes)
        if batch % parts or max(parts, processes) % min(parts, processes):
            raise GenError(
                f"a batch of {batch} for {parts} parts and {processes} processes; parts must divide the batch, and one "
                "of parts and processes the other"
            )
        if source.label is None:
            raise GenError("the data have no labels, by which they could be divided; give data with labels")
        if int(source.label.max()) >= len(self.partition):
            raise GenError(
                f"the data hold the label {source.label.max()}; the partition has {len(self.partition)} classes"
            )
        part_of = np.asarray(self.partition)[source.label]
        # this process's parts, or its share of one
        share = max(1, processes // parts)
        first, last = process * parts // processes, -(-(process + 1) * parts // processes)
        streams = []
        for part in range(first, last):
            rows = np.flatnonzero(part_of == part)
            loader.enough(f"part {part} of the data", len(rows), batch // parts)
            stream = loader.batches(
                _Rows(source, rows),
                batch=batch // parts,
                seed=seed * parts + part,
                start=start,
                process=process % share,
                processes=share,
                threads=1,
            )
            streams.append(stream)
        return _joined(streams)

    def identity(self) -> str:
        """Gives the fingerprint of the data and the partition."""
        return hashlib.sha256(f"{self.data.identity()} {self.partition}".encode()).hexdigest()[:16]


def _joined(streams: list[Iterator[Record]]) -> Iterator[Record]:
    """Batches of all streams side by side; closing it closes them."""
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.callback(stream.close)  # type: ignore[attr-defined]
        while True:
            rows = [next(stream) for stream in streams]
            yield {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
