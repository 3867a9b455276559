"""SlimFlow: the annealing, its stages, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.distill.slimflow import EDGE, AnnealingReflowTask, FlowGuidedTask, annealed_noise
from gen.errors import GenError
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.tiny import Tiny

TEACHER = Denoiser(Tiny(), Linear())
SMALL = Denoiser(Tiny(width=8), Linear())
OPTIM = OptimConfig(2e-3)
ANNEALING = AnnealingReflowTask(teacher=TEACHER, student=SMALL, horizon=4, optim=OPTIM, emas=(Constant(0.5),))


def test_noise_stays_of_unit_size() -> None:
    z, fresh = jax.random.normal(jax.random.key(0), (2, 2000, 4))
    for beta in (0.0, 0.3, 1.0):
        mixed = annealed_noise(z, fresh, jnp.float32(beta))
        assert abs(float(mixed.std()) - 1.0) < 0.03
    np.testing.assert_array_equal(annealed_noise(z, fresh, jnp.float32(0.0)), z)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("linear", [1.0, 0.5, 0.0, 0.0]),
        ("cosine", [1.0, 0.5, 0.0, 0.0]),
        ("exponential", np.exp([0, -0.5, -1.0, -2.0])),
        ("none", [0.0] * 4),
    ],
)
def test_the_share_of_fresh_noise_falls(law: str, expected: list[float]) -> None:
    task = dataclasses.replace(ANNEALING, annealing=law)
    found = [task.inputs(step, 10)["beta"] for step in (0, 2, 4, 8)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_images_are_mirrored_with_their_noise() -> None:
    task = AnnealingReflowTask(teacher=Denoiser(Tiny(size=(2, 4)), Linear()), flip=True)
    x, z, fresh = jax.random.normal(jax.random.key(0), (3, 2, 2, 4, 3))
    flip = jnp.asarray([True, False])
    data, noise = task.pair(x, z, fresh, flip, jnp.float32(0.5))
    np.testing.assert_array_equal(data[0], x[0, :, ::-1])
    np.testing.assert_array_equal(data[1], x[1])
    np.testing.assert_allclose(noise[0], annealed_noise(z, fresh, jnp.float32(0.5))[0, :, ::-1], rtol=1e-6)


def test_the_second_stage_is_guided_by_the_average_of_the_first() -> None:
    frozen, key = {"teacher": TEACHER.net.init(jax.random.key(0))}, jax.random.key(1)
    first = ANNEALING.init(key, frozen, None)
    first = dataclasses.replace(first, ema=jax.tree.map(lambda leaf: leaf + 1.0, first.ema))
    task = FlowGuidedTask(teacher=TEACHER, student=SMALL, optim=OPTIM)
    alone = task.init(key, frozen, None)
    assert task.guide(alone, frozen) == (TEACHER, frozen["teacher"])
    state = task.init(key, frozen, first)
    denoiser, params = task.guide(state, frozen)
    assert denoiser == SMALL
    jax.tree.map(np.testing.assert_array_equal, params, first.ema["student"])
    jax.tree.map(np.testing.assert_array_equal, state.params["student"], first.params["student"])


def test_a_flow_that_is_straight_agrees_with_its_step() -> None:
    """Where the flow has the student's velocity everywhere, two steps lead where one does."""
    task = FlowGuidedTask(teacher=TEACHER)
    z, v = jax.random.normal(jax.random.key(0), (2, 3, 4, 3))
    t = task.takeover(jnp.asarray([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(t, [0.8, 0.5, 0.2], rtol=1e-6)
    _, _, target = task.two_steps(lambda x, t, cond: v, z, v, t, {})
    np.testing.assert_allclose(target, v, rtol=1e-4, atol=1e-5)
    assert task.models()["net"].times == (1.0 - EDGE,)


def test_what_does_not_fit_is_refused() -> None:
    for message, changes in {
        "makes one-step students": {"times": (0.9, 0.5)},
        "compares nothing": {"squared": 0.0},
        "no images to be compared": {"perceptual": object()},
    }.items():
        with pytest.raises(GenError, match=message):
            FlowGuidedTask(teacher=TEACHER, **changes)
    with pytest.raises(GenError, match="annealing over 0 steps"):
        AnnealingReflowTask(teacher=TEACHER, horizon=0)


@pytest.mark.slow
def test_a_smaller_student_of_the_toy_in_one_step() -> None:
    student = Denoiser(toy2d.Plane(width=72), Linear())
    settings = {"teacher": toy2d.DENOISER, "student": student, "emas": (Constant(0.99, warmup=True),)}
    first = AnnealingReflowTask(**settings, horizon=1500, optim=OptimConfig(3e-3, clip=1.0))
    annealed = toy2d.train(first, {"teacher": toy2d.teacher()}, 3000, rows=toy2d.pairs)
    second = FlowGuidedTask(**settings, optim=OptimConfig(2e-3, schedule="cosine", clip=1.0))
    toy2d.check_toy(second, 2500, previous=annealed, rows=toy2d.pairs)
