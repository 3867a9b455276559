"""Shortcut models: a network of the jump's length, whose long jumps are two of its own shorter ones.

Frans et al. 2024, arXiv 2410.12557. Most of a batch learns the velocity, as the shortest jump; the rest learns that a
jump of twice a length is two jumps of that length, one after the other, as the averaged network makes them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.meanflow import AverageVelocityMethod
from gen.diffusion.objectives import Draws, noised
from gen.diffusion.process import expand
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.part import Aux
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["ShortcutTask", "bootstrap_halvings"]


def bootstrap_halvings(rows: int, finest: int, biased: bool = False) -> np.ndarray:
    """Gives (rows,) int: how often the whole time is halved into each bootstrap row's jump, the shortest first.

    Equally many rows for log2(finest) - 1 down to 0, and what is left over makes the whole jump. Where `biased`, half
    of the rows are shared so by all but the two longest jumps, which have a quarter each.
    """
    levels = int(finest).bit_length() - 1
    each, kinds = _each(rows, levels, biased), np.arange(levels)[::-1][: levels - 2 if biased else levels]
    own = np.concatenate([np.repeat(kinds, each), np.full(rows // 4 if biased else 0, 1)])
    return np.concatenate([own, np.zeros(rows - len(own))]).astype(np.int64)


def _each(rows: int, levels: int, biased: bool) -> int:
    """How many bootstrap rows each of the shorter jumps has."""
    return (rows // 2 if biased else rows) // levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortcutTask(AverageVelocityMethod):
    """Trains ``student``, whose flow map has ``second="halvings"``, on the process's times from 0 to 1.

    The first rows of a batch make two jumps with the first average of the network, or with the network itself where
    it has none (`emas`); the others match the velocity.

    Attributes:
      every: one row in so many is a bootstrap row.
      biased: see `bootstrap_halvings`; for models of one and two steps.
      scale: guidance scale of the shortest of the two jumps alone, from which the longer ones inherit it; 1 for none.
      limit: entries of a middle point and of a bootstrap target are clipped to it.

    Raises GenError for a network that is not told halvings, a process whose time is not [0, 1], a finest grid that is
    too coarse, and guidance without classes.
    """

    every: int = 8
    biased: bool = False
    scale: float = 1.0
    limit: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.flow_map.parameterization, "second", "") != "halvings":
            raise GenError("a shortcut model's network takes the halvings; set its parameterization's second to that")
        if self.flow_map.process.t_max != 1.0 or self.flow_map.process.t_min > 1e-3:
            raise GenError(
                f"shortcut models halve times from 0 to 1, and {type(self.flow_map.process).__name__} has other ones; "
                "use the linear process"
            )
        if self.every < 1:
            raise GenError(f"one row in {self.every} is a bootstrap row; expected a number of at least 1")
        if self.finest < (4 if self.biased else 2):
            raise GenError(f"a finest grid of {self.finest} jumps; expected 4 or more where biased, else 2")
        if self.scale != 1.0 and not self.conditions:
            raise GenError("guidance needs a class-conditional network; set scale to 1")

    @property
    def finest(self) -> int:
        """Gives how many of the shortest jumps make the whole."""
        finest: int = self.flow_map.parameterization.finest
        return finest

    def draw(self, key: jax.Array, x: jax.Array) -> Draws:
        """Draws noise, times on the grid of each row's jump with their ends (``extra["s"]``), and dropped rows."""
        time_key, eps_key, drop_key = jax.random.split(key, 3)
        b = x.shape[0]
        jumps = np.concatenate([2 ** bootstrap_halvings(b // self.every, self.finest, self.biased), self._flow_rows(b)])
        start = jax.random.randint(time_key, (b,), 0, jnp.asarray(jumps, jnp.int32))
        t, s = self.ends(start, jumps)
        dropped = jax.random.bernoulli(drop_key, self.dropout, (b,)) & (jnp.arange(b) >= b // self.every)
        return Draws(t, jax.random.normal(eps_key, x.shape), {"s": s, "dropped": dropped})

    def _flow_rows(self, b: int) -> np.ndarray:
        return np.full(b - b // self.every, self.finest)

    @staticmethod
    def ends(start: jax.Array, jumps: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Gives (t, s), each (B,), of jump number `start` (B,), counted from noise, of `jumps` (B,) equal ones."""
        count = jnp.asarray(jumps, jnp.float32)
        return 1.0 - start / count, 1.0 - (start + 1) / count

    def two_jumps(self, params: Params, x_t: jax.Array, cond: Cond, t: jax.Array, s: jax.Array) -> jax.Array:
        """Gives the average velocity of two jumps of half the length from x_t at t to s; no gradient.

        Rows whose halves are the shortest jumps are guided (`scale`). All arrays are of the bootstrap rows.
        """
        params = jax.lax.stop_gradient(params)
        guided = _each(len(t), self.finest.bit_length() - 1, self.biased) if self.scale != 1.0 else 0
        null = self.flow_map.net.apply(params, cond, method="null") if guided else cond
        cond = jax.tree.map(lambda own, none: jnp.concatenate([own, none[:guided]]), dict(cond), dict(null))

        def velocity(x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
            x, t, s = (jnp.concatenate([v, v[:guided]]) for v in (x, t, s))
            found = self.flow_map.value(params, x, t, s, cond).value
            own, none = found[: len(found) - guided], found[len(found) - guided :]
            return jnp.concatenate([none + self.scale * (own[:guided] - none), own[guided:]])

        middle = 0.5 * (t + s)
        first = velocity(x_t, t, middle)
        x = jnp.clip(x_t - expand(t - middle, x_t) * first, -self.limit, self.limit)
        target = 0.5 * (first + velocity(x, middle, s))
        return jnp.clip(target, -self.limit, self.limit)

    def targets(
        self, frozen: Frozen, averaged: Params, x: jax.Array, x_t: jax.Array, cond: Cond, draws: Draws
    ) -> jax.Array:
        """Gives what the average velocity of every row should be, (B, ...)."""
        n = x.shape[0] // self.every
        v = self.velocity(frozen, x_t, x, cond, draws)
        if not n:
            return v
        rows = (x_t[:n], {name: value[:n] for name, value in cond.items()}, draws.t[:n], draws.extra["s"][:n])
        return jnp.concatenate([self.two_jumps(averaged, *rows), v[n:]])

    def loss(
        self, params: Params, x_t: jax.Array, target: jax.Array, cond: Cond, t: jax.Array, s: jax.Array, drop: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Gives the mean squared error of the average velocity over all axes."""
        u = self.flow_map.value(params, x_t, t, s, self.dropped(params, cond, drop)).value
        return jnp.square(u - target).mean(), Aux()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times and noise."""
        x, cond, part = self.data(batch), self.cond(batch), self.student_part
        draws = self.draw(key, x)
        x_t = noised(self.flow_map.process, x, draws)
        target = self.targets(frozen, part.averaged(state), x, x_t, cond, draws)
        data = (x_t, target, cond, draws.t, draws.extra["s"], draws.extra["dropped"])
        state, metrics, _ = part.update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics
