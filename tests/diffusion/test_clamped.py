"""Clamped velocities, early heads, and internal guidance by them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.rae_v2 import RAEv2Config
from gen.diffusion.clamped import Clamped, ClampedMatching, EarlyHead
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import Draws, VelocityMatching
from gen.diffusion.prediction import EARLY, Prediction
from gen.diffusion.process import EDM, Linear
from gen.errors import GenError
from gen.experiments import rae_v2
from gen.nn.network import count, param_shapes
from gen.sampling.guidance import Chained, ClassifierFree
from gen.sampling.internal_guidance import Internal
from tests.distill.tiny import Tiny

X = jax.random.normal(jax.random.key(0), (4, 4, 3))
T = jnp.asarray([0.01, 0.2, 0.5, 0.9])
COND = {"label": jnp.asarray([0, 1, 2, 3])}  # 3 is the null label


def prediction(value: float, early: float | None = None) -> Prediction:
    def of(value: float) -> Prediction:
        return Clamped().prediction(Linear(), jnp.full_like(X, value), X, T, {})

    found = of(value)
    return found if early is None else Prediction(found.value, X, T, {EARLY: of(early)}, Linear(), "velocity")


def test_velocities_are_clamped_near_the_data() -> None:
    found = prediction(0.0)
    np.testing.assert_allclose(found.velocity[0], X[0] / 0.05, rtol=1e-5)
    np.testing.assert_allclose(found.velocity[2], X[2] / 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.denoised[2:], jnp.zeros_like(X[2:]), atol=1e-5)
    with pytest.raises(GenError, match="of the linear process"):
        Clamped().inputs(EDM(), X, T)
    draws = Draws(T[1:], jax.random.normal(jax.random.key(1), X[1:].shape))
    evaluate = lambda x, t, c: Prediction(0.0 * x, x, t, {}, Linear(), "velocity")  # noqa: E731
    losses = [loss.loss(evaluate, Linear(), X[1:], {}, draws)[0] for loss in (ClampedMatching(), VelocityMatching())]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_clamp_of_a_prediction_is_its_loss_s_too() -> None:
    """A prediction of zeros misses a velocity of data by x / max(t, least)."""
    draws = Draws(T, jax.random.normal(jax.random.key(1), X.shape))
    for least in (0.05, 0.4):
        model = Clamped(least=least)

        def evaluate(x_t: jax.Array, t: jax.Array, cond: Any, model: Clamped = model) -> Prediction:
            return model.prediction(Linear(), 0.0 * x_t, x_t, t, {})

        losses, _ = ClampedMatching().loss(evaluate, Linear(), X, {}, draws)
        np.testing.assert_allclose(losses, jnp.square(X).mean((1, 2)) / jnp.square(jnp.maximum(T, least)), rtol=1e-4)
    eps = draws.eps
    np.testing.assert_allclose(Clamped("velocity").target(Linear(), X, eps, T)[1:], (eps - X)[1:], rtol=1e-3, atol=1e-4)
    with pytest.raises(GenError, match="expected one of 'x', 'velocity'"):
        Clamped("eps")  # type: ignore[arg-type]


def test_internal_guidance_leads_away_from_the_early_head() -> None:
    denoise = lambda x, t, cond, step, carry: (prediction(1.0, 0.5), carry)  # noqa: E731
    null = lambda cond: {"label": jnp.full_like(cond["label"], 3)}  # noqa: E731

    def data(guidance: Internal) -> np.ndarray:
        found, _ = guidance(denoise, null)(X, T, COND, jnp.int32(0), {})
        return np.asarray(found.denoised[1:].mean((1, 2)))

    np.testing.assert_allclose(data(Internal(3.0)), [2.0, 2.0, 2.0], rtol=1e-4)
    np.testing.assert_allclose(data(Internal(3.0, null_scale=1.0)), [2.0, 2.0, 1.0], rtol=1e-4)
    assert Internal(1.0)(denoise, null) is denoise
    bare = Chained((Internal(2.0), ClassifierFree(1.0)))(lambda *a: (prediction(1.0), a[-1]), null)
    with pytest.raises(GenError, match="has no early head"):
        bare(X, T, COND, jnp.int32(0), {})


def test_a_network_without_early_head_cannot_be_trained_with_one() -> None:
    model = Denoiser(Tiny(), Linear(), Clamped(), EarlyHead())
    params, draws = model.net.init(jax.random.key(0)), model.objective.draw(jax.random.key(1), Linear(), X)
    with pytest.raises(GenError, match="has no early head"):
        model.objective.loss(lambda x, t, c: model(params, x, t, c), Linear(), X, COND, draws)


def test_published_size_and_refusals() -> None:
    """875.2M parameters were counted with the frequencies of the time."""
    assert count(param_shapes(rae_v2.PUBLISHED)) == pytest.approx(875.2e6, rel=2e-3)
    with pytest.raises(GenError, match="multiple of 4"):
        RAEv2Config(width=36, heads=6)
    with pytest.raises(GenError, match="after block 9 of 4"):
        RAEv2Config(depth=4, early=9)
    with pytest.raises(GenError, match="is class-conditional"):
        RAEv2Config(num_classes=0)
