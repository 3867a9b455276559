"""Meter: metrics of a stage, read one step late so that the device is never waited for; the NaN guard's count."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gen.errors import GenError
from gen.progress import duration

__all__ = ["Meter", "Reading", "Skipped"]


class Skipped(GenError):
    """Loss or gradients were not finite for too many steps in a row; `reading` is the last of them."""

    def __init__(self, message: str, reading: "Reading") -> None:
        super().__init__(message)
        self.reading = reading


@dataclasses.dataclass
class Reading:
    """A step's metrics on their way from the device.

    Attributes:
      step: global step.
      program: its program's name.
      names: names of the row's entries.
      row: (names,) float32, perhaps still being computed.
      batch: what the step was given.
    """

    step: int
    program: str
    names: tuple[str, ...]
    row: jax.Array
    batch: Mapping[str, Any]


class Meter:
    """Sums metrics between records, measures the rate, counts skipped steps.

    Args:
      name: of the stage; offset, steps: global steps before it, and in it; batch: samples a step.
      every: steps between records.
      patience: skipped steps in a row after which `Skipped` is raised.
      fresh: whether the stage starts here; then not all of its steps may be skipped.
      named: whether metrics carry their program's name (where a task has several).
      record: takes (global step, values by name) when a record is due.
    """

    def __init__(
        self,
        name: str,
        offset: int,
        steps: int,
        batch: int,
        *,
        every: int,
        patience: int,
        fresh: bool,
        named: bool,
        record: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.name, self.offset, self.steps, self.batch = name, offset, steps, batch
        self.every, self.patience, self.fresh, self.named, self.record = every, patience, fresh, named, record
        self.rate = math.nan  # samples per second
        self.line = ""  # what the newest step looks like, for the status line
        self._applied = 0  # steps read that were not skipped
        self._pending: Reading | None = None
        self._sums: dict[str, tuple[tuple[str, ...], np.ndarray, int]] = {}
        self._skips: dict[str, int] = {}
        self._mark = (time.monotonic(), -1)  # when and at which step the last record was written

    @property
    def end(self) -> int:
        """The stage's last global step."""
        return self.offset + self.steps

    def add(self, reading: Reading) -> None:
        """Takes the row of a step (still being computed) and reads the one before. Raises `Skipped`."""
        late, self._pending = self._pending, reading
        if late is not None:
            self._read(late)
        if self._mark[1] < 0:  # the first step compiles; rates count from its end
            jax.block_until_ready(reading.row)
            self._mark = (time.monotonic(), reading.step)

    def flush(self) -> None:
        """Reads what is pending. Raises `Skipped`."""
        late, self._pending = self._pending, None
        if late is not None:
            self._read(late)

    def pause(self, seconds: float) -> None:
        """Leaves out of the rate what was not training: scores and pictures."""
        self._mark = (self._mark[0] + seconds, self._mark[1])

    def _read(self, late: Reading) -> None:
        values = np.asarray(late.row, np.float64)
        metrics = dict(zip(late.names, values, strict=True))
        skipped = not math.isfinite(metrics.get("loss", 0.0)) or any(
            value > 0 for key, value in metrics.items() if key.split("/")[-1] == "skipped"
        )
        self._applied += not skipped
        self._skips[late.program] = self._skips.get(late.program, 0) + 1 if skipped else 0
        all_lost = self.fresh and late.step == self.end and not self._applied
        if self._skips[late.program] >= self.patience or all_lost:
            raise Skipped(
                f"loss or gradients of '{late.program}' were not finite for {self._skips[late.program]} steps in a "
                f"row, up to step {late.step}",
                late,
            )
        _, total, n = self._sums.get(late.program, ((), np.zeros_like(values), 0))
        self._sums[late.program] = (late.names, total + values, n + 1)
        if late.step % self.every == 0 or late.step == self.end:
            self._record(late.step)
        self.line = self._line(late.step, metrics)

    def _record(self, step: int) -> None:
        now, values = time.monotonic(), dict[str, float]()
        for program, (names, total, n) in self._sums.items():
            prefix = f"{program}/" if self.named else ""
            values |= {prefix + name: float(v) for name, v in zip(names, total / n, strict=True)}
        self._update_rate(step, now)
        self.record(step, values | {"images_per_second": round(self.rate, 3)})
        self._sums, self._mark = {}, (now, step)

    def _update_rate(self, step: int, now: float) -> None:
        since, begun = self._mark
        if begun >= 0 and step > begun and now > since:
            self.rate = (step - begun) * self.batch / (now - since)

    def _line(self, step: int, metrics: Mapping[str, Any]) -> str:
        self._update_rate(step, time.monotonic())
        parts = [f"{self.name} {step - self.offset}/{self.steps}"]
        if self.rate > 0:
            left = (self.end - step) * self.batch / self.rate
            parts += [f"{self.rate:,.0f} img/s", f"{duration(left)} left"]
        names = {"loss": "loss", "grad_norm": "grad", "lr": "lr"}
        return "  ".join(parts + [f"{text} {metrics[key]:.4g}" for key, text in names.items() if key in metrics])
