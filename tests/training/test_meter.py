"""What a stage's meter records, says and refuses."""

import math
import time

import numpy as np
import pytest

from gen.training.meter import Meter, Skipped, StepMetrics


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def meter(records: list, steps: int = 100, every: int = 10) -> Meter:
    return Meter("matching", 50, steps, 8, every=every, patience=3, fresh=True, record=lambda *row: records.append(row))


def read(into: Meter, step: int, program: str = "net", **metrics: float) -> None:
    names = tuple(name.replace("__", "/") for name in metrics)
    into.add(StepMetrics(50 + step, program, names, np.float32(list(metrics.values())), {}))  # type: ignore[arg-type]


def test_metrics_are_means_over_the_steps_that_gave_them(clock: Clock) -> None:
    records: list = []
    own = meter(records)
    for step in range(1, 11):
        moved = {"student__loss": float(step)} if step % 5 == 1 else {}
        read(own, step, "student" if moved else "fake_score", fake_score__loss=2.0 * step, **moved)
        clock.now += 1
    own.flush()
    ((step, values),) = records
    assert (step, values) == (60, {"student/loss": 3.5, "fake_score/loss": 11.0, "images_per_second": 7.2})
    assert own.line.startswith("matching 10/100  8 img/s  ")
    assert own.line.endswith("fake score loss 20  student loss 6")


def test_pictures_do_not_move_the_time_left(clock: Clock) -> None:
    own = meter([])
    for step in range(1, 61):
        read(own, step, loss=1.0, grad_norm=0.5, lr=0.1)
        if step == 50:
            clock.now += 1000
            own.pause(1000)
        clock.now += 1
    assert own.line == "matching 59/100  8 img/s  41s left  loss 1  grad 0.5  lr 0.1"


@pytest.mark.parametrize(
    "bad", [{"loss": math.nan}, {"student__loss": math.inf}, {"fake_score__loss": 1.0, "student__skipped": 1.0}]
)
def test_steps_that_are_lost_in_a_row_end_the_run(clock: Clock, bad: dict[str, float]) -> None:
    own = meter([])
    read(own, 1, loss=1.0)
    for step in (2, 3, 4):
        read(own, step, **bad)
    with pytest.raises(Skipped, match="'net' were not finite for 3 steps in a row, up to step 54") as caught:
        own.flush()
    assert caught.value.reading.step == 54
