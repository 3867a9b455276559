"""Noise processes: ``x_t = alpha(t) x + sigma(t) eps`` with time 0 = data.

For flows and variance-preserving processes t is in [0, 1]; for EDM (and VE) `t` is the noise level itself.
NumPy (or Python) times give float64 NumPy values, so that sampling grids are built on the host without
loss; JAX times give JAX values. All functions act elementwise on `t`.
"""

import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError

__all__ = [
    "EDM",
    "VE",
    "VP",
    "EDMFamily",
    "Linear",
    "Process",
    "Time",
    "TrigFlow",
    "Trigonometric",
    "array_module",
    "as_times",
    "expand",
    "logsnr_of",
    "pair",
]

Time = Any  # float, np.ndarray (float64) or jax.Array


class Process(Protocol):
    """A Gaussian forward process; see the module docstring for the contract on array types.

    Attributes:
      t_min, t_max: the times between which a solver runs by default (data end, noise end).
    """

    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    def alpha(self, t: Time) -> Any:
        """Gives the scale of the data at time t."""
        ...

    def sigma(self, t: Time) -> Any:
        """Gives the scale of the noise at time t."""
        ...

    def dalpha(self, t: Time) -> Any:
        """Gives the derivative of `alpha` in t."""
        ...

    def dsigma(self, t: Time) -> Any:
        """Gives the derivative of `sigma` in t."""
        ...

    def logsnr(self, t: Time) -> Any:
        """Gives log(alpha^2 / sigma^2), decreasing in t; infinite where sigma or alpha is 0."""
        ...

    def time_of(self, logsnr: Any) -> Any:
        """Gives the inverse of `logsnr`, clipped to the process's times."""
        ...

    def at(self, u: Any) -> Any:
        """Gives what "t uniform" means: maps u in [0, 1] to a time, u = 0 at the data end."""
        ...


def array_module(t: Any) -> Any:
    """Gives jax.numpy for JAX arrays, numpy in float64 for everything else."""
    return jnp if isinstance(t, jax.Array) else np


def as_times(t: Any) -> Any:
    """Gives times as an array: JAX arrays as they are, everything else in NumPy's float64."""
    return t if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def logsnr_of(process: Any, t: Time) -> Any:
    """Gives log(alpha^2 / sigma^2) from the two scales; infinite where one of them is 0."""
    xp = array_module(t)
    with np.errstate(divide="ignore"):
        return 2.0 * (xp.log(process.alpha(t)) - xp.log(process.sigma(t)))


def expand(t: Any, x: Any) -> Any:
    """Appends axes to `t` (a prefix of x's shape, or a scalar) so that it broadcasts against `x`."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if hasattr(t, "reshape") else t


def pair(process: Process, t: Any, x: Any) -> tuple[Any, Any]:
    """Gives (alpha(t), sigma(t)) with axes appended to broadcast against x."""
    return expand(process.alpha(t), x), expand(process.sigma(t), x)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Rectified flow (arXiv 2209.03003): alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t.

    With ``sigma_min = 0`` this is the linear interpolant of SiT and rectified flow (velocity eps - x).
    """

    sigma_min: float = 0.0

    t_min = 0.0
    t_max = 1.0

    def alpha(self, t: Time) -> Any:
        return 1.0 - as_times(t)

    def sigma(self, t: Time) -> Any:
        return self.sigma_min + (1.0 - self.sigma_min) * as_times(t)

    def dalpha(self, t: Time) -> Any:
        return array_module(t).full_like(as_times(t), -1.0)

    def dsigma(self, t: Time) -> Any:
        return array_module(t).full_like(as_times(t), 1.0 - self.sigma_min)

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        xp = array_module(logsnr)
        value = xp.clip(as_times(logsnr), -80.0, 80.0)  # pure noise and clean data have infinite values
        # (1 - t) / (m + (1 - m) t) = r  =>  t = (1 - m r) / (1 + (1 - m) r), written with e = 1 / r
        e = xp.exp(-0.5 * value)
        return xp.clip((e - self.sigma_min) / (e + 1.0 - self.sigma_min), 0.0, 1.0)

    def at(self, u: Any) -> Any:
        return as_times(u)


