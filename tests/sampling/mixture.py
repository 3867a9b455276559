"""A one-dimensional Gaussian mixture whose exact denoiser is known: any solver can be tested without a network."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.integrate import solve_ivp
from scipy.special import ndtr

from gen.diffusion.backbones.backbone import BackboneConfig
from gen.diffusion.prediction import Prediction

WEIGHTS, MEANS, STDS = (0.3, 0.5, 0.2), (-1.0, 0.4, 1.5), (0.25, 0.4, 0.2)


def _shares(x: Any, a: Any, s: Any, xp: Any) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    """Posterior weights of the components and each one's (mean, std, variance of x_t)."""
    parts = [(mean, std, (a * std) ** 2 + s**2) for mean, std in zip(MEANS, STDS, strict=True)]
    logs = [
        np.log(w) - 0.5 * xp.log(var) - 0.5 * (x - a * mean) ** 2 / var
        for w, (mean, _, var) in zip(WEIGHTS, parts, strict=True)
    ]
    shares = xp.stack(logs)
    shares = xp.exp(shares - shares.max(axis=0))
    return shares / shares.sum(axis=0), parts


def denoised(x: Any, a: Any, s: Any, xp: Any = jnp) -> Any:
    """E[x | x_t] elementwise for x_t = a x + s eps."""
    shares, parts = _shares(x, a, s, xp)
    return (shares * xp.stack([m + a * std**2 / var * (x - a * m) for m, std, var in parts])).sum(axis=0)


def noise(x: Any, a: Any, s: Any, xp: Any = jnp) -> Any:
    """E[eps | x_t] elementwise, safe at s = 0."""
    shares, parts = _shares(x, a, s, xp)
    return (shares * xp.stack([s * (x - a * m) / var for m, _, var in parts])).sum(axis=0)


def cdf(x: np.ndarray) -> np.ndarray:
    """The data distribution's cumulative distribution function."""
    return sum(w * ndtr((x - m) / s) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))


def distance(samples: Any) -> float:
    """Kolmogorov-Smirnov distance of samples to the data distribution."""
    x = np.sort(np.asarray(samples, np.float64).reshape(-1))
    steps = np.arange(len(x) + 1) / len(x)
    exact = cdf(x)
    return float(max(np.abs(exact - steps[1:]).max(), np.abs(exact - steps[:-1]).max()))


def denoise(process: Any, calls: list | None = None) -> Any:
    """The exact Denoise under `process`; appends the times of its calls to `calls` (outside of jit)."""

    def call(x, t, cond, step, carry):
        if calls is not None:
            calls.append(float(t))
        return Prediction(denoised(x, process.alpha(t), process.sigma(t)), x, t, {}, process, "x"), carry

    return call


@functools.cache
def flow(process: Any, x: tuple[float, ...], start: float, end: float) -> np.ndarray:
    """The probability flow from `start` to `end`, integrated by an adaptive method to near rounding."""

    def velocity(t, x):
        a, s = process.alpha(t), process.sigma(t)
        return process.dalpha(t) * denoised(x, a, s, np) + process.dsigma(t) * noise(x, a, s, np)

    return solve_ivp(velocity, (start, end), np.asarray(x), method="DOP853", rtol=1e-10, atol=1e-11).y[:, -1]


@dataclasses.dataclass(frozen=True)
class MixtureNet(BackboneConfig):
    """A backbone config whose network is the exact denoiser of the mixture under `process` (predicting x).

    The condition ``shift`` (B,) moves its output; the null condition is no shift.
    """

    process: Any
    size: tuple[int, ...] = ()
    channels: int = 1
    num_classes: int = 0
    times: int = 1

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Mixture(self, rngs)


class _Mixture(nnx.Module):
    def __init__(self, config: MixtureNet, rngs: nnx.Rngs) -> None:
        self.config = config
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, x, times, cond, *, controls=None, taps=(), stop=False):
        t = times[0].reshape(times[0].shape + (1,) * (x.ndim - 1))
        out = self.gain * denoised(x, self.config.process.alpha(t), self.config.process.sigma(t))
        return out + cond["shift"].reshape(t.shape), {}

    def null(self, cond):
        return {"shift": jnp.zeros_like(cond["shift"])}


def keys(count: int, seed: int = 0) -> jax.Array:
    """(count,) per-sample keys."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))
