"""The two times of a consistency loss: how far apart they are while training goes on, and how they are drawn.

Times are drawn as noise levels, sigma / alpha, which are EDM's times; `Pair.times` gives them on any process's clock.
What changes with the step of training is made on the host in float64 and handed to the program as arrays of one shape,
so that nothing recompiles.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from scipy import stats

from gen.diffusion.process import VE
from gen.diffusion.times import lognormal_levels
from gen.errors import GenError

__all__ = [
    "Doubling",
    "Fixed",
    "GridPairs",
    "LogLevels",
    "Pair",
    "PairLaw",
    "Progressive",
    "ShrinkingPairs",
    "at_level",
    "level_of",
    "snapped",
]


def at_level(process: Any, level: jax.Array) -> jax.Array:
    """Gives the times at which sigma / alpha has the values `level`, above 0, in their shape.

    On EDM's process they are the same.
    """
    if isinstance(process, VE):
        return level
    times: jax.Array = process.time_of(-2.0 * jnp.log(level))
    return times


def level_of(process: Any, t: Any) -> Any:
    """Gives sigma / alpha at times t; infinite where no data are left."""
    if isinstance(process, VE):
        return t
    return (np if isinstance(t, np.ndarray) else jnp).exp(-0.5 * process.logsnr(t))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """Two times of one trajectory for each sample, on the process's clock.

    Attributes:
      t: (B,) the student's time, the noisier one.
      r: (B,) the target's time.
      gap: (B,) t - r, formed without cancellation, in noise levels where the law draws levels.
    """

    t: jax.Array
    r: jax.Array
    gap: jax.Array


class PairLaw(Protocol):
    """How the pairs of a step are drawn; `derived` tells whether that depends on the length of the stage."""

    derived: bool

    def schedule(self, process: Any, step: int, steps: int) -> Mapping[str, np.ndarray]:
        """Gives what the law depends on at step `step` of `steps`, arrays of fixed shapes."""
        ...

    def draw(self, key: jax.Array, process: Any, count: int, schedule: Mapping[str, Any]) -> Pair:
        """Draws pairs for `count` samples."""
        ...


class Curriculum(Protocol):
    """How many points the grid has at a step."""

    @property
    def most(self) -> int:
        """Gives the largest number of points."""
        ...

    derived: bool  # whether N depends on the length of the stage

    def points(self, step: int, steps: int) -> int:
        """Gives the number of points N at step `step` of `steps`."""
        ...

    def decay(self, first: float, step: int, steps: int) -> float:
        """Gives the decay of an averaged target, which is `first` on the first grid."""
        ...


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same grid throughout: consistency distillation.

    Attributes:
      count: of its points.
    """

    count: int = 18

    derived: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _expect_points(self.count, self.count)

    @property
    def most(self) -> int:
        return self.count

    def points(self, step: int, steps: int) -> int:
        del step, steps
        return self.count

    def decay(self, first: float, step: int, steps: int) -> float:
        del step, steps
        return first


@dataclasses.dataclass(frozen=True)
class Progressive:
    """N = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 at step k of K (arXiv 2303.01469, app. C).

    Attributes:
      first, last: the paper's s0 and s1.
    """

    first: int = 2
    last: int = 150

    derived: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _expect_points(self.first, self.last)

    @property
    def most(self) -> int:
        return self.last + 1

    def points(self, step: int, steps: int) -> int:
        low, high = self.first**2, (self.last + 1) ** 2
        return max(1, math.ceil(math.sqrt(step / steps * (high - low) + low) - 1.0)) + 1

    def decay(self, first: float, step: int, steps: int) -> float:
        """Gives first^(s0 / (N - 1)) (arXiv 2303.01469, app. C)."""
        return first ** (self.first / (self.points(step, steps) - 1))


