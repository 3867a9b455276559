import math
from collections.abc import Callable

import numpy as np
import optax
import pytest

from gen.errors import GenError
from gen.training.optim import OptimConfig

TOTAL, RISE = 110, 10
DECAYS: dict[str, Callable[[], optax.Schedule]] = {
    "cosine": lambda: optax.warmup_cosine_decay_schedule(0.0, 2.0, RISE, TOTAL, end_value=0.2),
    "linear": lambda: optax.join_schedules(
        (optax.linear_schedule(0.0, 2.0, RISE), optax.linear_schedule(2.0, 0.2, TOTAL - RISE)), (RISE,)
    ),
    "constant": lambda: optax.warmup_constant_schedule(0.0, 2.0, RISE),
}


@pytest.mark.parametrize("schedule", DECAYS)
def test_rates_are_optax_schedules(schedule: str) -> None:
    optim = OptimConfig(lr=2.0, schedule=schedule, warmup=RISE, final=0.1)
    steps = (0, 1, 5, 9, 10, 11, 60, 109, 110, 200)
    wanted = [float(DECAYS[schedule]()(n)) for n in steps]
    np.testing.assert_allclose([optim.rate(n, TOTAL) for n in steps], wanted, rtol=1e-5, atol=1e-7)
    assert optim.derived == (schedule != "constant")


def test_without_a_warm_up_the_first_update_has_the_whole_rate() -> None:
    for schedule in ("constant", "cosine", "linear"):
        assert OptimConfig(lr=0.5, schedule=schedule).rate(0, 10) == 0.5
    np.testing.assert_allclose(OptimConfig(lr=1.0, schedule="linear").rate(5, 10), 0.5, rtol=1e-12)
    assert OptimConfig(lr=1.0, schedule="linear").rate(10, 10) == 0.0


def test_a_schedule_is_as_long_as_it_is_said_to_be() -> None:
    optim = OptimConfig(lr=1.0, schedule="cosine")
    assert [optim.rate(total // 2, total) for total in (10, 300, 3000)] == pytest.approx([0.5] * 3)


def test_inverse_sqrt_falls_from_its_knee_whatever_the_length() -> None:
    """EDM2's: lr / sqrt(max(n / knee, 1)), times its linear rise, which need not be a whole number of updates."""
    optim = OptimConfig(lr=3.0, schedule="inverse-sqrt", warmup=2.5, knee=4)
    for n in (0, 1, 2, 3, 4, 9, 16, 400):
        wanted = 3.0 * min(n / 2.5, 1.0) / math.sqrt(max(n / 4, 1.0))
        assert optim.rate(n, 1) == pytest.approx(wanted, rel=1e-12)
    assert not optim.derived


def test_a_stage_shorter_than_the_warm_up_ends_within_it() -> None:
    for schedule in ("constant", "cosine", "linear"):
        optim = OptimConfig(lr=1.0, schedule=schedule, warmup=10)
        assert [optim.rate(n, 5) for n in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": -1.0}, "lr"),
        ({"schedule": "inverse-sqrt"}, "'inverse-sqrt' with knee 0; inverse-sqrt needs a knee of at least 1"),
        ({"schedule": "cosine", "knee": 5}, "'cosine' with knee 5"),
    ],
)
def test_bad_settings_are_refused(settings: dict, text: str) -> None:
    with pytest.raises(GenError, match=text):
        OptimConfig(**settings)
