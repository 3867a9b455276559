"""The discrete chain of DDPM as distributions: posteriors, learned variances, variational bound, bits per dimension.

Ho et al. 2020 and Nichol & Dhariwal 2021 ("Improved DDPM"), with the conventions of ADM and DiT. Works on the whole
chain or on a respaced one (some of its indices).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.ddpm import DDPM
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import expand
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = ["Chain", "Variance", "bits_per_dimension", "discretised_nll", "gaussian_kl", "mean_over_data"]

Variance = Literal["learned", "small", "large"]


def mean_over_data(value: jax.Array) -> jax.Array:
    """Takes the mean over all axes but the first: (B, ...) -> (B,)."""
    return value.reshape(value.shape[0], -1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A chain of n steps: all of a DDPM process, or the original indices in `kept` (ascending).

    Step i of the chain goes from its i-th noise level to the (i - 1)-th; before step 0 is clean data. The float64
    tables hold one entry per step and are cast to float32 when gathered.

    Raises GenError for a process that is no DDPM chain, and kept indices that do not rise within it.
    """

    process: DDPM
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.process, DDPM):
            raise GenError(f"a chain needs the ddpm process, not {type(self.process).__name__}; use that")
        if self.kept and (min(self.kept) < 0 or max(self.kept) >= self.process.steps or min(np.diff(self.kept)) < 1):
            raise GenError(f"kept indices of a chain must rise within 0 to {self.process.steps - 1}")

    @property
    def indices(self) -> np.ndarray:
        """Gives (n,) original indices, which are what the network receives."""
        return np.asarray(self.kept or range(self.process.steps), np.int64)

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """Gives float64 tables (n,): abar, abar_prev, beta, and of q(x_{i-1} | x_i, x): variance, its clipped
        logarithm, and the coefficients of x (``mean_data``) and x_i (``mean_keep``).
        """
        abar = np.cumprod(1.0 - self.process.betas)[self.indices]
        previous = np.append(1.0, abar[:-1])
        beta = 1.0 - abar / previous
        variance = beta * (1.0 - previous) / (1.0 - abar)
        # the first step has no posterior variance; its logarithm is taken from the second
        clipped = np.log(np.append(variance[1:2] if len(abar) > 1 else beta, variance[1:]))
        return {
            "abar": abar,
            "abar_prev": previous,
            "beta": beta,
            "variance": variance,
            "log_variance": clipped,
            "mean_data": beta * np.sqrt(previous) / (1.0 - abar),
            "mean_keep": (1.0 - previous) * np.sqrt(1.0 - beta) / (1.0 - abar),
            "log_beta": np.log(beta),
            "log_large": np.append(clipped[0], np.log(beta[1:])),
        }

    def times(self, step: Any) -> Any:
        """Gives the process's time of chain step `step` (integers; NumPy or JAX)."""
        if isinstance(step, jax.Array):
            return jnp.asarray(self.process.time(self.indices), jnp.float32)[step]
        return self.process.time(self.indices[step])

    def steps(self, t: jax.Array) -> jax.Array:
        """Gives the chain step (B,) int32 at times t (B,): the inverse of `times`."""
        inverse = np.zeros(self.process.steps, np.int32)
        inverse[self.indices] = np.arange(len(self.indices))
        return jnp.asarray(inverse)[jnp.round(self.process.index(t)).astype(jnp.int32)]

    def gather(self, name: str, step: jax.Array, x: jax.Array) -> jax.Array:
        """Gives the entry `step` (B,) of a table, float32, shaped to broadcast against x."""
        return expand(jnp.asarray(self.tables[name], jnp.float32)[step], x)

    def posterior(self, x: jax.Array, x_t: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives the mean and clipped log variance of q(x_{i-1} | x_i, x)."""
        mean = self.gather("mean_data", step, x) * x + self.gather("mean_keep", step, x) * x_t
        return mean, jnp.broadcast_to(self.gather("log_variance", step, x), x.shape)

    def reverse(self, prediction: Prediction, step: jax.Array, variance: Variance) -> tuple[jax.Array, jax.Array]:
        """Gives the mean and log variance of the model's p(x_{i-1} | x_i).

        Learned: the logarithm lies between ``log_variance`` and ``log_beta`` by the network's ``extra["variance"]``
        in [-1, 1] (Nichol & Dhariwal 2021, eq. 15), which is not clipped. Raises GenError where there is none.
        """
        mean, log_small = self.posterior(prediction.denoised, prediction.x, step)
        if variance == "small":
            return mean, log_small
        if variance == "large":
            return mean, jnp.broadcast_to(self.gather("log_large", step, mean), mean.shape)
        if "variance" not in prediction.extra:
            raise GenError("this network predicts no variance; use the variance 'small' or 'large'")
        share = 0.5 * (prediction.extra["variance"] + 1.0)
        return mean, share * self.gather("log_beta", step, mean) + (1.0 - share) * log_small

    def bound(self, prediction: Prediction, x: jax.Array, step: jax.Array, variance: Variance) -> jax.Array:
        """Gives one term of the variational bound in bits per dimension, (B,): decoder likelihood at step 0, else
        KL.
        """
        true_mean, true_log = self.posterior(x, prediction.x, step)
        mean, log_variance = self.reverse(prediction, step, variance)
        kl = mean_over_data(gaussian_kl(true_mean, true_log, mean, log_variance))
        nll = mean_over_data(discretised_nll(x, mean, log_variance))
        return jnp.where(step == 0, nll, kl) / math.log(2.0)

    def prior_bound(self, x: jax.Array) -> jax.Array:
        """Gives the mean KL(q(x_n | x) || N(0, I)) in bits per dimension, (B,)."""
        abar = float(self.tables["abar"][-1])
        log_variance = jnp.full_like(x, math.log1p(-abar))
        return mean_over_data(gaussian_kl(math.sqrt(abar) * x, log_variance, jnp.zeros_like(x), 0.0)) / math.log(2.0)


def gaussian_kl(mean1: Any, log_variance1: Any, mean2: Any, log_variance2: Any) -> jax.Array:
    """Gives elementwise KL(N1 || N2) in nats."""
    ratio = jnp.exp(log_variance1 - log_variance2)
    squared = jnp.square(mean1 - mean2) * jnp.exp(-jnp.asarray(log_variance2, jnp.float32))
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + ratio + squared)


def discretised_nll(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Gives elementwise -log p(x) in nats of a Gaussian over the bins of 8-bit images in [-1, 1] (Ho et al. 2020, eq.
    13).

    The distribution function is the tanh approximation, in float32 as published: bins that it cannot resolve have
    probability 0, count as 1e-12 and pass no gradient.
    """
    centred, inverse = x - mean, jnp.exp(-0.5 * log_variance)
    upper, lower = _normal_cdf(inverse * (centred + 1.0 / 255.0)), _normal_cdf(inverse * (centred - 1.0 / 255.0))

    def log(p: jax.Array) -> jax.Array:
        return jnp.log(jnp.maximum(p, 1e-12))

    return -jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1.0 - lower), log(upper - lower)))