@dataclasses.dataclass(frozen=True)
class Doubling:
    """N = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2 floor(s1 / s0) + 1)) (arXiv 2310.14189, sec. 3.4).

    Attributes:
      first, last: the paper's s0 and s1.
    """

    first: int = 10
    last: int = 1280

    derived: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _expect_points(self.first, self.last)

    @property
    def most(self) -> int:
        return self.last + 1

    def points(self, step: int, steps: int) -> int:
        return min(self.first * 2 ** min(step // self.every(steps), 62), self.last) + 1

    def decay(self, first: float, step: int, steps: int) -> float:
        del step, steps
        return first

    def every(self, steps: int) -> int:
        """Gives the steps between two doublings, the paper's K'."""
        return max(1, math.floor(steps / (math.log2(self.last // self.first) + 1.0)))


def _expect_points(first: int, last: int) -> None:
    if not 2 <= first <= last:
        raise GenError(f"a grid of {first} to {last} points; expected at least 2, and no fewer in the end")


@dataclasses.dataclass(frozen=True)
class GridPairs:
    """Neighbours t_{i+1}, t_i of the process's own grid of N points, ``process.at(0 .. 1)``.

    Attributes:
      curriculum: N by the step of training.
      mean, std: of the lognormal law whose mass in (t_i, t_{i+1}) is the probability of a pair (improved consistency
        training: -1.1, 2.0); None for equal probabilities.
    """

    curriculum: Any = Fixed()
    mean: float | None = None
    std: float = 2.0

    @property
    def derived(self) -> bool:
        """Tells whether the grid follows the length of the stage."""
        found: bool = self.curriculum.derived
        return found

    def table(self, process: Any, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives the times of a grid, ascending (N,), and the probabilities of its pairs (N - 1,), float64."""
        if self.mean is not None:
            return lognormal_levels(process, points, self.mean, self.std)
        times = np.asarray(process.at(np.linspace(0.0, 1.0, points)), np.float64)
        return times, np.full(points - 1, 1.0 / (points - 1))

    def schedule(self, process: Any, step: int, steps: int) -> Mapping[str, np.ndarray]:
        """Does what `PairLaw.schedule` says: "grid" (most,), "below" and "gap" (most - 1,) float32."""
        return _grid(self, process, self.curriculum.points(step, steps))

    def draw(self, key: jax.Array, process: Any, count: int, schedule: Mapping[str, Any]) -> Pair:
        """Does what `PairLaw.draw` says."""
        del process
        index = jnp.searchsorted(schedule["below"], jax.random.uniform(key, (count,)), side="right")
        return self.pick(schedule, index)

    def pick(self, schedule: Mapping[str, Any], index: jax.Array) -> Pair:
        """Gives the pairs above the grid's points number `index` (B,), counted from the data end."""
        grid, gap = jnp.asarray(schedule["grid"]), jnp.asarray(schedule["gap"])
        return Pair(grid[index + 1], grid[index], gap[index])


@functools.lru_cache(maxsize=4)
def _grid(law: GridPairs, process: Any, points: int) -> Mapping[str, np.ndarray]:
    times, mass = law.table(process, points)
    most = law.curriculum.most
    below = np.full(most - 1, 2.0)  # beyond the last pair nothing is drawn
    below[: points - 2] = np.cumsum(mass)[:-1]
    found = {"grid": np.pad(times, (0, most - points), mode="edge"), "below": below}
    found["gap"] = np.pad(np.diff(times), (0, most - points), constant_values=1.0)
    return {name: value.astype(np.float32) for name, value in found.items()}


@dataclasses.dataclass(frozen=True)
class LogLevels:
    """The logarithm of the noise level is normal or Student-t distributed, between two levels or anywhere.

    Attributes:
      mean, std: location and scale.
      freedom: degrees of freedom of Student's t; None for the normal law.
      low, high: levels between which the law is truncated; None for no truncation.

    Raises GenError for levels that do not rise, and Student's t without both ends.
    """

    mean: float = -1.1
    std: float = 2.0
    freedom: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        if (None in ends and ends != (None, None)) or (self.low and self.high and self.low >= self.high):
            raise GenError(f"levels from {self.low} to {self.high}; give both ends rising, or neither")
        if self.freedom is not None and self.low is None:
            raise GenError("Student's t has tails without a mean; truncate it by low and high")

    def __call__(self, key: jax.Array, count: int) -> jax.Array:
        """Gives (count,) float32 levels."""
        return self.levels(jax.random.uniform(key, (count,), minval=jnp.finfo(jnp.float32).tiny))

    def levels(self, u: jax.Array) -> jax.Array:
        """Gives the levels at the quantiles u (B,) of the law."""
        if self.freedom is not None:
            quantiles, logs = _student(self)
            return jnp.exp(jnp.interp(u, quantiles, logs))
        if self.low is not None and self.high is not None:
            a, b = (ndtr((math.log(end) - self.mean) / self.std) for end in (self.low, self.high))
            u = a + u * (b - a)
        return jnp.exp(self.mean + self.std * ndtri(u))


@functools.lru_cache(maxsize=4)
def _student(law: LogLevels) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of the truncated law and the log levels there; points stand densely where the law has its peak."""
    assert law.low is not None
    assert law.high is not None
    ends = [(math.log(end) - law.mean) / law.std for end in (law.low, law.high)]
    scale = math.sqrt(law.freedom or 1.0)
    x = scale * np.sinh(np.linspace(math.asinh(ends[0] / scale), math.asinh(ends[1] / scale), 8192))
    x[0], x[-1] = ends
    below = stats.t.cdf(x, law.freedom)
    quantiles = (below - below[0]) / (below[-1] - below[0])
    return quantiles.astype(np.float32), (law.mean + law.std * x).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ShrinkingPairs:
    """Levels t of a continuous law and r = max(t - t (1 - p) (1 + k sigmoid(-b t)), floor), where p grows in stages.

    p = min(1 - q^-(stage + 1), limit); every `double` steps begin a stage (easy consistency tuning, Geng et al. 2024,
    arXiv 2406.14548, sec. 3.3). The first stages resemble diffusion training, r = 0; in the last ones r is near t.

    Attributes:
      levels: the law of t.
      q: factor by which a stage shrinks the gap.
      double: steps of a stage; may be broken, where a stage is counted in images.
      limit: largest p.
      k, b: of the sigmoid; k = 0 for a gap in proportion to t.
      floor: smallest level r.
      begun: steps that were made before, for runs that go on.
      count: both levels are moved to the nearest of this many points of the process's own grid; None for no grid.

    Raises GenError for a factor of at most 1, and numbers out of range.
    """

    levels: LogLevels = LogLevels()
    q: float = 2.0
    double: float = 25_000
    limit: float = 1.0
    k: float = 8.0
    b: float = 1.0
    floor: float = 0.0
    begun: int = 0
    count: int | None = None

    derived: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.q <= 1.0 or self.double <= 0 or not 0.0 < self.limit <= 1.0 or self.floor < 0.0:
            raise GenError(
                f"pairs that shrink by {self.q:g} every {self.double:g} steps to {self.limit:g}, above {self.floor:g}; "
                "expected a factor above 1, steps, a limit in (0, 1] and no negative floor"
            )

    def schedule(self, process: Any, step: int, steps: int) -> Mapping[str, np.ndarray]:
        """Does what `PairLaw.schedule` says: "left" () = 1 - p."""
        del process, steps
        return {"left": np.asarray(self.left(self.stage(step)), np.float32)}

    def stage(self, step: int) -> int:
        """Gives the number of the stage, from 0."""
        return int((self.begun + step) // self.double)

    def left(self, stage: int) -> float:
        """Gives 1 - p of a stage."""
        return max(self.q ** -(stage + 1.0), 1.0 - self.limit)

    def draw(self, key: jax.Array, process: Any, count: int, schedule: Mapping[str, Any]) -> Pair:
        """Does what `PairLaw.draw` says."""
        return self.pairs(process, self.levels(key, count), schedule["left"])

    def pairs(self, process: Any, level: jax.Array, left: Any) -> Pair:
        """Gives the pairs of the levels t (B,) at 1 - p = `left`; t is raised where the floor leaves no gap."""
        wanted = level * left * (1.0 + self.k * jax.nn.sigmoid(-self.b * level))
        r = jnp.maximum(level - wanted, self.floor)
        gap = jnp.maximum(jnp.minimum(wanted, level - self.floor), _LEAST)
        t = jnp.where(gap > _LEAST, level, r + _LEAST)
        if self.count is not None:
            t, r = snapped(np.asarray(process.at(np.linspace(0.0, 1.0, self.count))), t, r)
            gap = t - r
        return Pair(at_level(process, t), at_level(process, r), gap)


_LEAST = 1e-6  # smallest gap


def snapped(table: np.ndarray, t: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives t and r (B,) moved to the nearest of the ascending levels `table` (N,); where both meet, t moves one up."""
    levels = jnp.asarray(table, jnp.float32)
    first, second = (jnp.abs(x[:, None] - levels).argmin(1) for x in (t, r))
    first = jnp.where(first == second, first + 1, first)
    last = len(table) - 1
    second = jnp.where(first > last, last - 1, second)
    return levels[jnp.minimum(first, last)], levels[second]
