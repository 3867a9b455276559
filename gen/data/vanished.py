"""Data that go away while they are read: mapped files that shrink, and reads that never return."""

import collections
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np

from gen.errors import GenError
from gen.files import reading

__all__ = ["Stalled", "ahead", "mapped_files", "still_there"]

STALL = 45.0  # seconds without a record after which data count as lost
T = TypeVar("T")


class Stalled(GenError):
    """No record came for `STALL` seconds. The threads that wait for it cannot be ended: leave by `os._exit`."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"no data for {STALL:.0f} s, while reading {what}; check that the disk or network folder answers, then "
            "start again"
        )


def ahead(
    function: Callable[[int], T], items: Sequence[int], title: Callable[[int], str], threads: int | None = None
) -> Iterator[tuple[int, Future[T]]]:
    """Gives (item, finished call of `function`) in order, a few ahead, by as many threads as there are processors.

    Raises Stalled, with the item's title, for one that takes longer than `STALL` seconds.
    """
    threads = threads or os.cpu_count() or 1
    pending: collections.deque[tuple[int, Future[T]]] = collections.deque()
    pool, stuck = ThreadPoolExecutor(threads), False
    try:
        for position in range(len(items) + 4 * threads):
            if position < len(items):
                pending.append((items[position], pool.submit(function, items[position])))
            if pending and (len(pending) > 4 * threads or position >= len(items)):
                item, future = pending.popleft()
                stuck = not wait([future], timeout=STALL).done
                if stuck:
                    raise Stalled(title(item))
                yield item, future
    finally:
        pool.shutdown(wait=not stuck, cancel_futures=True)


def mapped_files(*arrays: np.ndarray) -> dict[str, int]:
    """Files that memory-mapped arrays lie in, with the bytes that each must have."""
    files: dict[str, int] = {}
    for array in arrays:
        base = array if isinstance(array, np.memmap) else array.base
        if isinstance(base, np.memmap) and base.filename is not None:
            path = str(base.filename)
            files[path] = max(files.get(path, 0), base.offset + base.nbytes)
    return files


def still_there(files: Mapping[str, int]) -> None:
    """Raises GenError where a mapped file is gone or shorter: reading what is missing would kill the process."""
    for path, length in files.items():
        with reading(path):
            found = os.stat(path).st_size
        if found < length:
            raise GenError(f"{path} has {found} bytes, {length} when it was opened; restore it, then start again")