def _normal_cdf(z: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + _tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


@jax.custom_jvp
def _tanh(z: jax.Array) -> jax.Array:
    """tanh right to the last digit of float32 near 1, which decides the bins in the tails.

    jnp.tanh is up to four units of that digit off and reaches 1 at |z| = 8 instead of 9.
    """
    return jnp.sign(z) * (1.0 - 2.0 / (jnp.exp(2.0 * jnp.abs(z)) + 1.0))


_tanh.defjvps(lambda dz, y, z: dz * (1.0 - y * y))  # 0 where y has become 1, as published


def bits_per_dimension(
    evaluate: Callable[[jax.Array, jax.Array, Cond], Prediction],
    chain: Chain,
    x: jax.Array,
    cond: Cond,
    noise: Callable[[Any], jax.Array],
    *,
    variance: Variance = "learned",
    clip: bool = True,
) -> dict[str, jax.Array]:
    """Gives the variational bound on -log2 p(x) per dimension, over the whole chain.

    Args:
      evaluate: (x_t, t (B,), cond) -> Prediction.
      x: (B, ..., C) data in [-1, 1].
      noise: noise(i) shaped like x for the i-th evaluation; the noisiest step comes first.
      clip: clips the denoised prediction to [-1, 1], as published likelihoods do.

    Returns:
      ``total`` and ``prior`` (B,) in bits per dimension; ``bound`` (its terms), ``x_mse`` and ``eps_mse`` (B, n) with
      the noisiest step first.
    """

    def term(_: None, row: Any) -> Any:
        i, step = row
        step = jnp.full(x.shape[:1], step)
        abar, eps = chain.gather("abar", step, x), noise(i)
        prediction = evaluate(jnp.sqrt(abar) * x + jnp.sqrt(1.0 - abar) * eps, chain.times(step), cond)
        if clip:
            prediction = prediction.with_denoised(jnp.clip(prediction.denoised, -1.0, 1.0))
        errors = jnp.square(prediction.denoised - x), jnp.square(prediction.eps - eps)
        return None, (chain.bound(prediction, x, step, variance), *map(mean_over_data, errors))

    n = len(chain.indices)
    _, terms = jax.lax.scan(term, None, (jnp.arange(n), jnp.arange(n - 1, -1, -1)))
    bound, x_mse, eps_mse = (v.T for v in terms)
    prior = chain.prior_bound(x)
    return {"total": bound.sum(axis=1) + prior, "prior": prior, "bound": bound, "x_mse": x_mse, "eps_mse": eps_mse}
