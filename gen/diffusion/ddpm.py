"""The discrete chain of DDPM as a noise process (Ho et al. 2020, arXiv 2006.11239); its distributions: `chain`."""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from gen.diffusion.process import Time, array_module, as_times, logsnr_of
from gen.errors import GenError

__all__ = ["DDPM"]


@functools.lru_cache(maxsize=16)
def _ddpm_betas(
    schedule: str,
    steps: int,
    offset: float,
    max_beta: float,
    ends: tuple[float, float] | None,
    table: tuple[float, ...],
    zero_snr: bool,
) -> np.ndarray:
    if schedule == "given":
        betas = np.asarray(table, np.float64)
    elif schedule == "linear":
        start, end = ends or (1e-4 * 1000 / steps, 0.02 * 1000 / steps)
        betas = np.linspace(start, end, steps, dtype=np.float64)
    elif schedule == "scaled-linear":
        start, end = ends or (0.00085, 0.012)
        betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    else:
        u = np.arange(steps + 1, dtype=np.float64) / steps
        abar = np.cos((u + offset) / (1.0 + offset) * np.pi / 2) ** 2
        betas = np.minimum(1.0 - abar[1:] / abar[:-1], max_beta)
    if zero_snr:
        alpha = np.sqrt(np.cumprod(1.0 - betas))
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        betas = 1.0 - np.append(alpha[0], alpha[1:] / alpha[:-1]) ** 2
    return betas


@functools.lru_cache(maxsize=16)
def _ddpm_log_alpha(*chain: Any) -> np.ndarray:
    """log alpha at t = 0, 1/T, ..., 1 (T + 1 entries, the first 0); an end in pure noise repeats the entry before."""
    betas = _ddpm_betas(*chain)
    finite = np.where(betas < 1.0, betas, 0.0)
    return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-finite))])


