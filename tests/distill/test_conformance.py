"""Both distillers with all their parts under the engine; tests/conformance holds every task with defaults."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gen.distill.kd import KDTask
from gen.kinds import KINDS
from gen.sampling.generator import FewSteps, OneStepGenerator
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill.test_dmd2 import DENOISER, TASK, teacher
from tests.training.conformance import check_devices, check_task

OPTIM = OptimConfig(lr=1e-3, eps=1e-3)  # a large epsilon: Adam's first steps amplify rounding otherwise
DMD2 = dataclasses.replace(TASK, optim=OPTIM, fake_optim=OPTIM)
KD = KDTask(teacher=DENOISER, optim=OPTIM, emas=(Constant(0.9),))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Latents, starting noise and labels that depend on (seed, step, row) alone."""

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        step, part = start, slice(process * batch // processes, (process + 1) * batch // processes)
        while True:
            rows = np.random.default_rng((seed, step)).normal(size=(2, batch, 4, 3)).astype(np.float32)
            yield {"latent": rows[0][part], "noise": rows[1][part], "label": np.arange(batch, dtype=np.int32)[part] % 3}
            step += 1

    def identity(self) -> str:
        return "rows"


@pytest.fixture
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"test-rows": f"{__name__}:Rows", "tiny": "tests.distill.tiny:Tiny"}
    monkeypatch.setitem(KINDS, "test-distill", rows)


@pytest.mark.slow
@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize("task", [KD, DMD2], ids=["kd", "dmd2"])
def test_conformance(task: Any, tmp_path: Path) -> None:
    check_task(task, Rows(), {"teacher": teacher()}, tmp_path)


def build_kd() -> Any:
    return KD, Rows(), {"teacher": teacher()}


def build_dmd2() -> Any:
    return DMD2, Rows(), {"teacher": teacher()}


@pytest.mark.slow
@pytest.mark.usefixtures("_kinds")
@pytest.mark.parametrize("build", ["build_kd", "build_dmd2"])
def test_devices(build: str, tmp_path: Path) -> None:
    check_devices(f"{__name__}:{build}", tmp_path)


def test_previews_are_the_students_samples() -> None:
    state = TASK.init(jax.random.key(0), {"teacher": teacher()}, None)
    generator = FewSteps().generator(TASK.models(), None)
    pictures = TASK.preview(state, {"teacher": teacher()}, jax.random.key(1), generator)["samples"]
    assert pictures.shape == (8, 4, 3)
    assert float(abs(pictures).max()) <= 1.0
    keys, cond = jax.random.split(jax.random.key(1), 8), {"label": np.arange(8, dtype=np.int32) % 3}
    made = OneStepGenerator(DENOISER, 1.0)({"net": state.ema["student"]}, keys, cond)
    np.testing.assert_array_equal(pictures, np.clip(made, -1.0, 1.0))
    assert TASK.preview(state, {}, jax.random.key(1), None) == {}
