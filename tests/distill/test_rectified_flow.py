"""Reflow: its law of times, what becomes of pairs, other processes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.conversions import Converted, rectified
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import EDM, VP, Linear, Trigonometric
from gen.distill.rectified_flow import ReflowTask, UShaped, pseudo_huber, straightness, u_shaped_times
from gen.errors import GenError
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Euler
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.tiny import Tiny


def test_times_are_u_shaped() -> None:
    """The draws have the density cosh(a (t - 1/2)): its mean |t - 1/2| and its halves."""
    t = np.asarray(UShaped(4.0)(jax.random.key(0), Linear(), 20_000))
    grid = (np.arange(2000) + 0.5) / 2000
    density = np.cosh(4.0 * (grid - 0.5))
    expected = (np.abs(grid - 0.5) * density).sum() / density.sum()
    assert np.abs(np.abs(t - 0.5).mean() - expected) < 0.004
    assert abs((t < 0.5).mean() - 0.5) < 0.015
    ends = u_shaped_times(jnp.asarray([0.0, 1.0]), jnp.asarray([False, False]), 4.0)
    np.testing.assert_allclose(ends, [1e-5, 1.0 - 1e-5], rtol=1e-4)


def test_straightness_is_zero_on_straight_lines() -> None:
    times = np.array([1.0, 0.7, 0.2, 0.0])
    ends = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    line = jnp.stack([(1.0 - t) * ends[0] + t * ends[1] for t in times])
    np.testing.assert_allclose(straightness(line, times), 0.0, atol=1e-10)
    assert (straightness(line.at[1].add(0.1), times) > 1e-3).all()


def test_pseudo_huber_by_its_formula() -> None:
    e = jax.random.normal(jax.random.key(0), (2, 4, 3))
    c = 0.00054 * 12
    expected = (np.sqrt(np.square(e).sum((1, 2)) + c**2) - c) / 12
    np.testing.assert_allclose(pseudo_huber(e), expected, rtol=1e-6)


@pytest.mark.parametrize("process", [EDM(), VP(), Trigonometric()], ids=repr)
def test_any_denoiser_is_a_rectified_flow(process: object) -> None:
    """At equal log-SNR its data prediction is its own, and its velocity (x_t - D) / t."""
    kind = Predict("x") if isinstance(process, EDM) else Predict("v")
    own = Denoiser(Tiny(), process, kind)
    flow, params, cond = rectified(own), own.net.init(jax.random.key(0)), {"label": jnp.arange(3)}
    assert from_json(to_json(flow.parameterization)) == flow.parameterization
    x_t, t = jax.random.normal(jax.random.key(1), (3, 4, 3)), jnp.asarray([0.1, 0.5, 0.9])
    seen = own.under(Linear())(params, x_t, t, cond)
    found = flow(params, x_t, t, cond)
    np.testing.assert_allclose(found.denoised, seen.denoised, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.velocity, (x_t - found.denoised) / t[:, None, None], rtol=1e-3, atol=1e-4)
    assert isinstance(flow.parameterization, Converted)
    eps = jnp.ones_like(x_t)
    target = flow.parameterization.target(Linear(), x_t, eps, t)
    if kind.output == "x":
        np.testing.assert_array_equal(target, x_t)


def test_noise_of_the_pairs_is_brought_to_unit_size() -> None:
    task = ReflowTask(teacher=Denoiser(Tiny(), EDM(), Predict("x")))
    z = jax.random.normal(jax.random.key(0), (2, 4, 3))
    x, found = task.pairs({"latent": 0.5 * z, "noise": 80.0 * z})
    np.testing.assert_allclose(found, z, rtol=1e-6)
    np.testing.assert_array_equal(x, 0.5 * z)


def test_what_does_not_fit_is_refused() -> None:
    own = Denoiser(Tiny(), Linear())
    row = {"latent": np.zeros((2, 4, 3), np.float32), "label": np.zeros(2, np.int32)}
    with pytest.raises(GenError, match="hold no 'noise': reflow needs pairs"):
        ReflowTask(teacher=own).check(row)
    with pytest.raises(GenError, match="student's process is EDM; straight paths"):
        ReflowTask(teacher=own, student=Denoiser(Tiny(), EDM(), Predict("x")))
    with pytest.raises(GenError, match=r"teacher makes \(4, 3\) and the student \(8, 3\)"):
        ReflowTask(teacher=own, student=Denoiser(Tiny(size=(8,)), Linear()))
    with pytest.raises(GenError, match="cannot be mirrored"):
        ReflowTask(teacher=own, flip=True)
    with pytest.raises(GenError, match="no images to be compared"):
        ReflowTask(teacher=own, perceptual=object())
    with pytest.raises(GenError, match="expected a positive number"):
        UShaped(0.0)


@pytest.mark.slow
def test_the_toy_in_one_step() -> None:
    """Reflow of the toy's own pairs: one Euler step is nearer to the data than four of the teacher."""
    task = ReflowTask(
        teacher=toy2d.DENOISER,
        optim=OptimConfig(2e-3, schedule="cosine", clip=1.0),
        emas=(Constant(0.99, warmup=True),),
    )
    toy2d.teacher()
    toy2d.check_toy(task, 3000, sampler=Sampler(Euler(), Uniform(), 1, ClassifierFree(1.0)), rows=toy2d.pairs)
