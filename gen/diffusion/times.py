"""Training times: the laws they are drawn by, and tables of noise levels."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from scipy.special import erf

from gen.errors import GenError

__all__ = ["Levels", "TimeSampler", "lognormal_levels"]


@dataclasses.dataclass(frozen=True)
class Levels:
    """Noise levels drawn uniformly from a table of `count` times, ``process.at(0 .. 1)``, data end first.

    On EDM this is the official table of Karras levels, on DDPM the chain itself.

    Attributes:
      low, high: the fractions of the table between which indices are drawn, both ends included.

    Raises GenError for levels that do not rise within [0, 1].
    """

    low: float = 0.0
    high: float = 1.0
    count: int = 1000

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise GenError(f"noise levels from {self.low} to {self.high}; expected 0 <= low < high <= 1")

    def table(self, process: Any) -> np.ndarray:
        """Gives the (count,) float64 times."""
        return np.asarray(process.at(np.linspace(0.0, 1.0, self.count)))

    @property
    def ends(self) -> tuple[int, int]:
        """Gives the lowest and the highest index that is drawn."""
        return int(self.low * self.count), min(int(self.high * self.count), self.count - 1)

    def __call__(self, key: jax.Array, process: Any, batch: int) -> jax.Array:
        """Gives (batch,) float32 times."""
        first, last = self.ends
        index = jax.random.randint(key, (batch,), first, last + 1)
        return jnp.asarray(self.table(process), jnp.float32)[index]


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """How training times are drawn.

    Attributes:
      law: ``uniform``, and of Esser et al. 2024, sec. 3.1, ``logit-normal``: u = sigmoid(mean + std n), and ``mode``:
        u = 1 - z - scale (cos^2(pi z / 2) - 1 + z) with z uniform; these give u in [0, 1] and the time is the process's
        ``at(u)``. ``lognormal``: the noise level sigma / alpha is exp(mean + std n), as in EDM.
      mean, std: location and scale of the normal laws.
      scale: of ``mode``, from -1 to 2 / (pi - 2); 0 is uniform.
      stratified: one draw from each of B equal parts of the distribution, B the size of the batch, where all B samples
        are drawn freely otherwise; for the laws of [0, 1].
      shift: resolution shift u' = shift u / (1 + (shift - 1) u); 1 for none. Not for ``lognormal``.
      levels: of ``lognormal``: only these many times of the process's own grid are drawn, each but the lowest with the
        mass of the interval below it (improved consistency training, Song and Dhariwal 2024, sec. 3.5); None for all.

    Raises GenError for settings that are of another law, and a mode scale out of range.
    """

    law: Literal["uniform", "logit-normal", "mode", "lognormal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    shift: float = 1.0
    levels: int | None = None
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.stratified and self.law == "lognormal":
            raise GenError("stratified times are of laws on [0, 1]; choose uniform, logit-normal or mode")
        if self.levels is not None and (self.levels < 2 or self.law != "lognormal"):
            raise GenError(f"{self.levels} levels of a {self.law} law; expected two or more, of the lognormal law")
        if self.law == "mode" and not -1.0 <= self.scale <= 2.0 / (math.pi - 2.0):
            raise GenError(f"mode scale is {self.scale:g}; expected -1 to {2.0 / (math.pi - 2.0):.4g}")

    def __call__(self, key: jax.Array, process: Any, count: int) -> jax.Array:
        """Gives (count,) float32 times."""
        uniform = self.law in ("uniform", "mode") or self.levels is not None
        if self.stratified:
            q = self.strata(jax.random.uniform(key, (count,)))
            return self.times(process, q if uniform else ndtri(q))
        return self.times(process, (jax.random.uniform if uniform else jax.random.normal)(key, (count,)))

    @staticmethod
    def strata(u: jax.Array) -> jax.Array:
        """Gives uniform draws (B,) brought into the parts 0 to 1 / B, 1 / B to 2 / B ... of [0, 1], one into each."""
        return (jnp.arange(len(u)) + u) / len(u)

    def times(self, process: Any, z: jax.Array) -> jax.Array:
        """Gives the times of draws z (B,): standard normal, or uniform on [0, 1] for ``uniform``, ``mode`` and
        levels.
        """
        if self.levels is not None:
            grid, mass = lognormal_levels(process, self.levels, self.mean, self.std)
            below = jnp.searchsorted(jnp.asarray(np.cumsum(mass)[:-1], jnp.float32), z, side="right")
            return jnp.asarray(grid[1:], jnp.float32)[below]
        if self.law == "lognormal":
            times: jax.Array = process.time_of(-2.0 * (self.mean + self.std * z))
            return times
        if self.law == "logit-normal":
            z = jax.nn.sigmoid(self.mean + self.std * z)
        elif self.law == "mode":
            z = 1.0 - z - self.scale * (jnp.cos(0.5 * math.pi * z) ** 2 - 1.0 + z)
        u: jax.Array = process.at(self.shifted(z))
        return u

    def shifted(self, u: jax.Array) -> jax.Array:
        """Gives u with the resolution shift."""
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


def lognormal_levels(process: Any, count: int, mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Gives `count` times of the process's own grid, ascending, and the lognormal mass of the intervals between them.

    Returns:
      times (count,) and mass (count - 1,), float64; the mass is proportional to erf((ln s_{i+1} - mean) / (sqrt 2 std))
      - erf((ln s_i - mean) / (sqrt 2 std)) with s = sigma / alpha (Song and Dhariwal 2024, eq. 10) and sums to 1.
    """
    times = np.asarray(process.at(np.linspace(0.0, 1.0, count)), np.float64)
    levels = -0.5 * np.asarray(process.logsnr(times), np.float64)
    mass = np.diff(erf((levels - mean) / (math.sqrt(2.0) * std)))
    return times, mass / mass.sum()
