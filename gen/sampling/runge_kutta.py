"""Explicit Runge-Kutta methods with fixed steps, all stages in every step, also the last.

The official samplers of SiT and LightningDiT integrate with these. All but the midpoint rule evaluate the network
where the grid ends. Velocities are defined at clean data; other predictions divide by sigma = 0 there: end their grids
earlier, or use `gen.sampling.solvers.Heun`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.prediction import Denoise
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling.grids import Grid
from gen.sampling.solvers import Noise

__all__ = ["RungeKutta"]

# method -> (order, stage matrix, weights); the stage times are the rows' sums
_TABLEAUS: dict[str, tuple[int, list[list[float]], list[float]]] = {
    "midpoint": (2, [[0, 0], [1 / 2, 0]], [0, 1]),
    "trapezoid": (2, [[0, 0], [1, 0]], [1 / 2, 1 / 2]),
    "rk4": (
        4,
        [[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    ),
}


@dataclasses.dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method on the probability flow.

    Attributes:
      method: ``midpoint`` and ``trapezoid`` of second order, ``rk4`` of fourth (Kutta's 3/8 rule).
    """

    method: Literal["midpoint", "trapezoid", "rk4"] = "midpoint"

    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.method not in _TABLEAUS:
            raise GenError(f"unknown Runge-Kutta method '{self.method}'; known: {', '.join(_TABLEAUS)}")

    @property
    def order(self) -> int:
        """Order of convergence."""
        return _TABLEAUS[self.method][0]

    def nfe(self, grid: Grid) -> int:
        """As many calls a step as the method has stages."""
        return grid.steps * len(_TABLEAUS[self.method][2])

    def __call__(
        self,
        denoise: Denoise,
        x: jax.Array,
        grid: Grid,
        noise: Noise,
        cond: Cond,
        carry: Any = (),
        *,
        trajectory: bool = False,
    ) -> jax.Array:
        """See `Solver`."""
        del noise
        _, matrix, weights = _TABLEAUS[self.method]
        # after stage j the point moves to where stage j + 1 is evaluated, after the last to the end of the step
        moves = np.array([*matrix[1:], weights])
        stages, h = len(weights), grid.times[1:] - grid.times[:-1]
        rows = {
            "i": jnp.repeat(jnp.arange(grid.steps), stages),
            "stage": jnp.tile(jnp.arange(stages), grid.steps),
            "t": jnp.asarray((grid.times[:-1, None] + h[:, None] * np.sum(matrix, axis=1)).reshape(-1), x.dtype),
            "moves": jnp.asarray((h[:, None, None] * moves).reshape(-1, stages), x.dtype),
        }

        def stage(state: Any, row: Any) -> Any:
            base, point, slopes, carry = state
            prediction, carry = denoise(point, row["t"], cond, row["i"], carry)
            slopes = slopes.at[row["stage"]].set(prediction.velocity)
            point = base + jnp.tensordot(row["moves"], slopes, 1)
            base = jnp.where(row["stage"] == stages - 1, point, base)
            return (base, point, slopes, carry), base if trajectory else None

        start: Any = (x, x, jnp.zeros((stages, *x.shape), x.dtype), carry)
        (x, *_), states = jax.lax.scan(stage, start, rows)
        return states[stages - 1 :: stages] if trajectory else x
