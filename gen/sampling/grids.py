"""Time grids, built on the host in float64: where a solver steps.

Every grid runs from noise to data and ends at clean data, time 0, where no solver evaluates the network.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.ddpm import DDPM
from gen.errors import GenError

__all__ = [
    "ChainLevels",
    "Explicit",
    "Grid",
    "GridConfig",
    "Karras",
    "Matched",
    "Respaced",
    "Searched",
    "Snapped",
    "Spaced",
    "Uniform",
    "inversion",
    "space_timesteps",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """The times of a sampler run, from noise to data.

    Solvers make their coefficients from `times` on the host in float64. A grid passed into a jitted function
    as an argument works too (times to be searched over without recompiling); its coefficients are then
    computed on device.

    Attributes:
      times: (N + 1,) float64, decreasing (increasing for inversion); step i goes from times[i] to times[i + 1].
      process: the process on whose clock the times are.
      levels: (M,) noise levels sigma / alpha to which solvers round the levels that they make themselves
        (stochastic ones); None where the network takes any level.
      extras: per-step arrays (N, ...) by name: controls of the network, of which each step gets its own entry
        (AutoDiffusion's masks).
    """

    times: Any
    process: Any = dataclasses.field(metadata={"static": True})
    levels: Any = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Gives the number of steps N."""
        return len(self.times) - 1

    @property
    def xp(self) -> Any:
        """Gives the array module of the times: numpy on the host, jax.numpy under a trace."""
        return jnp if isinstance(self.times, jax.Array) else np

    @property
    def alpha(self) -> Any:
        """Gives (N + 1,) scale of the data at the times."""
        return self.process.alpha(self.times)

    @property
    def sigma(self) -> Any:
        """Gives (N + 1,) scale of the noise at the times."""
        return self.process.sigma(self.times)


class GridConfig(Protocol):
    """Chooses a solver's times for a process."""

    def __call__(self, process: Any, steps: int) -> Grid:
        """Gives a grid of `steps` steps. Raises GenError when `steps` or the grid's options do not suit."""
        ...


def checked(times: np.ndarray, process: Any, what: str) -> Grid:
    """Gives a grid of these times. Raises GenError unless they fall strictly and lie within the process."""
    if not np.all(np.isfinite(times)):
        raise GenError(f"{what} grid has times that are not finite; check its options")
    top = process.t_max * (1.0 + 1e-9)
    if times.max() > top or times.min() < 0.0:
        raise GenError(
            f"{what} grid spans times {times.min():g} to {times.max():g}; {type(process).__name__} has times "
            f"0 to {process.t_max:g}; lower the grid's noise end or raise the process's"
        )
    if not np.all(np.diff(times) < 0.0):
        raise GenError(
            f"{what} grid of {len(times) - 1} steps on {type(process).__name__} does not fall strictly from noise to "
            "data; use fewer steps, or noise levels within the process's range"
        )
    return Grid(times, process)


def _count(steps: int, what: str) -> int:
    if steps < 1:
        raise GenError(f"{what} grid of {steps} steps; expected at least 1")
    return steps


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform in u from noise to data: times ``process.at(u')``, where u' is u shifted.

    Ends at clean data: where ``process.at(end)`` is not clean (VP's t_min, EDM's sigma_min) it is the last time
    that is evaluated and one step to time 0 follows. On the EDM process this is the grid of Karras et al. 2022.

    Attributes:
      shift: resolution shift u' = shift u / (1 + (shift - 1) u) (Esser et al. 2024, sec. 5.3); 1 for none.
      start, end: ends of the u interval, noise end first, within [0, 1].

    Raises GenError for ends that do not fall within [0, 1], and a shift that is not positive.
    """

    shift: float = 1.0
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.end < self.start <= 1.0:
            raise GenError(f"uniform grid from {self.start:g} to {self.end:g}; expected 1 >= start > end >= 0")
        if self.shift <= 0.0:
            raise GenError(f"uniform grid has shift {self.shift:g}; expected a positive number (1 for none)")

    def __call__(self, process: Any, steps: int) -> Grid:
        clean = float(process.at(self.end)) == 0.0
        u = np.linspace(self.start, self.end, _count(steps, "uniform") + clean, dtype=np.float64)
        times = process.at(self.shift * u / (1.0 + (self.shift - 1.0) * u))
        return checked(times if clean else np.append(times, 0.0), process, "uniform")


@dataclasses.dataclass(frozen=True)
class Karras:
    """EDM's grid (Karras et al. 2022, eq. 5): rho-spaced noise levels sigma / alpha, then clean data.

    On a process other than EDM's the levels are mapped to times by log-SNR.

    Attributes:
      rho: larger values put more steps near the data.
      sigma_min, sigma_max: the lowest and highest level that is evaluated.

    Raises GenError for levels that do not fall above 0.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise GenError(
                f"karras grid from {self.sigma_max:g} to {self.sigma_min:g}; expected sigma_max > sigma_min > 0"
            )

    def __call__(self, process: Any, steps: int) -> Grid:
        u = np.linspace(0.0, 1.0, _count(steps, "karras"), dtype=np.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        times = process.time_of(-2.0 * np.log((high + u * (low - high)) ** self.rho))
        return checked(np.append(times, 0.0), process, "karras")


def space_timesteps(total: int, spec: str) -> np.ndarray:
    """Gives the chain indices kept by a respacing, ascending (Nichol & Dhariwal 2021, as in ADM and DiT).

    Args:
      total: length of the chain.
      spec: ``"N"`` or ``"a,b,c"``: the chain is cut into equal sections (the first ones longer by one where it
        does not divide) and each keeps that many evenly spaced indices, both ends included, rounded half to
        even; or ``"ddimN"``: every i-th index from 0, for the first stride i that keeps exactly N.

    Returns:
      (n,) int64. Raises GenError for another spelling, for a section with fewer indices than asked and for a ddim
      count that no stride gives.
    """
    if match := re.fullmatch(r"ddim(\d+)", spec):
        count = int(match[1])
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return np.arange(0, total, stride)
        raise GenError(
            f"respacing '{spec}': no integer stride keeps {count} of {total} steps; try 'ddim50' or '{count}'"
        )
    if not re.fullmatch(r"\d+(,\d+)*", spec):
        raise GenError(f"respacing '{spec}' is not understood; expected 'N', 'a,b,c' or 'ddimN'")
    counts = [int(part) for part in spec.split(",")]
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if not 1 <= count <= size:
            raise GenError(f"respacing '{spec}' asks {count} of {size} steps; expected between 1 and {size}")
        gap = (size - 1) / (count - 1) if count > 1 else 1.0
        # accumulated like the official loop: the products round differently at exact halves
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += gap
        start += size
    return np.asarray(kept)


@dataclasses.dataclass(frozen=True)
class Respaced:
    """A spaced sub-chain of a DDPM chain (DiT's ``create_diffusion``), then clean data.

    The network receives the original indices. Needs the ddpm process.

    Attributes:
      spec: a respacing of `space_timesteps`; empty for the plain number of steps.

    Calling it raises GenError for a process that is no DDPM chain.
    """

    spec: str = ""

    def __call__(self, process: Any, steps: int) -> Grid:
        if not isinstance(process, DDPM):
            raise GenError(
                f"a respaced grid needs the discrete ddpm process, not {type(process).__name__}; use a uniform grid"
            )
        kept = space_timesteps(process.steps, self.spec or str(_count(steps, "respaced")))
        _same(len(kept), steps, f"respacing '{self.spec}'")
        return checked(np.append(process.time(kept[::-1]), 0.0), process, "respaced")


@dataclasses.dataclass(frozen=True)
class Explicit:
    """The listed times, noise end first, on the process's own clock; the last is where the run ends (0 = data).

    Calling it raises GenError for fewer times than two.
    """

    times: tuple[float, ...]

    def __call__(self, process: Any, steps: int) -> Grid:
        if len(self.times) < 2:
            raise GenError(f"explicit grid has {len(self.times)} times; expected at least a start and an end")
        _same(len(self.times) - 1, steps, "explicit grid")
        return checked(np.asarray(self.times, np.float64), process, "explicit")


@dataclasses.dataclass(frozen=True)
class Searched:
    """Times that were searched for a model, with arrays of its network for each step (`gen.sampling.search`).

    Attributes:
      times: on the clock of `process`, noise end first; the last is where the run ends (0 = data).
      process: the process that was sampled.
      controls: (name, one row for each step) of the network's controls: which layers run, skip scales.

    Calling it raises GenError for another process than it was searched on.
    """

    times: tuple[float, ...]
    process: Any
    controls: tuple[tuple[str, tuple[tuple[float, ...], ...]], ...] = ()

    def __call__(self, process: Any, steps: int) -> Grid:
        _same(len(self.times) - 1, steps, "searched grid")
        if process != self.process:
            raise GenError(
                f"this grid was searched on the process {self.process}, and the model is sampled on {process}; search "
                "on this model"
            )
        extras = {name: np.asarray(rows) for name, rows in self.controls}
        return dataclasses.replace(checked(np.asarray(self.times, np.float64), process, "searched"), extras=extras)


def _same(has: int, steps: int, what: str) -> None:
    if has != steps:
        raise GenError(f"{what} has {has} steps and {steps} were asked; give {has} steps or change the grid")


@dataclasses.dataclass(frozen=True)
class ChainLevels:
    """The levels of a DDPM chain within a range, evenly spaced by index from the noisy end, then clean data.

    EDM's "iDDPM" discretisation (Karras et al. 2022, table 1). Needs the ddpm process; see `Matched` for others.

    Attributes:
      sigma_min, sigma_max: levels sigma / alpha of the chain outside of these are left out.

    Calling it raises GenError for a process that is no DDPM chain, and for more steps than the range has levels.
    """

    sigma_min: float = 0.002
    sigma_max: float = 81.0

    def __call__(self, process: Any, steps: int) -> Grid:
        if not isinstance(process, DDPM):
            raise GenError(f"a chain grid needs the ddpm process, not {type(process).__name__}; wrap it in 'matched'")
        times = process.time(np.arange(process.steps)[::-1])
        levels = process.sigma(times) / process.alpha(times)
        times = times[(levels >= self.sigma_min) & (levels <= self.sigma_max)]
        if len(times) < _count(steps, "chain"):
            raise GenError(f"chain grid of {steps} steps; the chain has {len(times)} levels in the range; use fewer")
        picked = np.round(np.arange(steps) * ((len(times) - 1) / max(steps - 1, 1))).astype(int)
        return checked(np.append(times[picked], 0.0), process, "chain")


@dataclasses.dataclass(frozen=True)
class Spaced:
    """Integer indices of a DDPM chain, evenly spaced, then clean data (the clocks of Lin et al. 2024, table 2).

    Needs the ddpm process. For a chain of T steps and m = `steps` points the indices, noisiest first, are

        linspace: round((T - 1) (m - 1 - i) / (m - 1));  leading: (m - 1 - i) floor(T / m) + offset;
        trailing: round(T - i T / m) - 1.

    Attributes:
      offset: of ``leading``; 1 for Stable Diffusion.
      end_point: ``linspace`` and ``leading`` are laid out for m = steps + 1 points and leave the last one out, as
        published multistep solvers do.

    Calling it raises GenError for a process that is no DDPM chain, and for a spacing that is not known.
    """

    spacing: Literal["linspace", "leading", "trailing"] = "trailing"
    offset: int = 0
    end_point: bool = False

    def __call__(self, process: Any, steps: int) -> Grid:
        if not isinstance(process, DDPM):
            raise GenError(f"a spaced grid needs the ddpm process, not {type(process).__name__}; wrap it in 'matched'")
        i, total, points = np.arange(_count(steps, "spaced")), process.steps, steps + self.end_point
        indices: Any
        match self.spacing:
            case "linspace":
                indices = np.round((total - 1) * (points - 1 - i) / max(points - 1, 1))
            case "leading":
                indices = (points - 1 - i) * (total // points) + self.offset
            case "trailing":
                indices = np.round(total - i * (total / steps)) - 1
            case _:
                raise GenError(f"spacing '{self.spacing}' is unknown; expected linspace, leading or trailing")
        return checked(np.append(process.time(indices), 0.0), process, "spaced")


@dataclasses.dataclass(frozen=True)
class Matched:
    """Another process's grid, carried to the sampled process by equal log-SNR.

    ``Matched(Uniform(), Trigonometric())`` is the cosine grid on any process that reaches pure noise.

    Attributes:
      grid: a grid config.
      process: the process on which it is laid out.
    """

    grid: Any
    process: Any

    def __call__(self, process: Any, steps: int) -> Grid:
        inner = self.grid(self.process, steps)
        with np.errstate(divide="ignore"):
            times = np.where(inner.times == 0.0, 0.0, process.time_of(self.process.logsnr(inner.times)))
        return checked(times, process, "matched")


@dataclasses.dataclass(frozen=True)
class Snapped:
    """A grid whose noise levels are rounded to the nearest of a list, as networks made for a chain need.

    Levels that a stochastic solver makes itself are rounded too.

    Attributes:
      grid: a grid config.
      levels: noise levels sigma / alpha that the network knows.
    """

    grid: Any
    levels: tuple[float, ...]

    def __call__(self, process: Any, steps: int) -> Grid:
        levels = np.asarray(self.levels, np.float64)
        inner = self.grid(process, steps)
        ratios = inner.sigma / inner.alpha
        times = np.where(inner.times == 0.0, 0.0, snap(process, ratios, levels))
        return dataclasses.replace(checked(times, process, "snapped"), levels=levels)


def snap(process: Any, ratios: Any, levels: Any) -> Any:
    """Gives times of the noise levels sigma / alpha in `ratios` (n,), rounded to `levels` (M,) unless that is None."""
    xp = jnp if isinstance(ratios, jax.Array) else np
    if levels is not None:
        ratios = xp.asarray(levels)[xp.argmin(xp.abs(ratios[:, None] - xp.asarray(levels)[None]), axis=1)]
    with np.errstate(divide="ignore"):
        return process.time_of(-2.0 * xp.log(ratios))


def inversion(grid: Grid) -> Grid:
    """Gives the grid backwards, from data to noise, to encode a clean x by a deterministic solver.

    The clean end is left out, since networks are not defined there: x is taken to lie at the first noisy time,
    as the official DDIM encoding does.
    """
    return dataclasses.replace(grid, times=grid.times[:-1][::-1], extras={})
