"""Distribution matching and adversarial distillation on a known distribution in the plane."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.distill.discriminator import ApproximateR1
from gen.distill.dmd2 import DMD2Task
from gen.distill.f_distill import FDistillTask
from gen.distill.kd import KDTask
from gen.distill.ladd import LADDTask
from gen.distill.multi_student import MultiStudentTask
from gen.nn.adversarial import TokenLogits
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.noise import unit_noise
from gen.sampling.router import Routed
from gen.sampling.solvers import Heun
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d

OPTIM = OptimConfig(1e-3, betas=(0.0, 0.99), schedule="cosine", warmup=50, final=0.05, clip=10.0)
HEAD: dict[str, Any] = {"head": TokenLogits(64), "taps": ("inner2",)}
COMMON: dict[str, Any] = {"teacher": toy2d.DENOISER, "optim": OPTIM, "emas": (Constant(0.98, warmup=True),)}
MATCHING: dict[str, Any] = COMMON | {"fake_optim": dataclasses.replace(OPTIM, lr=2e-3), "ratio": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "steps"),
    [
        (DMD2Task(**MATCHING), 1000),
        (DMD2Task(**MATCHING, **HEAD, times=(1.0, 0.5)), 1000),
        (FDistillTask(**MATCHING, **HEAD), 1000),
        (LADDTask(**COMMON, **HEAD, head_optim=dataclasses.replace(OPTIM, lr=2e-3), r1=ApproximateR1(1.0)), 2000),
    ],
    ids=["dmd2", "dmd2-two-steps", "f-distill", "ladd"],
)
def test_students_match_the_data(task: Any, steps: int) -> None:
    toy2d.check_toy(task, steps)


@pytest.mark.slow
def test_two_students_match_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = toy2d.batch

    def divided(step: Any, count: int = 256) -> dict[str, jax.Array]:
        found = plain(step, count)
        order = jnp.argsort(found["label"], stable=True)
        return {name: value[order] for name, value in found.items()}

    monkeypatch.setattr(toy2d, "batch", divided)
    toy2d.check_toy(MultiStudentTask(DMD2Task(**MATCHING), (0, 1)), 1000, sampler=Routed())


@pytest.mark.slow
def test_regression_on_pairs_reaches_the_teachers_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 4096
    label = jnp.arange(count, dtype=jnp.int32) % toy2d.CLASSES
    keys = jax.random.split(jax.random.key(3), count)
    generator = Sampler(Heun(), Uniform(), 20).generator(KDTask(teacher=toy2d.DENOISER).models(), None)
    made = jax.jit(generator)({"net": toy2d.teacher()}, keys, {"label": label})
    pairs = {"noise": unit_noise(keys, (1, 2)), "latent": made, "label": label}

    def batch(step: Any, rows: int = 256) -> dict[str, jax.Array]:
        index = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), (rows,), 0, count)
        return {name: value[index] for name, value in pairs.items()}

    monkeypatch.setattr(toy2d, "batch", batch)
    optim = OptimConfig(3e-3, schedule="cosine", warmup=50, clip=1.0)
    toy2d.check_toy(KDTask(**COMMON | {"optim": optim}), 2000)
    assert np.isfinite(toy2d.teacher_distance(4))
