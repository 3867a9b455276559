"""Explicit Runge-Kutta methods with fixed steps, all stages in every step, also the last.

The official samplers of SiT and LightningDiT integrate with these. All but the midpoint rule evaluate the network
where the grid ends. Velocities are defined at clean data; other predictions divide by sigma = 0 there: end their grids
earlier, or use `gen.sampling.solvers.Heun`.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, Row, SolverState, interleave, weighted

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

    Raises GenError for a method that is not known.
    """

    method: Literal["midpoint", "trapezoid", "rk4"] = "midpoint"

    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.method not in _TABLEAUS:
            raise GenError(f"unknown Runge-Kutta method '{self.method}'; known: {', '.join(_TABLEAUS)}")

    @property
    def order(self) -> int:
        """Gives the order of convergence of the table."""
        return _TABLEAUS[self.method][0]

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says. After stage j x moves to where stage j + 1 is evaluated, after the last to the
        step's end.
        """
        _, matrix, weights = _TABLEAUS[self.method]
        t, h = grid.times[:-1], grid.times[1:] - grid.times[:-1]
        stages = []
        for j, moves in enumerate([*matrix[1:], weights]):
            newest_first = np.append(moves[j::-1], np.zeros(len(weights) - 1 - j))
            stages.append({"t": t + h * sum(matrix[j]), "moves": h[:, None] * newest_first})
        return interleave(*stages)

    def start(self, problem: Problem) -> SolverState:
        """Starts with a memory of x at the step's start and of the slopes of the last stages, newest first."""
        slopes = (jnp.zeros_like(problem.x),) * (len(_TABLEAUS[self.method][2]) - 1)
        return SolverState(problem.x, problem.carry, (problem.x, slopes))

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        base, past = state.memory
        prediction, carry = problem.predict(state.x, row, state.carry)
        slopes = (prediction.velocity, *past)
        x = base + weighted(row["moves"], slopes)
        return SolverState(x, carry, (jnp.where(row["last"], x, base), slopes[:-1]))
