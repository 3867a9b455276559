"""Meter: metrics of a stage, read one step late so that the device is never waited for; the NaN guard's count."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gen.errors import GenError
from gen.progress import Pace, duration

__all__ = ["Meter", "Skipped", "StepMetrics"]


class Skipped(GenError):
    """Loss or gradients were not finite for too many steps in a row; `reading` is the last of them."""

    def __init__(self, message: str, reading: "StepMetrics") -> None:
        super().__init__(message)
        self.reading = reading


@dataclasses.dataclass
class StepMetrics:
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
        record: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.name, self.offset, self.steps, self.batch = name, offset, steps, batch
        self.every, self.patience, self.fresh, self.record = every, patience, fresh, record
        self.line = ""  # what the newest step looks like, for the status line
        self._applied = 0  # steps read that were not skipped
        self._pending: StepMetrics | None = None
        self._sums: dict[str, tuple[float, int]] = {}  # metric -> sum since the last record, of how many steps
        self._newest: dict[str, float] = {}
        self._pace = Pace()
        self._skips: dict[str, int] = {}
        self._mark = (time.monotonic(), -1)  # when and at which step the last record was written

    @property
    def end(self) -> int:
        """Gives the stage's last global step."""
        return self.offset + self.steps

    def add(self, reading: StepMetrics) -> None:
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
        self._pace.pause(seconds)

    def _read(self, late: StepMetrics) -> None:
        metrics = dict(zip(late.names, np.asarray(late.row, np.float64).tolist(), strict=True))
        of = {name: [value for key, value in metrics.items() if _last(key) == name] for name in ("loss", "skipped")}
        skipped = any(value > 0 for value in of["skipped"]) or not all(map(math.isfinite, of["loss"]))
        self._applied += not skipped
        self._skips[late.program] = self._skips.get(late.program, 0) + 1 if skipped else 0
        all_lost = self.fresh and late.step == self.end and not self._applied
        if self._skips[late.program] >= self.patience or all_lost:
            raise Skipped(
                f"loss or gradients of '{late.program}' were not finite for {self._skips[late.program]} steps in a "
                f"row, up to step {late.step}",
                late,
            )
        for name, value in metrics.items():
            total, n = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, n + 1)
        self._newest |= metrics
        self._pace.mark(late.step)
        if late.step % self.every == 0 or late.step == self.end:
            self._record(late.step)
        self.line = self._line(late.step)

    def _record(self, step: int) -> None:
        now, (since, begun) = time.monotonic(), self._mark
        rate = (step - begun) * self.batch / (now - since) if 0 <= begun < step and now > since else math.nan
        means = {name: total / n for name, (total, n) in self._sums.items()}
        self.record(step, means | {"images_per_second": round(rate, 3)})
        self._sums, self._mark = {}, (now, step)

    def _line(self, step: int) -> str:
        parts = [f"{self.name} {step - self.offset}/{self.steps}"]
        if self._pace.speed > 0:
            parts += [f"{self._pace.speed * self.batch:,.0f} img/s", f"{duration(self._pace.left(self.end))} left"]
        if "loss" in self._newest:
            shown = {"loss": "loss", "grad": "grad_norm", "lr": "lr"}
        else:  # several parts: of each its loss
            shown = {key.replace("/", " ").replace("_", " "): key for key in self._newest if _last(key) == "loss"}
        return "  ".join(
            parts + [f"{text} {self._newest[key]:.4g}" for text, key in shown.items() if key in self._newest]
        )


def _last(key: str) -> str:
    """ "student/loss" -> "loss"."""
    return key.rpartition("/")[2]
