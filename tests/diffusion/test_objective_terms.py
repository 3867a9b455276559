"""Terms that objectives may add: directions, min-SNR weights, alignment with an encoder, laws of the times."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import (
    Aligned,
    Draws,
    MinSNRLoss,
    VelocityMatching,
    alignment,
    cosine_similarity,
)
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, Linear, expand
from gen.diffusion.times import TimeSampler, lognormal_levels
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.nn.network import param_shapes

X = jax.random.normal(jax.random.key(0), (64, 3, 3, 2))


def test_cosine_of_parallel_opposite_and_orthogonal_vectors():
    a = jnp.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    b = jnp.array([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0]])
    np.testing.assert_allclose(cosine_similarity(a, b), [1.0, -1.0, 0.0], atol=1e-6)


def test_a_network_that_starts_at_zero_gets_finite_gradients():
    def loss(value):
        objective = VelocityMatching(cosine=1.0)

        def evaluate(x_t, t, cond):
            return Prediction(value + 0.0 * x_t, x_t, t, {}, Linear(), "velocity")

        draws = objective.draw(jax.random.key(1), Linear(), X)
        losses, terms = objective.loss(evaluate, Linear(), X, {}, draws)
        return losses.mean(), terms

    (total, terms), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.zeros_like(X))
    np.testing.assert_allclose(terms["velocity_cosine"], np.ones(64))
    assert abs(float(total) - 3.0) < 0.2  # E|eps - x|^2 = 2, and no direction
    assert float(jnp.abs(gradient).max()) < 1.0


def test_min_snr_is_one_loss_in_three_quantities():
    """For the same denoised image, x, eps and v networks get the same loss."""
    process, objective = DDPM(), MinSNRLoss(3.0)
    assert from_json(to_json(objective)) == objective
    draws = objective.draw(jax.random.key(1), process, X)
    found = {}
    for kind in ("x", "eps", "v"):

        def evaluate(x_t, t, cond, kind=kind):
            guess = Prediction(X + 0.1, x_t, t, {}, process, "x")
            return Prediction(guess.as_kind(kind), x_t, t, {}, process, kind)

        found[kind] = objective.loss(evaluate, process, X, {}, draws)[0]
    snr = np.asarray(process.alpha(draws.t) / process.sigma(draws.t)) ** 2
    np.testing.assert_allclose(found["x"], 0.01 * np.minimum(snr, 3.0), rtol=1e-3)
    np.testing.assert_allclose(found["eps"], found["x"], rtol=2e-2, atol=1e-6)  # cancellation at small noise
    np.testing.assert_allclose(found["v"], found["x"], rtol=2e-2, atol=1e-6)
    with pytest.raises(GenError, match="predict x, eps or v, not velocity"):
        objective.loss(lambda x, t, c: Prediction(x, x, t, {}, Linear(), "velocity"), Linear(), X, {}, draws)


def test_laws_of_the_times():
    key, process = jax.random.key(3), Linear()
    for law in ("uniform", "logit-normal", "mode", "lognormal"):
        sampler = TimeSampler(law)
        times = np.asarray(sampler(key, process, 4096))
        assert 0.0 <= times.min() < 0.05
        assert 0.95 < times.max() <= 1.0
        assert abs(np.median(times) - 0.5) < 0.03  # all are symmetric on the linear flow
    levels = TimeSampler("lognormal", -1.2, 1.2)(key, EDM(), 4096)
    assert abs(float(jnp.log(levels).mean()) + 1.2) < 0.08
    with pytest.raises(GenError, match=r"mode scale is 2; expected -1 to 1.752"):
        TimeSampler("mode", scale=2.0)


def test_levels_carry_the_lognormal_mass_below_them():
    """The formulas of improved consistency training, written out; draws follow them and never hit the lowest level."""
    mean, std, count = -1.1, 2.0, 11
    times, mass = lognormal_levels(EDM(), count, mean, std)
    root = 1 / 7
    expected = [(0.002**root + i / (count - 1) * (80.0**root - 0.002**root)) ** 7 for i in range(count)]
    np.testing.assert_allclose(times, expected, rtol=1e-12)
    cdf = [0.5 * (1 + math.erf((math.log(t) - mean) / (math.sqrt(2) * std))) for t in expected]
    np.testing.assert_allclose(mass, np.diff(cdf) / (cdf[-1] - cdf[0]), rtol=1e-12)
    drawn = np.asarray(TimeSampler("lognormal", mean, std, levels=count)(jax.random.key(0), EDM(), 20000))
    found, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(found, times[1:].astype(np.float32))
    np.testing.assert_allclose(counts / 20000, mass, atol=4 * np.sqrt(mass.max() / 20000))
    with pytest.raises(GenError, match="11 levels of a uniform law; expected two or more, of the lognormal law"):
        TimeSampler(levels=11)


def test_alignment_trains_projectors_and_backbone_up_to_its_tap():
    backbone = DiTConfig((4, 4), 2, 2, 16, 3, 2, num_classes=3, remat="none")
    network = AlignedConfig(backbone, "block_1", (5,), 8)
    task = DenoiserTask(denoiser=Denoiser(network, Linear(), Predict(), Aligned(weight=1.0)))
    assert from_json(to_json(task)) == task
    rng = np.random.default_rng(0)
    shapes = param_shapes(network)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)
    x = jax.random.normal(jax.random.key(1), (6, 4, 4, 2))
    cond = {"label": jnp.zeros(6, jnp.int32), "encoder_0": jax.random.normal(jax.random.key(2), (6, 4, 5))}
    draws = task.denoiser.objective.draw(jax.random.key(3), Linear(), x)

    def aligned(params):
        return task.loss(params, x, cond, draws, jnp.zeros(6, bool))[1].metrics["alignment"]

    value, gradient = jax.jit(jax.value_and_grad(aligned))(params)
    assert -1.0 <= float(value) <= 1.0
    layers = np.abs(gradient["network"]["blocks"]["attn"]["proj"]["kernel"]).max((1, 2))
    assert (layers[:2] > 0).all()
    assert layers[2] == 0.0
    assert float(jnp.abs(gradient["projector_0"]["fc1"]["kernel"]).max()) > 0.0

    features = jnp.broadcast_to(expand(jnp.arange(1.0, 3.0), jnp.zeros((2, 3, 4))), (2, 3, 4))
    np.testing.assert_allclose(alignment(features, 2.0 * features), [-1.0, -1.0], rtol=1e-6)
    with pytest.raises(GenError, match="resize the encoder's input"):
        jax.eval_shape(task.loss, params, x, cond | {"encoder_0": jnp.zeros((6, 9, 5))}, draws, jnp.zeros(6, bool))


def test_draws_are_the_inner_objectives():
    a, b = (o.draw(jax.random.key(0), Linear(), X) for o in (Aligned(), VelocityMatching()))
    assert isinstance(a, Draws)
    np.testing.assert_array_equal(a.t, b.t)
    np.testing.assert_array_equal(a.eps, b.eps)