@dataclasses.dataclass(frozen=True)
class Trigonometric:
    """GVP of SiT (arXiv 2401.08740), the cosine interpolant: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    t_min = 0.0
    t_max = 1.0

    def alpha(self, t: Time) -> Any:
        return array_module(t).sin(0.5 * math.pi * (1.0 - as_times(t)))  # exactly 0 at t = 1, as the cosine is not

    def sigma(self, t: Time) -> Any:
        return array_module(t).sin(0.5 * math.pi * as_times(t))

    def dalpha(self, t: Time) -> Any:
        return -0.5 * math.pi * self.sigma(t)

    def dsigma(self, t: Time) -> Any:
        return 0.5 * math.pi * self.alpha(t)

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        xp = array_module(logsnr)
        return 2.0 / math.pi * xp.arctan(xp.exp(-0.5 * as_times(logsnr)))

    def at(self, u: Any) -> Any:
        return as_times(u)


@dataclasses.dataclass(frozen=True)
class TrigFlow:
    """TrigFlow (Lu and Song 2024, arXiv 2410.11081, sec. 3.1): alpha = cos t, sigma = sigma_data sin t; t is an angle.

    The level sigma / alpha is sigma_data tan t. The velocity d x_t / d t has the size of the data at every time.

    Attributes:
      sigma_data: standard deviation of the data.
      sigma_max: the highest level, which gives t_max; pure noise is the angle pi / 2.

    Raises GenError for numbers that are not positive.
    """

    sigma_data: float = 0.5
    sigma_max: float = 80.0

    t_min = 0.0

    def __post_init__(self) -> None:
        if min(self.sigma_data, self.sigma_max) <= 0.0:
            raise GenError(f"sigma_data {self.sigma_data:g} and sigma_max {self.sigma_max:g}; both are positive")

    @property
    def t_max(self) -> float:
        return math.atan2(self.sigma_max, self.sigma_data)

    def alpha(self, t: Time) -> Any:
        return array_module(t).cos(as_times(t))

    def sigma(self, t: Time) -> Any:
        return self.sigma_data * array_module(t).sin(as_times(t))

    def dalpha(self, t: Time) -> Any:
        return -array_module(t).sin(as_times(t))

    def dsigma(self, t: Time) -> Any:
        return self.sigma_data * array_module(t).cos(as_times(t))

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        xp = array_module(logsnr)
        return xp.arctan(xp.exp(-0.5 * as_times(logsnr)) / self.sigma_data)

    def at(self, u: Any) -> Any:
        return self.t_max * as_times(u)


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance-preserving SDE with beta(t) = beta_min + t (beta_max - beta_min) (arXiv 2011.13456, eq. 33).

    alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2), sigma = sqrt(1 - alpha^2).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def _log_alpha(self, t: Time) -> Any:
        t = as_times(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Time) -> Any:
        return array_module(t).exp(self._log_alpha(t))

    def sigma(self, t: Time) -> Any:
        xp = array_module(t)
        return xp.sqrt(-xp.expm1(2.0 * self._log_alpha(t)))

    def _half_beta(self, t: Time) -> Any:
        return 0.5 * (self.beta_min + as_times(t) * (self.beta_max - self.beta_min))

    def dalpha(self, t: Time) -> Any:
        return -self._half_beta(t) * self.alpha(t)

    def dsigma(self, t: Time) -> Any:
        return self._half_beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        xp, value = array_module(logsnr), as_times(logsnr)
        slope = self.beta_max - self.beta_min
        minus2log = xp.logaddexp(xp.zeros_like(value), -value)  # -log alpha^2 = log(1 + 1 / snr)
        minus2log = xp.minimum(minus2log, 0.5 * slope + self.beta_min)  # lower SNRs than the process has
        # slope t^2 / 2 + beta_min t = minus2log; the rationalised root is safe for small times
        t = 2.0 * minus2log / (self.beta_min + xp.sqrt(self.beta_min**2 + 2.0 * slope * minus2log))
        return xp.clip(t, 0.0, 1.0)

    def at(self, u: Any) -> Any:
        return self.t_min + (self.t_max - self.t_min) * as_times(u)


@dataclasses.dataclass(frozen=True)
class VE:
    """Variance-exploding process with the noise level as its clock: alpha = 1, sigma = t.

    Raises GenError for noise levels that do not rise above 0.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise GenError(
                f"noise levels from {self.sigma_min:g} to {self.sigma_max:g}; expected 0 < sigma_min < sigma_max"
            )

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Time) -> Any:
        return array_module(t).ones_like(as_times(t))

    def sigma(self, t: Time) -> Any:
        return as_times(t)

    def dalpha(self, t: Time) -> Any:
        return array_module(t).zeros_like(as_times(t))

    def dsigma(self, t: Time) -> Any:
        return array_module(t).ones_like(as_times(t))

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        return array_module(logsnr).exp(-0.5 * as_times(logsnr))

    def at(self, u: Any) -> Any:
        """Goes geometrically between sigma_min and sigma_max."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** as_times(u)


@dataclasses.dataclass(frozen=True)
class EDM(VE):
    """EDM's process (arXiv 2206.00364): alpha = 1, sigma = t, uniform times on the rho curve (eq. 5).

    sigma_data is the standard deviation of the data that preconditioning assumes.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def at(self, u: Any) -> Any:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + as_times(u) * (high - low)) ** self.rho