@dataclasses.dataclass(frozen=True)
class DDPM:
    """The discrete chain of DDPM as a process: index i of the chain is time t = (i + 1) / steps.

    t = 0 is clean data (abar_{-1} = 1). Between the table's entries log alpha is interpolated linearly, so
    any continuous solver runs on it; at the entries it is exact. Schedules: ``linear`` (Ho et al. 2020),
    ``cosine`` (Nichol & Dhariwal 2021, "squaredcos_cap_v2"; `offset` and `max_beta` are its s and its cap),
    ``scaled-linear`` (latent diffusion). `ends` are the first and the last beta of the two linear schedules; None
    takes the published ones, 1e-4 and 0.02 times 1000 / steps for ``linear``, 0.00085 and 0.012 for ``scaled-linear``.
    ``given`` takes the betas of `table` as they are.

    With `zero_snr` the chain ends in pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1): alpha is shifted to
    be 0 there and scaled to keep its first value; within the last step alpha, not its logarithm, is interpolated. A
    network that predicts eps says nothing about the data there: it has to predict v or x.

    Raises GenError for another schedule, for a chain without steps, for ends out of range or on a schedule that has
    none, and for a table that is out of range or not as long as the chain.
    """

    schedule: Literal["linear", "cosine", "scaled-linear", "given"] = "linear"
    steps: int = 1000
    offset: float = 0.008
    max_beta: float = 0.999
    ends: tuple[float, float] | None = None
    table: tuple[float, ...] = ()
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine", "scaled-linear", "given"):
            raise GenError(f"DDPM schedule is {self.schedule!r}; expected linear, cosine, scaled-linear or given")
        least = 2 if self.zero_snr else 1
        if self.steps < least:
            raise GenError(f"DDPM chain of {self.steps} steps; expected at least {least}")
        if self.offset < 0.0 or not 0.0 < self.max_beta < 1.0:
            raise GenError(
                f"DDPM chain with offset {self.offset:g} and max_beta {self.max_beta:g}; expected at least 0, and "
                "between 0 and 1"
            )
        bare = self.schedule in ("cosine", "given")
        if self.ends is not None and (bare or not 0.0 < self.ends[0] <= self.ends[1] < 1.0):
            raise GenError(
                f"{self.schedule} DDPM chain with betas from {self.ends[0]:g} to {self.ends[1]:g}; expected "
                "0 < first <= last < 1, and none for cosine and given"
            )
        if len(self.table) != (self.steps if self.schedule == "given" else 0):
            raise GenError(
                f"{self.schedule} DDPM chain of {self.steps} steps with a table of {len(self.table)} betas; expected "
                "one beta per step for given, and no table for the others"
            )
        if not all(0.0 < beta < 1.0 for beta in self.table):
            raise GenError("the table of a DDPM chain has betas outside of 0 to 1; give those that it was trained with")

    @property
    def _chain(self) -> tuple[Any, ...]:
        return self.schedule, self.steps, self.offset, self.max_beta, self.ends, self.table, self.zero_snr

    @property
    def t_min(self) -> float:
        return 1.0 / self.steps

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def betas(self) -> np.ndarray:
        """Gives (steps,) float64: beta_i of the chain."""
        return _ddpm_betas(*self._chain)

    def time(self, index: Any) -> Any:
        """Gives the time of chain index `index` (0 .. steps - 1; -1 is clean data)."""
        return (as_times(index) + 1.0) / self.steps

    def index(self, t: Time) -> Any:
        """Gives the chain index of time t as a real number; within 1e-3 of an integer it is that integer.

        The snap undoes the rounding of t to float32, so that networks see the very index they were trained on.
        """
        xp = array_module(t)
        raw = as_times(t) * self.steps - 1.0
        near = xp.round(raw)
        return xp.where(xp.abs(raw - near) < 1e-3, near, raw)

    def _log_alpha(self, t: Time) -> Any:
        xp = array_module(t)
        table = _ddpm_log_alpha(*self._chain)
        position = self.index(t) + 1.0
        low = xp.clip(xp.floor(position), 0, self.steps - 1).astype(int)
        weight = position - low
        table_xp = xp.asarray(table) if xp is np else jnp.asarray(table, jnp.float32)
        return table_xp[low] + weight * (table_xp[low + 1] - table_xp[low])

    def _slope(self, t: Time) -> Any:
        xp = array_module(t)
        steps = np.diff(_ddpm_log_alpha(*self._chain)) * self.steps
        low = xp.clip(xp.floor(self.index(t) + 1.0), 0, self.steps - 1).astype(int)
        return (xp.asarray(steps) if xp is np else jnp.asarray(steps, jnp.float32))[low]

    def _left(self, t: Time) -> Any:
        """What is left of alpha within a last step that ends in pure noise: from 1 to 0; 1 before."""
        xp = array_module(t)
        return xp.clip(self.steps - 1.0 - self.index(t), 0.0, 1.0)

    def alpha(self, t: Time) -> Any:
        alpha = array_module(t).exp(self._log_alpha(t))
        return alpha * self._left(t) if self.zero_snr else alpha

    def sigma(self, t: Time) -> Any:
        xp, log_alpha = array_module(t), self._log_alpha(t)
        if self.zero_snr:  # sqrt(1 - alpha^2), exact at both ends
            log_alpha = xp.where(self._left(t) < 1.0, log_alpha + xp.log(xp.maximum(self._left(t), 1e-30)), log_alpha)
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))

    def dalpha(self, t: Time) -> Any:
        xp = array_module(t)
        rate = self._slope(t) * self.alpha(t)
        if not self.zero_snr:
            return rate
        return xp.where(self.index(t) >= self.steps - 2, -self.steps * xp.exp(self._log_alpha(t)), rate)

    def dsigma(self, t: Time) -> Any:
        if self.zero_snr:
            return -self.dalpha(t) * self.alpha(t) / self.sigma(t)
        return -self._slope(t) * self.alpha(t) ** 2 / self.sigma(t)

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        xp, value = array_module(logsnr), as_times(logsnr)
        log_alpha = -0.5 * xp.logaddexp(xp.zeros_like(value), -value)
        table = _ddpm_log_alpha(*self._chain)
        times = np.arange(self.steps + 1) / self.steps
        if self.zero_snr:
            table, times = table[:-1], times[:-1]
        if xp is np:
            found = np.interp(-log_alpha, -table, times)
        else:
            found = jnp.interp(-log_alpha, jnp.asarray(-table, jnp.float32), jnp.asarray(times, jnp.float32))
        if not self.zero_snr:
            return found
        last = float(table[-1])
        return xp.where(log_alpha < last, 1.0 - xp.exp(xp.minimum(log_alpha - last, 0.0)) / self.steps, found)

    def at(self, u: Any) -> Any:
        """Uniform over the chain: index floor(u * steps), as the discrete losses draw it."""
        xp = array_module(u)
        return (xp.clip(xp.floor(as_times(u) * self.steps), 0, self.steps - 1) + 1.0) / self.steps
