"""Shuffled, endless batches that are a pure function of (seed, step).

The semantics are those of Grain's ``shuffle().repeat().random_map().batch()``: a global stream of
positions p = 0, 1, 2 ..., epoch p // N, in each epoch every record exactly once in an order of its own,
cut into global batches (which may span two epochs). The pipeline itself works on whole batches: Grain sees
a random-access sequence of batches, so that its cost is paid once a step and not once a record, and
memory-resident data are gathered by one indexing operation.

Reading and decoding release Python's lock, so threads are enough and there are no worker processes that could be lost.
A read that never returns (a network folder that is gone) ends in `gen.data.vanished.Stalled`, which names the record.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import grain
import numpy as np

from gen.data import vanished
from gen.errors import GenError

__all__ = ["Source", "Transform", "batches", "enough", "epoch_order", "expect", "gathered", "stacked"]

Record = dict[str, np.ndarray]
Transform = Callable[[np.random.Generator, Record], Record]  # must not change its input arrays in place
Gather = Callable[[np.ndarray, np.ndarray], Record]  # (indices (B,), coins (B,) bool) -> records as one batch


class Source(Protocol):
    """Records by index. Reading is a pure function of the index and safe from several threads."""

    @property
    def label(self) -> np.ndarray | None:
        """Gives the class of every record (N,) int32, checked (`gen.data.labels`); None without classes."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Gives names of the classes, in order, where they are known."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Tells how many classes the labels are of; None without classes."""
        ...

    def __len__(self) -> int:
        """Gives the number of records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Gives one record: arrays by name, without a batch axis."""
        ...

    def gather(self, indices: np.ndarray) -> Record:
        """Gives records `indices` (B,) int64 as one batch: fresh arrays by name with leading axis B."""
        ...

    def title(self, index: int) -> str:
        """Tells how messages call a record: its file, where it has one."""
        ...


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Gives the order of one epoch: a permutation of range(size), (size,) int64.

    Sorts raw Philox output keyed by (seed, epoch): that bit stream is fixed by definition, unlike the
    derived draws of NumPy's generators, so the order never changes under a library's feet.
    """
    return np.argsort(_words(size, seed, epoch), kind="stable")


def _words(size: int, seed: int, epoch: int) -> np.ndarray:
    """A random word for each record in an epoch, (size,) uint64: it places the record, its last bit is a coin."""
    return np.random.Philox(key=_key(seed, 2 * epoch)).random_raw(size)


def _key(seed: int, stream: int) -> int:
    return (stream << 64) | (seed & 0xFFFF_FFFF_FFFF_FFFF)


