"""Progressive distillation: its target on any process, its chain of stages, and the toy in one step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.cosine import Cosine
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import EDM, VP, Linear, expand
from gen.distill.guided_distillation import guided_student
from gen.distill.progressive_distillation import ProgressiveTask, halves, weighted_error
from gen.errors import GenError
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import DDIM
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.tiny import Tiny

TEACHER = Denoiser(Tiny(), Linear())
COND = {"label": jnp.arange(4, dtype=jnp.int32) % 3}


@pytest.mark.parametrize("process", [Linear(), VP(), Cosine(), EDM()], ids=lambda p: type(p).__name__)
def test_one_step_with_the_target_lands_where_two_steps_do(process: object) -> None:
    """For all steps but the last, whose target is the second data prediction."""
    denoiser = Denoiser(Tiny(), process, Predict("x"))
    params, steps = denoiser.net.init(jax.random.key(0)), 4
    task = ProgressiveTask(teacher=denoiser, steps=steps)
    i = jnp.arange(4)
    at = halves(process, steps, i)
    z = expand(at.s, jnp.ones((4, 4, 3))) * jax.random.normal(jax.random.key(1), (4, 4, 3))
    target, middle, second = task.target(denoiser, params, z, at, COND)
    end = np.asarray(process.at(np.arange(steps) / steps), np.float64)
    a2, s2 = (jnp.asarray(f(end), jnp.float32)[:, None, None] for f in (process.alpha, process.sigma))
    a1, s1, s, a = (expand(v, z) for v in (at.a_middle, at.s_middle, at.s, at.a))
    two = a2 * second + s2 / s1 * (middle - a1 * second)
    one = a2 * target + s2 / s * (z - a * target)
    np.testing.assert_allclose(one[1:], two[1:], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(target[0], second[0])


def test_weights_are_errors_of_other_quantities() -> None:
    x, target, eps = jax.random.normal(jax.random.key(0), (3, 4, 5))
    a, s = jnp.asarray([0.9, 0.6, 0.3, 0.1]), jnp.asarray([0.1, 0.8, 0.9, 1.0])
    del eps
    wide_a, wide_s = a[:, None], s[:, None]
    noise = -wide_a / wide_s * (x - target)
    np.testing.assert_allclose(weighted_error(x, target, a, s, "snr"), jnp.square(noise).mean(1), rtol=1e-5)
    v = wide_a * noise - wide_s * (x - target)
    np.testing.assert_allclose(weighted_error(x, target, a, s, "v"), jnp.square(v).mean(1), rtol=1e-5)
    both = jnp.maximum(*(weighted_error(x, target, a, s, w) for w in ("constant", "snr")))
    np.testing.assert_allclose(weighted_error(x, target, a, s), both, rtol=1e-6)


def test_every_stage_learns_from_the_average_of_the_one_before() -> None:
    frozen, key = {"teacher": TEACHER.net.init(jax.random.key(0))}, jax.random.key(1)
    task = ProgressiveTask(teacher=TEACHER, emas=(Constant(0.9),))
    first = task.init(key, frozen, None)
    assert not first.aux
    first = dataclasses.replace(first, ema=jax.tree.map(lambda leaf: leaf + 1.0, first.ema))
    second = task.init(key, frozen, first)
    jax.tree.map(np.testing.assert_array_equal, second.aux["teacher"], first.ema["student"])
    jax.tree.map(np.testing.assert_array_equal, second.params["student"], first.ema["student"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GenError, match="a student of 0 steps"):
        ProgressiveTask(teacher=TEACHER, steps=0)
    with pytest.raises(GenError, match="give the lower one first"):
        ProgressiveTask(teacher=TEACHER, scales=(2.0, 1.0))
    with pytest.raises(GenError, match="that follows its teacher's steps needs the same"):
        ProgressiveTask(teacher=TEACHER, student=Denoiser(Tiny(), VP()))
    with pytest.raises(GenError, match=r"teacher makes \(4, 3\) and the student \(8, 3\)"):
        ProgressiveTask(teacher=TEACHER, student=Denoiser(Tiny(size=(8,)), Linear()))
    task = ProgressiveTask(teacher=TEACHER, student=guided_student(TEACHER))
    with pytest.raises(GenError, match="put a stage of guided distillation before"):
        task.init(jax.random.key(0), {"teacher": TEACHER.net.init(jax.random.key(0))}, None)


@pytest.mark.slow
def test_the_toy_in_one_step() -> None:
    state, frozen = None, {"teacher": toy2d.teacher()}
    optim = OptimConfig(2e-3, schedule="linear", clip=1.0)
    for steps in (16, 8, 4, 2):
        task = ProgressiveTask(teacher=toy2d.DENOISER, steps=steps, optim=optim)
        state = toy2d.train(task, frozen, 1000, previous=state)
    sampler = Sampler(DDIM(), Uniform(), 1, ClassifierFree(1.0))
    toy2d.check_toy(dataclasses.replace(task, steps=1), 3000, sampler=sampler, previous=state)
