"""Adaptive integration and likelihoods on the mixture, whose flow and density are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, VP, Linear, Trigonometric
from gen.errors import GenError
from gen.sampling.adaptive import AdaptiveSampler, Dopri5
from gen.sampling.edm_samplers import edm_sampler
from gen.sampling.generator import Sampler
from gen.sampling.grids import Respaced, Uniform
from gen.sampling.guidance import AdaptiveProjected
from gen.sampling.solvers import DDIM, Heun
from gen.training.task import Model
from tests.sampling.mixture import MEANS, STDS, WEIGHTS, MixtureNet, denoise, distance, flow, keys

TIGHT = Dopri5(1e-8, 1e-8)


@pytest.mark.parametrize(
    ("process", "start", "end"),
    [
        pytest.param(Linear(), 1.0, 0.01, id="linear"),
        pytest.param(Trigonometric(), 0.02, 0.98, id="inversion"),
        pytest.param(EDM(), 80.0, 0.01, id="edm", marks=pytest.mark.slow),
    ],
)
def test_flow_is_followed_within_the_tolerance(process, start, end):
    x = np.linspace(-2.0, 2.0, 5) * process.sigma(start) + 0.1
    exact = flow(process, tuple(x), start, end)
    with jax.enable_x64(True):
        out, calls = jax.jit(lambda x: TIGHT.integrate(denoise(process), x, process, start, end, {}))(
            jnp.asarray(x)[:, None]
        )
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out[:, 0], exact, rtol=1e-5, atol=1e-6)
        loose, fewer = Dopri5(1e-3, 1e-3).integrate(denoise(process), jnp.asarray(x)[:, None], process, start, end, {})
    assert np.abs(np.asarray(loose)[:, 0] - exact).max() < 0.05 * np.abs(exact).max()
    assert np.all(np.asarray(fewer) < np.asarray(calls))


def test_calls_are_counted_as_they_happen():
    process, inner, seen = Linear(), denoise(Linear()), []

    def counting(x, t, cond, step, carry):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return inner(x, t, cond, step, carry)

    _, calls = jax.jit(lambda x: Dopri5(1e-4, 1e-4).integrate(counting, x, process, 1.0, 0.01, {}))(jnp.ones((1, 3)))
    jax.effects_barrier()
    assert len(seen) == int(calls[0])
    assert min(seen) >= 0.01 - 1e-6


def test_samples_follow_the_data_and_do_not_depend_on_their_neighbours():
    x = jax.vmap(lambda key: jax.random.normal(key, (1,)))(keys(8192))
    integrate = jax.jit(lambda x: Dopri5(1e-4, 1e-4).integrate(denoise(VP()), x, VP(), 1.0, 1e-3, {}))
    samples, calls = integrate(x)
    assert distance(samples) < 0.025
    assert len(np.unique(calls)) > 1  # steps of their own
    part, _ = integrate(x[5:9])
    np.testing.assert_allclose(part, samples[5:9], rtol=1e-5, atol=1e-6)


def test_encoding_and_decoding_return_the_start():
    x = jnp.linspace(-1.0, 1.0, 6)[:, None]
    process, cond = Linear(), {"shift": jnp.zeros(6)}
    there, _ = Dopri5().integrate(denoise(process), x, process, 0.01, 0.99, cond)
    back, _ = Dopri5().integrate(denoise(process), there, process, 0.99, 0.01, cond)
    np.testing.assert_allclose(back, x, atol=2e-3)
    assert float(jnp.abs(there - x).max()) > 0.1


def log_marginal(x, process, t):
    """log p(x_t) of the mixture."""
    a, s = float(process.alpha(t)), float(process.sigma(t))
    parts = zip(WEIGHTS, MEANS, STDS, strict=True)
    return np.log(sum(w * norm.pdf(x, a * m, np.hypot(a * std, s)) for w, m, std in parts))


@pytest.mark.parametrize(("process", "start"), [(VP(), 1e-3), (EDM(), 0.01)], ids=["vp", "edm"])
def test_likelihood_of_the_mixture(process, start):
    """One number per sample: the signs cancel and the divergence is exact."""
    x, end = np.linspace(-1.5, 2.0, 6), process.t_max
    with jax.enable_x64(True):
        run = jax.jit(lambda x: TIGHT.log_likelihood(denoise(process), x, process, start, end, keys(6), {}))
        log_p, latents, calls = run(jnp.asarray(x)[:, None])
    log_p, latents = np.asarray(log_p), np.asarray(latents)[:, 0]
    exact = log_marginal(x, process, start)
    np.testing.assert_allclose(log_p, exact, atol=0.02)  # the data's trace in the latents is neglected
    trace = log_marginal(latents, process, end) - norm.logpdf(latents, 0.0, process.sigma(end))
    np.testing.assert_allclose(log_p + trace, exact, atol=1e-5)
    assert np.all(np.asarray(calls) > 6)


def test_estimate_of_the_divergence_is_unbiased():
    """dx / dt = A x: tr A is met on average over the keys."""
    matrix = jnp.array([[0.5, 0.3, 0.0], [-0.2, 0.1, 0.4], [0.3, 0.3, -0.3]])

    def linear(x, t, cond, step, carry):
        return Prediction(x @ matrix.T, x, t, {}, Linear(), "velocity"), carry

    x = jnp.broadcast_to(jnp.array([0.3, -0.2, 0.1]), (4096, 3))
    log_p, latents, _ = Dopri5().log_likelihood(linear, x, Linear(), 0.0, 1.0, keys(4096), {})
    prior = norm.logpdf(np.asarray(latents)).sum(axis=1)
    estimates = np.asarray(log_p) - prior
    assert estimates.std() > 0.1
    np.testing.assert_allclose(estimates.mean(), 0.3, atol=5 * estimates.std() / 64)


def test_given_up_samples_are_not_numbers():
    out, _ = Dopri5(max_steps=2).integrate(denoise(Linear()), jnp.ones((2, 1)), Linear(), 1.0, 0.01, {})
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("trained", "sampler"),
    [
        (Linear(), Sampler(Heun(), Uniform(), 10)),
        (VP(), Sampler(Heun(), Uniform(), 10)),
        (EDM(), edm_sampler(10)),
        (DDPM(), Sampler(DDIM(), Respaced(), 10)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_any_model_is_sampled_adaptively(trained, sampler):
    """From where its own grid starts to the data; the calls are those of the method, and one at the end."""
    denoiser = Denoiser(MixtureNet(trained), trained, Predict("x"))
    params = {"net": denoiser.net.init(jax.random.key(0))}
    made = AdaptiveSampler.of(sampler, denoiser, Dopri5(1e-4, 1e-4)).generator({"net": Model(denoiser)}, None)
    assert made.nfe is None
    start, end = made.ends()
    assert start == pytest.approx(sampler.times(trained).times[0], abs=2e-3)
    samples, calls = jax.jit(lambda: made.counted(params, keys(8192), {"shift": jnp.zeros(8192)}))()
    assert distance(samples) < 0.025
    assert np.all((np.asarray(calls) - 1 - (end > 0.0)) % 6 == 0)
    remembering = made.sampler.changed(guidance=AdaptiveProjected(momentum=-0.5))
    momentum = dataclasses.replace(made, sampler=remembering)
    with pytest.raises(GenError, match="use guidance without momentum"):
        momentum(params, keys(2), {"shift": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dopri5(rtol=0.0), "positive rtol"),
        (lambda: Dopri5().integrate(denoise(Linear()), jnp.ones((1, 1)), Linear(), 1.5, 0.0, {}), "time 1.5 to 0"),
        (lambda: Dopri5().integrate(denoise(Linear()), jnp.ones((1, 1)), Linear(), 0.5, 0.5, {}), "two different"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(GenError, match=message):
        make()