@dataclasses.dataclass(frozen=True)
class EDMFamily:
    """x_t = s(t) (x + level(t) eps) with any of the schedules and scalings of Karras et al. 2022, table 1.

    The processes of their ablations, on which published VP and VE models are sampled.

    Attributes:
      schedule: ``vp`` level(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), ``ve`` sqrt(t), or ``linear`` t.
      scaling: ``vp`` s = 1 / sqrt(1 + level^2), or ``none`` s = 1.
      sigma_min, sigma_max: lowest and highest level, which give t_min and t_max.
      beta_min, beta_d: of the vp schedule (beta_d = beta_max - beta_min).
    """

    schedule: Literal["vp", "ve", "linear"] = "linear"
    scaling: Literal["vp", "none"] = "none"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    beta_min: float = 0.1
    beta_d: float = 19.9

    @property
    def t_min(self) -> float:
        return float(self._time(np.float64(self.sigma_min)))

    @property
    def t_max(self) -> float:
        return float(self._time(np.float64(self.sigma_max)))

    def _level(self, t: Time) -> Any:
        xp, t = array_module(t), as_times(t)
        match self.schedule:
            case "vp":
                return xp.sqrt(xp.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))
            case "ve":
                return xp.sqrt(t)
            case "linear":
                return t

    def _dlevel(self, t: Time) -> Any:
        xp, t = array_module(t), as_times(t)
        level = self._level(t)
        match self.schedule:
            case "vp":
                return 0.5 * (self.beta_min + self.beta_d * t) * (level + 1.0 / level)
            case "ve":
                return 0.5 / level
            case "linear":
                return xp.ones_like(t)

    def _time(self, level: Any) -> Any:
        xp = array_module(level)
        match self.schedule:
            case "vp":
                rise = xp.log1p(level**2)  # = beta_d t^2 / 2 + beta_min t; the rationalised root
                return 2.0 * rise / (self.beta_min + xp.sqrt(self.beta_min**2 + 2.0 * self.beta_d * rise))
            case "ve":
                return level**2
            case "linear":
                return level

    def alpha(self, t: Time) -> Any:
        level = self._level(t)
        return 1.0 / array_module(t).sqrt(1.0 + level**2) if self.scaling == "vp" else array_module(t).ones_like(level)

    def sigma(self, t: Time) -> Any:
        return self.alpha(t) * self._level(t)

    def dalpha(self, t: Time) -> Any:
        level = self._level(t)
        return (
            -level * self._dlevel(t) * self.alpha(t) ** 3 if self.scaling == "vp" else array_module(t).zeros_like(level)
        )

    def dsigma(self, t: Time) -> Any:
        return self.dalpha(t) * self._level(t) + self.alpha(t) * self._dlevel(t)

    def logsnr(self, t: Time) -> Any:
        xp = array_module(t)
        with np.errstate(divide="ignore"):
            return -2.0 * xp.log(self._level(t))

    def time_of(self, logsnr: Any) -> Any:
        return self._time(array_module(logsnr).exp(-0.5 * as_times(logsnr)))

    def at(self, u: Any) -> Any:
        """Goes uniformly between t_min and t_max."""
        return self.t_min + (self.t_max - self.t_min) * as_times(u)
