"""The processes of one job leave together: what goes wrong on one of them ends all, within seconds and with its line.

Left alone, the others would wait in a collective operation for a process that has gone, until jax gives up after
minutes. The process that fails therefore writes its line where all can read it, the key-value store that
`jax.distributed` keeps on process 0; a thread of every process looks there once a second.
"""

import contextlib
import os
import sys
import threading
import time
from typing import Any, NoReturn

__all__ = ["fail", "farewell", "joined", "line_of_another", "part", "watch"]

_KEY = "gen/failed"
_EVERY = 1.0  # seconds between looks at the store
_FAREWELL = 8.0  # seconds that the processes wait for each other before they leave


class _Watch:
    """The thread that looks for another process's line; `client` is jax's, of the store."""

    def __init__(self, client: Any, process: int) -> None:
        self.client, self.process = client, process
        self.over, self.leaving = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self.run, name="gen-watch", daemon=True)

    def run(self) -> None:
        while not self.over.wait(_EVERY):
            found = self.read()
            if found is not None:
                self.leave(*found)

    def read(self) -> tuple[int, str] | None:
        """The status and the line of the process that failed first, or None."""
        with contextlib.suppress(Exception):  # jax has no type of its own for "no such key"
            status, _, line = str(self.client.key_value_try_get(_KEY)).partition(" ")
            return int(status), line
        return None

    def tell(self, status: int, line: str) -> None:
        with contextlib.suppress(Exception):  # another process was first
            self.client.key_value_set(_KEY, f"{status} {line} (on process {self.process})")

    def leave(self, status: int, line: str, shown: bool = False) -> NoReturn:
        """Prints `line` unless it is `shown` already, waits until all have read theirs, and ends this process.

        Process 0 keeps the store, and the death of the store kills the others with a stack trace: it leaves last.
        """
        self.leaving.acquire()  # never released: the first thread to come here ends the process
        if not shown:
            print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self.client.wait_at_barrier("gen/leaving", int(1000 * _FAREWELL))
        if self.process == 0:
            time.sleep(1.0)
        sys.stdout.flush()
        os._exit(status)


_watch: _Watch | None = None


def watch() -> None:
    """Starts to look for failures of the other processes. To be called once this process has joined the job."""
    global _watch
    from jax._src.distributed import global_state  # jax offers the store nowhere else

    _watch = _Watch(global_state.client, global_state.process_id)
    _watch.thread.start()


def part() -> None:
    """Ends the watch: this process has done its work."""
    global _watch
    if _watch is not None:
        _watch.over.set()
        _watch.thread.join()
        _watch = None


def farewell() -> None:
    """Waits until all processes of the job have come to their end, where this is one of several."""
    if _watch is not None:
        from jax import distributed

        part()
        distributed.shutdown()


def joined() -> bool:
    """Tells whether this process works with others under watch."""
    return _watch is not None


def line_of_another() -> tuple[int, str] | None:
    """Gives (status, line) of a process that failed before, whose end is the likely cause of an error here; None if
    alone.

    Waits a moment for it: the end of a connection is seen before the reason arrives.
    """
    assert _watch is not None
    for _ in range(30):
        found = _watch.read()
        if found is not None:
            return found
        time.sleep(0.1)
    return None


def fail(status: int, line: str, *, shown: bool = False) -> NoReturn:
    """Ends all processes of the job with exit status `status`; each prints `line`, this one unless it is `shown`."""
    assert _watch is not None
    _watch.tell(status, line)
    _watch.leave(status, line, shown)
