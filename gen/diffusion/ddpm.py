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
    schedule: str, steps: int, offset: float, max_beta: float, ends: tuple[float, float] | None
) -> np.ndarray:
    if schedule == "linear":
        start, end = ends or (1e-4 * 1000 / steps, 0.02 * 1000 / steps)
        return np.linspace(start, end, steps, dtype=np.float64)
    if schedule == "scaled-linear":
        start, end = ends or (0.00085, 0.012)
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    u = np.arange(steps + 1, dtype=np.float64) / steps
    abar = np.cos((u + offset) / (1.0 + offset) * np.pi / 2) ** 2
    return np.minimum(1.0 - abar[1:] / abar[:-1], max_beta)


@functools.lru_cache(maxsize=16)
def _ddpm_log_alpha(*chain: Any) -> np.ndarray:
    """log alpha at t = 0, 1/T, ..., 1 (T + 1 entries, the first 0)."""
    return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-_ddpm_betas(*chain)))])


@dataclasses.dataclass(frozen=True)
class DDPM:
    """The discrete chain of DDPM as a process: index i of the chain is time t = (i + 1) / steps.

    t = 0 is clean data (abar_{-1} = 1). Between the table's entries log alpha is interpolated linearly, so
    any continuous solver runs on it; at the entries it is exact. Schedules: ``linear`` (Ho et al. 2020),
    ``cosine`` (Nichol & Dhariwal 2021, "squaredcos_cap_v2"; `offset` and `max_beta` are its s and its cap),
    ``scaled-linear`` (latent diffusion). `ends` are the first and the last beta of the two linear schedules; None
    takes the published ones, 1e-4 and 0.02 times 1000 / steps for ``linear``, 0.00085 and 0.012 for ``scaled-linear``.

    Raises GenError for another schedule, for a chain without steps, and for ends out of range or on the cosine.
    """

    schedule: Literal["linear", "cosine", "scaled-linear"] = "linear"
    steps: int = 1000
    offset: float = 0.008
    max_beta: float = 0.999
    ends: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "cosine", "scaled-linear"):
            raise GenError(f"DDPM schedule is {self.schedule!r}; expected linear, cosine or scaled-linear")
        if self.steps < 1:
            raise GenError(f"DDPM chain of {self.steps} steps; expected at least 1")
        if self.offset < 0.0 or not 0.0 < self.max_beta < 1.0:
            raise GenError(
                f"DDPM chain with offset {self.offset:g} and max_beta {self.max_beta:g}; expected at least 0, and "
                "between 0 and 1"
            )
        if self.ends is not None and (self.schedule == "cosine" or not 0.0 < self.ends[0] <= self.ends[1] < 1.0):
            raise GenError(
                f"{self.schedule} DDPM chain with betas from {self.ends[0]:g} to {self.ends[1]:g}; expected "
                "0 < first <= last < 1, and none for cosine"
            )

    @property
    def _chain(self) -> tuple[str, int, float, float, tuple[float, float] | None]:
        return self.schedule, self.steps, self.offset, self.max_beta, self.ends

    @property
    def t_min(self) -> float:
        return 1.0 / self.steps

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def betas(self) -> np.ndarray:
        """(steps,) float64: beta_i of the chain."""
        return _ddpm_betas(*self._chain)

    def time(self, index: Any) -> Any:
        """The time of chain index `index` (0 .. steps - 1; -1 is clean data)."""
        return (as_times(index) + 1.0) / self.steps

    def index(self, t: Time) -> Any:
        """The chain index of time t as a real number; within 1e-3 of an integer it is that integer.

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

    def alpha(self, t: Time) -> Any:
        return array_module(t).exp(self._log_alpha(t))

    def sigma(self, t: Time) -> Any:
        xp = array_module(t)
        return xp.sqrt(-xp.expm1(2.0 * self._log_alpha(t)))

    def dalpha(self, t: Time) -> Any:
        return self._slope(t) * self.alpha(t)

    def dsigma(self, t: Time) -> Any:
        return -self._slope(t) * self.alpha(t) ** 2 / self.sigma(t)

    def logsnr(self, t: Time) -> Any:
        return logsnr_of(self, t)

    def time_of(self, logsnr: Any) -> Any:
        xp, value = array_module(logsnr), as_times(logsnr)
        log_alpha = -0.5 * xp.logaddexp(xp.zeros_like(value), -value)
        table = _ddpm_log_alpha(*self._chain)
        times = np.arange(self.steps + 1) / self.steps
        if xp is np:
            return np.interp(-log_alpha, -table, times)
        return jnp.interp(-log_alpha, jnp.asarray(-table, jnp.float32), jnp.asarray(times, jnp.float32))

    def at(self, u: Any) -> Any:
        """Uniform over the chain: index floor(u * steps), as the discrete losses draw it."""
        xp = array_module(u)
        return (xp.clip(xp.floor(as_times(u) * self.steps), 0, self.steps - 1) + 1.0) / self.steps
