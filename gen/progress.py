"""What a long job says while it works: rich's status line or bar on a terminal, a plain line now and then elsewhere."""

import collections
import math
import sys
import time
import weakref
from typing import IO, Any

__all__ = ["Bar", "Pace", "StatusLine", "duration"]

_SECONDS = 10.0  # between plain lines
_REDRAW = 0.25  # seconds between redraws of a terminal
_WINDOW = 30.0  # seconds over which the speed is measured


def duration(seconds: float) -> str:
    """Spells seconds: 3725 -> "1h02m", 75 -> "1m15s", 3.2 -> "3s"."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 60}m{total % 60:02d}s" if total >= 60 else f"{total}s"


class StatusLine:
    """One line about a running stage on stdout.

    A terminal's is rewritten in place; elsewhere it is printed every `every` seconds.
    """

    def __init__(self, *, every: float = _SECONDS, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stdout.isatty()
        self._every = _REDRAW if self.terminal else every
        self._last = -math.inf if self.terminal else time.monotonic()
        self._live: _Live | None = None

    def due(self) -> bool:
        """Tells whether it is time for another line."""
        return not self.quiet and time.monotonic() - self._last >= self._every

    def show(self, text: str) -> None:
        """Shows the line now."""
        self._last = time.monotonic()
        if self.quiet:
            return
        if not self.terminal:
            print(text, flush=True)
            return
        self._live = self._live or _Live(sys.stdout)
        self._live.show(text)

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if not self.quiet:
            self.close()
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._live is not None:
            self._live.close()
            self._live = None


class Pace:
    """The speed of a job over the last half minute; what came before its second report (compilation) does not enter."""

    def __init__(self) -> None:
        self._points: collections.deque[tuple[float, int]] = collections.deque()  # (time, done), the oldest first
        self._warm = False

    def mark(self, done: int) -> None:
        """Takes note that `done` are done by now."""
        points, now = self._points, time.monotonic()
        if len(points) > 2 and points[-1][0] - points[-2][0] < _WINDOW / 60:
            points.pop()  # jobs of many small parts keep few points
        points.append((now, done))
        if not self._warm and len(points) == 3:
            self._warm = True
            points.popleft()
        while len(points) > 2 and points[1][0] <= now - _WINDOW:
            points.popleft()

    def pause(self, seconds: float) -> None:
        """Leaves out of the speed a time just now in which the job stood still."""
        self._points = collections.deque((then + seconds, done) for then, done in self._points)

    @property
    def speed(self) -> float:
        """Tells how many a second; NaN before two reports."""
        if len(self._points) < 2:
            return math.nan
        (start, first), (now, done) = self._points[0], self._points[-1]
        return (done - first) / max(now - start, 1e-9)

    def left(self, count: int) -> float:
        """Seconds until `count` are done; infinite or NaN while nobody knows."""
        speed, missing = self.speed, count - self._points[-1][1] if self._points else count
        return missing / speed if speed else math.inf


class Bar:
    """How much of a countable job is done, its speed and the time left, on stderr.

    A bar on a terminal, else a plain line every ten seconds; either way one line at the end. It is called as
    ``bar(done, count)``: first with what was done before it began, then after every part of the work.

    Args:
      label: what the line says; "" for no line at all.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._terminal = sys.stderr.isatty()
        self._live: _Live | None = None
        self._pace = Pace()
        self._began = self._shown = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, count: int) -> None:
        """Takes note that `done` of `count` are done."""
        if not self.label:
            return
        now, start = time.monotonic(), self._first is None
        self._pace.mark(done)
        if self._first is None:
            self._began, self._first = now, done
            if done:
                self._print(f"going on at {done} of {count}")
        if done == count and not start:
            self.close()
            taken = now - self._began
            speed = (done - self._first) / max(taken, 1e-9)
            self._print(f"{done} of {count}, {speed:.1f}/s, {duration(taken)}")
        elif now - self._shown > (_REDRAW if self._terminal else _SECONDS):
            self._shown = now
            text = f"{done} of {count}, {self._pace.speed:.1f}/s, {duration(self._pace.left(count))} left"
            if self._terminal:
                self._live = self._live or _Live(sys.stderr, count)
                self._live.show(f"{self.label}: {text}", done)
            else:
                self._print(text)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _print(self, text: str) -> None:
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)


class _Live:
    """A line of a terminal that is rewritten in place, with a bar where there is a count: where rich.progress is used.

    The cursor is hidden meanwhile; it comes back when the object is closed, collected, or the program ends.
    """

    def __init__(self, file: IO[str], count: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.table import Column

        line = Column(no_wrap=True, overflow="ellipsis")
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False, table_column=line)]
        if count is not None:
            columns.append(BarColumn(bar_width=24))
        self._progress = Progress(*columns, console=Console(file=file), auto_refresh=False, transient=count is not None)
        self._task: Any = self._progress.add_task("", total=count)
        self._progress.start()
        self._stop = weakref.finalize(self, self._progress.stop)

    def close(self) -> None:
        """Leaves the line standing, or takes it away where there was a count."""
        self._stop()

    def show(self, text: str, done: int = 0) -> None:
        """Rewrites the line."""
        self._progress.update(self._task, description=text, completed=done, refresh=True)
