"""Native losses: their draws, their minima, what sends gradients where."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.chain import Chain
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import EDMPrecondition, Predict
from gen.diffusion.objectives import DDPMLoss, Draws, EDMLoss, VelocityMatching
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, VE, Linear, Trigonometric, expand
from gen.diffusion.times import TimeSampler
from gen.errors import GenError

X = jax.random.normal(jax.random.key(0), (64, 3, 3, 2))


def oracle(process, kind, x=X):
    """Predicts the very x that was noised: the minimum of every loss."""

    def evaluate(x_t, t, cond):
        a, s = (expand(f(t), x) for f in (process.alpha, process.sigma))
        exact = Prediction(x, x_t, t, {}, process, "x")
        value = {"x": x, "eps": (x_t - a * x) / s}.get(kind)
        value = exact.as_kind(kind) if value is None else value
        return Prediction(value, x_t, t, {"variance": -jnp.ones_like(x)}, process, kind)

    return evaluate


@pytest.mark.parametrize(
    ("objective", "process", "kind"),
    [
        (VelocityMatching(), Linear(), "velocity"),
        (VelocityMatching(TimeSampler("logit-normal")), Trigonometric(), "velocity"),
        (EDMLoss(), EDM(), "x"),
        (DDPMLoss(variance="small"), DDPM(), "eps"),
        (DDPMLoss(variance="large", kept=(0, 10, 500)), DDPM("cosine"), "v"),
        (DDPMLoss(variance="small"), DDPM(), "x"),
    ],
)
def test_the_truth_is_the_minimum(objective, process, kind) -> None:
    draws = objective.draw(jax.random.key(1), process, X)
    losses, terms = objective.loss(oracle(process, kind), process, X, {}, draws)
    assert losses.shape == (64,)
    assert all(v.shape == (64,) for v in terms.values())
    np.testing.assert_allclose(losses, 0.0, atol=2e-3)
    worse, _ = objective.loss(oracle(process, kind, X + 0.5), process, X, {}, draws)
    assert float(worse.mean()) > float(losses.mean()) + 1e-3
    assert from_json(to_json(objective)) == objective


def test_velocity_matching_is_the_mean_square() -> None:
    draws = Draws(jnp.full(64, 0.25), jnp.ones_like(X))

    def evaluate(x_t, t, cond):
        np.testing.assert_allclose(x_t, 0.75 * X + 0.25, rtol=1e-5)
        return Prediction(jnp.zeros_like(X), x_t, t, {}, Linear(), "velocity")

    losses, _ = VelocityMatching().loss(evaluate, Linear(), X, {}, draws)
    np.testing.assert_allclose(losses, np.square(1.0 - np.asarray(X)).mean((1, 2, 3)), rtol=1e-5)


def test_edm_weight_and_noise_levels() -> None:
    process = EDM(sigma_data=0.5)
    draws = Draws(jnp.full(64, 2.0), jnp.zeros_like(X))
    losses, terms = EDMLoss().loss(oracle(process, "x", X + 1.0), process, X, {}, draws)
    np.testing.assert_allclose(terms["denoised_mse"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(losses, (4.0 + 0.25) / 1.0, rtol=1e-5)
    levels = np.log(EDMLoss(-0.5, 0.8).draw(jax.random.key(0), process, jnp.zeros((20_000, 1))).t)
    assert abs(levels.mean() + 0.5) < 0.03
    assert abs(levels.std() - 0.8) < 0.03


def test_ddpm_times_are_the_chain_s() -> None:
    kept = (1, 4, 100, 999)
    t = DDPMLoss(kept=kept).draw(jax.random.key(0), DDPM(), jnp.zeros((4000, 1))).t
    index, counts = np.unique(np.asarray(DDPM().index(t)), return_counts=True)
    np.testing.assert_array_equal(index, kept)
    assert counts.min() > 850


def test_draws_do_not_depend_on_the_batch_s_values() -> None:
    one, two = (DDPMLoss().draw(jax.random.key(3), DDPM(), x) for x in (X, 2 * X))
    np.testing.assert_array_equal(one.eps, two.eps)
    other = DDPMLoss().draw(jax.random.key(4), DDPM(), X)
    assert not np.array_equal(one.eps, other.eps)
    assert not np.array_equal(one.t, other.t)


def test_bound_trains_only_the_variance_beside_the_mse() -> None:
    """Nichol & Dhariwal 2021, section 3.1: the mean is held constant in the variational term."""
    process = DDPM()
    draws = DDPMLoss().draw(jax.random.key(1), process, X)

    def loss(outputs, objective):
        def evaluate(x_t, t, cond):
            return Prediction(outputs["value"], x_t, t, {"variance": outputs["variance"]}, process, "eps")

        return objective.loss(evaluate, process, X, {}, draws)[0].mean()

    outputs = {"value": 0.1 * X, "variance": 0.3 * jnp.ones_like(X)}
    hybrid = jax.grad(loss)(outputs, DDPMLoss())
    np.testing.assert_allclose(hybrid["value"], 2 * (0.1 * X - draws.eps) / X.size, rtol=1e-4, atol=1e-8)
    assert float(jnp.abs(hybrid["variance"]).max()) > 0
    twice = jax.grad(loss)(outputs, DDPMLoss(bound_weight=2.0))
    np.testing.assert_allclose(twice["variance"], 2 * hybrid["variance"], rtol=1e-4)
    pure = jax.grad(loss)(outputs, DDPMLoss("kl"))
    assert not np.allclose(pure["value"], hybrid["value"], rtol=1e-2)
    fixed = jax.grad(loss)(outputs, DDPMLoss(variance="large"))
    np.testing.assert_array_equal(fixed["variance"], np.zeros_like(X))


def test_kl_loss_sums_the_chain() -> None:
    process, kept = DDPM(), (0, 50, 300, 999)
    chain = Chain(process, kept)
    draws = Draws(chain.times(jnp.arange(64) % 4), jax.random.normal(jax.random.key(2), X.shape))
    evaluate = oracle(process, "eps", X + 0.3)
    losses, terms = DDPMLoss("kl", "small", kept=kept).loss(evaluate, process, X, {}, draws)
    np.testing.assert_allclose(losses, 4 * terms["vb"], rtol=1e-6)


@pytest.mark.parametrize(
    ("objective", "process", "kind", "part"),
    [
        (DDPMLoss(), Linear(), "eps", "needs the ddpm process"),
        (EDMLoss(), Linear(), "x", "needs the edm process"),
        (DDPMLoss(variance="small"), DDPM(), "score", "predict x, eps or v, not score"),
    ],
)
def test_refusals(objective, process, kind, part: str) -> None:
    draws = Draws(jnp.full(64, 0.5), jnp.zeros_like(X))
    with pytest.raises(GenError, match=part):
        objective.loss(oracle(process, kind), process, X, {}, draws)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPM("quadratic"), "DDPM schedule is 'quadratic'; expected linear, cosine, scaled-linear or given"),
        (lambda: DDPM(steps=0), "DDPM chain of 0 steps"),
        (lambda: DDPM("cosine", max_beta=1.0), "DDPM chain with offset 0.008 and max_beta 1; expected"),
        (lambda: DDPM("cosine", ends=(1e-4, 0.02)), "none for cosine"),
        (lambda: DDPM(ends=(0.02, 1e-4)), "betas from 0.02 to 0.0001; expected 0 < first <= last < 1"),
        (lambda: VE(2.0, 1.0), "expected 0 < sigma_min < sigma_max"),
        (lambda: from_json({"kind": "ddpm", "schedule": "quadratic"}), "expected one of 'linear', 'cosine'"),
        (
            lambda: Predict(clock="index").inputs(Linear(), jnp.ones((1, 2)), jnp.ones(1)),
            "needs the ddpm process, not L",
        ),
        (lambda: EDMPrecondition().inputs(VE(), jnp.ones((1, 2)), jnp.ones(1)), "needs the edm process, not VE"),
    ],
)
def test_processes_and_parameterizations_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(GenError, match=re.escape(message)):
        make()