class _Batches:
    """Step -> this process's part of that step's global batch. Thread safe.

    Attributes:
      reading: thread -> index of the record (the first of several) that it reads now.
      read: counts reads that returned, so that a watcher sees whether there are any.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        part: slice,
        transform: Transform | None,
        gather: Gather | None,
    ):
        self.source, self.batch, self.seed, self.part, self.transform = source, batch, seed, part, transform
        self.gather = gather
        self.reading: dict[int, int] = {}
        self.read = 0
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 1 << 40  # endless for every purpose; Grain wants a number

    def __getitem__(self, step: int) -> Record:
        positions = np.arange(step * self.batch, (step + 1) * self.batch)[self.part]
        indices, coins = self._drawn(positions)
        if self.transform is None:
            with self._seen(int(indices[0])):
                return self.source.gather(indices) if self.gather is None else self.gather(indices, coins)
        return stacked(map(self._transformed, positions.tolist(), indices.tolist()), len(indices))

    def _transformed(self, position: int, index: int) -> Record:
        assert self.transform is not None
        # A record's random stream belongs to its position, not to the process that reads it.
        stream = np.random.Generator(np.random.Philox(key=_key(self.seed, 2 * position + 1)))
        with self._seen(index):
            return self.transform(stream, self.source[index])

    @contextlib.contextmanager
    def _seen(self, index: int) -> Iterator[None]:
        thread = threading.get_ident()
        self.reading[thread] = index
        yield
        del self.reading[thread]
        self.read += 1

    def _drawn(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The records at these positions of the stream, and for each a coin, (B,) bool."""
        epochs, within = np.divmod(positions, len(self.source))
        parts = [(self._order(e), within[epochs == e]) for e in range(int(epochs[0]), int(epochs[-1]) + 1)]
        indices = np.concatenate([order[places] for (order, _), places in parts])
        return indices, np.concatenate([coins[order[places]] for (order, coins), places in parts])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of an epoch, and the coin of every record in it."""
        with self._lock:
            if epoch not in self._orders:
                # Two epochs are in flight at a boundary (more only when a batch is larger than the data).
                for old in [e for e in self._orders if abs(e - epoch) > 1]:
                    del self._orders[old]
                words = _words(len(self.source), self.seed, epoch)
                self._orders[epoch] = np.argsort(words, kind="stable"), (words & np.uint64(1)).astype(bool)
            return self._orders[epoch]


def enough(path: str, count: int, batch: int) -> None:
    """Raises GenError when the `count` records at `path` do not fill a batch."""
    if count < batch:
        raise GenError(f"{path} has {count} records, fewer than the batch of {batch}; lower the batch or add data")


def expect(path: str, source: Source, **shapes: tuple[int, ...]) -> None:
    """Raises GenError unless the records at `path` hold arrays of these names and shapes (without a batch axis)."""
    record = source[0]
    for name, shape in shapes.items():
        if name not in record:
            raise GenError(f"{path} has no '{name}' among {', '.join(record)}; encode or make data that have it")
        if record[name].shape != tuple(shape):
            raise GenError(
                f"'{name}' of {path} has the shape {record[name].shape}; the model takes {tuple(shape)}, give it data "
                "of the tokenizer or encoder that it is for"
            )


def stacked(records: Iterable[Record], count: int) -> Record:
    """Gives `count` records as one batch: arrays by name with a leading axis.

    Each is copied as it comes, while the processor's cache still holds it. Raises ValueError where shapes differ.
    """
    batch: Record = {}
    for row, record in enumerate(records):
        for name, value in record.items():
            if name not in batch:
                batch[name] = np.empty((count, *value.shape), value.dtype)
            if batch[name].shape[1:] != value.shape:
                raise ValueError(f"'{name}' has the shape {value.shape} after {batch[name].shape[1:]}")
            batch[name][row] = value
    return batch


def gathered(source: Source, indices: np.ndarray) -> Record:
    """Gives records `indices` (B,) of `source` as one batch, in their order, read and decoded by several threads.

    Raises `gen.data.vanished.Stalled` for a read that never returns, and what reading raises.
    """
    parts = np.array_split(indices, -(-len(indices) // 16))
    title = "{} and those after it".format
    read = vanished.ahead(
        lambda number: source.gather(parts[number]), range(len(parts)), lambda n: title(source.title(int(parts[n][0])))
    )
    done = [future.result() for _, future in read]
    return {name: np.concatenate([part[name] for part in done]) for name in done[0]}


def batches(
    source: Source,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    transform: Transform | None = None,
    gather: Gather | None = None,
    threads: int | None = None,
    prefetch: int = 8,
) -> Iterator[Record]:
    """Endless batches of `source`, prepared ahead in the background.

    The global batch of a step depends on (seed, step) alone; process h gets its h-th contiguous part, so
    that the parts in process order are the global batch, whatever the number of processes. Resuming is
    starting at another step: there is no state to store.

    Args:
      source: records by index.
      batch: global batch size; every process receives batch / processes rows.
      seed: of the order and of the transforms' random streams.
      start: global step of the first batch.
      process, processes: which part is this process's.
      transform: (generator, record) -> record on the host; the generator is keyed by (seed, position).
      gather: reads a batch in place of ``source.gather`` where a coin for each record matters, as for stored mirror
        images; the coins are fair and others in every epoch. Not with a transform.
      threads, prefetch: workers and batches prepared ahead; neither changes what comes out. By default as many threads
        as there are processors, at most 8.

    Returns an iterator; closing it (or dropping it) ends the workers. Raises GenError for an empty source,
    a batch that the processes do not divide, or a process out of range; the iterator raises
    `gen.data.vanished.Stalled`.
    """
    if len(source) == 0:
        raise GenError("the data are empty; expected at least one record, check the path or the split")
    if batch < 1 or processes < 1 or batch % processes:
        raise GenError(f"batch {batch} is not divisible by {processes} processes; choose a multiple of {processes}")
    if not 0 <= process < processes:
        raise GenError(f"process {process} does not exist; expected 0 to {processes - 1}")
    if start < 0:
        raise GenError(f"data cannot start at step {start}; expected 0 or more")
    rows = batch // processes
    part = slice(process * rows, (process + 1) * rows)
    reader = _Batches(source, batch, seed, part, transform, gather)
    if threads is None:
        threads = min(8, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return _watched(iter(grain.MapDataset.source(reader)[start:].to_iter_dataset(options)), reader)


def _watched(iterator: grain.DatasetIterator[Record], reader: _Batches) -> Iterator[Record]:
    """The batches of `iterator`, which a thread fetches so that this one is never held by a read that hangs."""
    ready: queue.Queue[Record | BaseException] = queue.Queue(1)
    left = threading.Event()

    def fetch() -> None:
        try:
            for batch in iterator:
                ready.put(batch)
                if left.is_set():
                    break
        except BaseException as error:  # the consumer's to deal with
            ready.put(error)
        iterator.close()

    thread = threading.Thread(target=fetch, daemon=True, name="gen batches")
    thread.start()
    try:
        while True:
            found = _arrived(ready, reader)
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        left.set()
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()  # lets a thread go on that waits to put its batch
        thread.join(1.0)


def _arrived(ready: queue.Queue[Record | BaseException], reader: _Batches) -> Record | BaseException:
    """What comes next. Raises Stalled when no record is read for too long."""
    read, slices = reader.read, 0
    while True:
        try:
            return ready.get(timeout=vanished.STALL / 16)
        except queue.Empty:
            # Waiting is counted in slices: a process that was stopped for an hour has waited for one of them.
            read, slices = reader.read, slices + 1 if reader.read == read else 0
        if slices >= 16:
            names = ", ".join(reader.source.title(index) for index in sorted(set(reader.reading.values()))[:3])
            raise vanished.Stalled(names or "nothing")
