"""The DDPM chain against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from gen.diffusion.chain import Chain, bits_per_dimension, discretised_nll, gaussian_kl
from gen.diffusion.ddpm import DDPM
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import Linear
from gen.errors import GenError

KEPT = (0, 3, 10, 499, 999)


def predict(process, x_t, t, denoised, variance=None):
    extra = {} if variance is None else {"variance": jnp.full(x_t.shape, variance)}
    return Prediction(denoised, x_t, t, extra, process, "x")


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1.0), ("scaled-linear", 0.5)])
def test_first_and_last_beta(schedule, power) -> None:
    betas = DDPM(schedule, 5, ends=(1e-3, 0.03)).betas
    np.testing.assert_allclose(betas[[0, -1]], (1e-3, 0.03), rtol=1e-12)
    np.testing.assert_allclose(np.diff(betas**power, 2), 0.0, atol=1e-12)
    published = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012)}[schedule]
    np.testing.assert_array_equal(DDPM(schedule).betas, DDPM(schedule, ends=published).betas)


@pytest.mark.parametrize("kept", [(), KEPT])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tables_satisfy_their_definitions(schedule: str, kept) -> None:
    chain = Chain(DDPM(schedule), kept)
    t = chain.tables
    np.testing.assert_allclose(np.cumprod(1 - t["beta"]), t["abar"], rtol=1e-7)
    # a posterior draw has the marginal of the previous step: its mean and variance of x = 1, eps = 0
    mean = t["mean_data"] + t["mean_keep"] * np.sqrt(t["abar"])
    np.testing.assert_allclose(mean, np.sqrt(t["abar_prev"]), rtol=1e-9)
    variance = t["variance"] + t["mean_keep"] ** 2 * (1 - t["abar"])
    np.testing.assert_allclose(variance, 1 - t["abar_prev"], rtol=1e-7, atol=1e-12)
    assert t["log_variance"][0] == t["log_variance"][1]
    np.testing.assert_allclose(chain.process.alpha(chain.times(np.arange(len(t["abar"])))) ** 2, t["abar"], rtol=1e-9)


@pytest.mark.parametrize("kept", [(), KEPT])
def test_steps_invert_times(kept) -> None:
    chain = Chain(DDPM(), kept)
    steps = jnp.arange(len(chain.indices))
    np.testing.assert_array_equal(chain.steps(chain.times(steps)), steps)
    np.testing.assert_array_equal(chain.process.index(chain.times(steps)), chain.indices)


def test_kl_agrees_with_the_integral() -> None:
    m1, s1, m2, s2 = 0.3, 0.7, -0.4, 1.9
    z = np.linspace(-12, 12, 400_001)
    p = norm.pdf(z, m1, s1)
    expected = np.sum(p * (norm.logpdf(z, m1, s1) - norm.logpdf(z, m2, s2))) * (z[1] - z[0])
    actual = gaussian_kl(m1, 2 * np.log(s1), m2, 2 * np.log(s2))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert float(gaussian_kl(m1, 0.5, m1, 0.5)) == 0.0


def test_bin_likelihoods_sum_to_one_and_follow_the_normal() -> None:
    bins = jnp.arange(256) / 127.5 - 1.0
    for mean, std in ((0.1, 0.2), (0.9, 0.5), (-1.0, 0.03)):
        nll = discretised_nll(bins, jnp.float32(mean), jnp.float32(2 * np.log(std)))
        np.testing.assert_allclose(jnp.exp(-nll).sum(), 1.0, atol=1e-3)
        inner = (np.asarray(nll) < 6) & (np.abs(np.asarray(bins)) < 0.999)
        exact = norm.cdf(bins + 1 / 255, mean, std) - norm.cdf(bins - 1 / 255, mean, std)
        np.testing.assert_allclose(np.exp(-np.asarray(nll))[inner], exact[inner], rtol=0.03)


def test_unresolved_bins_are_clamped_and_pass_no_gradient() -> None:
    value, gradient = jax.value_and_grad(lambda m: discretised_nll(jnp.float32(0.5), m, jnp.float32(-8.0)))(0.0)
    np.testing.assert_allclose(value, -np.log(1e-12), rtol=1e-5)
    assert gradient == 0.0


@pytest.mark.parametrize("kept", [(), KEPT])
def test_perfect_prediction_costs_nothing(kept) -> None:
    """With the true data predicted and the posterior variance, every KL of the bound is zero."""
    chain = Chain(DDPM(), kept)
    x = jnp.tile(jnp.array([0.2, -0.5, 0.9])[:, None], (1, 8))
    step = jnp.array([1, 2, len(chain.indices) - 1])
    t = chain.times(step)
    a, s = chain.process.alpha(t)[:, None], chain.process.sigma(t)[:, None]
    x_t = a * x + s * jax.random.normal(jax.random.key(0), x.shape)
    np.testing.assert_allclose(chain.bound(predict(chain.process, x_t, t, x), x, step, "small"), 0.0, atol=1e-4)
    learned = predict(chain.process, x_t, t, x, -1.0)  # the lower end of the learned range is the posterior variance
    np.testing.assert_allclose(chain.bound(learned, x, step, "learned"), 0.0, atol=1e-4)
    upper = chain.reverse(predict(chain.process, x_t, t, x, 1.0), step, "learned")[1][:, 0]
    np.testing.assert_allclose(upper, np.log(chain.tables["beta"])[np.asarray(step)], rtol=1e-5)


def test_bits_per_dimension_of_gaussian_data() -> None:
    """On normal data the reverse steps are normal too: with their exact mean and variance the bound is tight."""
    chain, std = Chain(DDPM("linear", 200)), 0.25
    x = std * jax.random.normal(jax.random.key(0), (4, 4096))
    noise_key = jax.random.key(1)

    def evaluate(x_t, t, cond):
        step, (a, s) = chain.steps(t), (f(t)[:, None] for f in (chain.process.alpha, chain.process.sigma))
        total = a**2 * std**2 + s**2
        data, spread = chain.gather("mean_data", step, x), std**2 * s**2 / total
        log_exact = jnp.log(chain.gather("variance", step, x) + data**2 * spread)
        low, high = chain.gather("log_variance", step, x), chain.gather("log_beta", step, x)
        share = jnp.broadcast_to((log_exact - low) / (high - low), x.shape)
        return Prediction(a * std**2 / total * x_t, x_t, t, {"variance": 2 * share - 1}, chain.process, "x")

    def noise(i):
        return jax.random.normal(jax.random.fold_in(noise_key, i), x.shape)

    result = jax.jit(lambda x: bits_per_dimension(evaluate, chain, x, {}, noise, clip=False))(x)
    density = norm.logpdf(np.asarray(x), scale=std).mean(1) / np.log(2)
    expected = np.log2(127.5) - density  # bins are 1 / 127.5 wide
    np.testing.assert_allclose(result["total"], expected, atol=0.03)
    np.testing.assert_allclose(result["total"], result["bound"].sum(1) + result["prior"], rtol=1e-5)
    assert result["bound"].shape == (4, 200)
    assert np.all(np.asarray(result["prior"]) < 1e-2)
    errors = np.asarray(result["x_mse"]).mean(0)
    np.testing.assert_allclose(errors[0], std**2, rtol=0.05)  # noisiest first: nothing is known of x there
    assert errors[-1] < 1e-3


def test_refusals() -> None:
    with pytest.raises(GenError, match="needs the ddpm process, not Linear"):
        Chain(Linear())  # type: ignore[arg-type]
    for kept in ((3, 2), (-1, 4), (0, 1000), (5, 5)):
        with pytest.raises(GenError, match="must rise within 0 to 999"):
            Chain(DDPM(), kept)
    chain = Chain(DDPM())
    x = jnp.zeros((1, 2))
    with pytest.raises(GenError, match="predicts no variance"):
        chain.reverse(predict(chain.process, x, jnp.ones(1), x), jnp.array([3]), "learned")


def test_bins_of_the_far_tail_are_resolved_as_published() -> None:
    """Where the tanh approximation lies within float32's last digits of 1, up to |argument| = 9."""
    z = np.float32(np.linspace(4.0, 5.2, 13))  # its argument runs from 5.5 to 9.2
    argument = np.sqrt(2.0 / np.pi) * (z.astype(np.float64) + 0.044715 * z.astype(np.float64) ** 3)
    upper = 0.5 * (1.0 + np.tanh(argument).astype(np.float32))
    found = discretised_nll(jnp.ones(13), jnp.asarray(1.0 - 1.0 / 255.0 - z), jnp.zeros(13))
    expected = -np.log(np.maximum(1.0 - upper.astype(np.float64), 1e-12))
    np.testing.assert_allclose(found[:9], expected[:9], rtol=1e-4)
    gradient = jax.grad(lambda mean: discretised_nll(jnp.ones(1), mean, jnp.zeros(1)).sum())(jnp.asarray([-60.0]))
    assert float(gradient[0]) == 0.0
