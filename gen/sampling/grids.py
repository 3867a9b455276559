"""Time grids, built on the host in float64: where a solver steps, and where it evaluates the network."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

__all__ = ["Grid", "GridConfig", "Karras", "Uniform"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The times of a sampler run, from noise to data.

    Attributes:
      times: (N + 1,) float64, decreasing (increasing for inversion); step i goes from times[i] to times[i + 1].
      extras: per-step arrays (N, ...) by name, handed to network controls (AutoDiffusion's masks).
    """

    times: np.ndarray
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.times) - 1


class GridConfig(Protocol):
    """Chooses a solver's times for a process."""

    def __call__(self, process: Any, steps: int) -> Grid:
        """A grid of `steps` steps. Raises GenError when `steps` does not suit."""
        ...


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform in u from noise to data, times ``process.at(u)``, then shifted.

    Attributes:
      shift: resolution shift t' = shift t / (1 + (shift - 1) t) applied to u; 1 for none.
      start, end: ends of the u interval, noise end first.
    """

    shift: float = 1.0
    start: float = 1.0
    end: float = 0.0

    def __call__(self, process: Any, steps: int) -> Grid:
        u = np.linspace(self.start, self.end, steps + 1, dtype=np.float64)
        return Grid(process.at(self.shift * u / (1.0 + (self.shift - 1.0) * u)))


@dataclasses.dataclass(frozen=True)
class Karras:
    """EDM's grid (Karras et al. 2022, eq. 5): rho-spaced noise levels ratios, then an exact 0.

    On a process that is not EDM the levels are sigma / alpha and are mapped to times by log-SNR.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __call__(self, process: Any, steps: int) -> Grid:
        u = np.linspace(0.0, 1.0, steps, dtype=np.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        times = process.time_of(-2.0 * np.log((high + u * (low - high)) ** self.rho))
        return Grid(np.append(times, 0.0))
