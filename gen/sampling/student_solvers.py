"""Solvers of distilled students, whose steps are those that they were trained for.

Notation as in `gen.sampling.solvers`. Both are meant for predictions that are samples more than means: on a diffusion
model the result is not that of the probability flow, however small the steps.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, Row, SolverState, interleave

__all__ = ["Anchored", "Backstep"]


@dataclasses.dataclass(frozen=True)
class Anchored:
    """x' = alpha' D + sigma' z_1 with the noise z_1 of the start: the straight line from it to the data prediction.

    The sampler of 2-rectified flow++ (Lee et al. 2024, arXiv 2405.20320; their "new" Euler and Heun).

    Attributes:
      second_order: a second call at x' and its time; D is then what the mean of both velocities predicts from x. The
        last step has one call.
    """

    second_order: bool = False

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = False

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        xp, t, t_next = grid.xp, grid.times[:-1], grid.times[1:]
        a_next, s_next = grid.alpha[1:], grid.sigma[1:]
        one = {"t": t, "now": t, "data": a_next, "noise": s_next, "second": xp.zeros(grid.steps)}
        if not self.second_order:
            return interleave(one)
        return interleave(one, {**one, "t": t_next, "second": xp.ones(grid.steps)}, drop=1)

    def start(self, problem: Problem) -> SolverState:
        """Keeps the unit noise of the start in memory, and x and the velocity of the step's first call."""
        unit = problem.x / problem.grid.sigma[0]
        return SolverState(problem.x, problem.carry, (unit, problem.x, jnp.zeros_like(problem.x)))

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        unit, base, slope = state.memory
        base = jnp.where(row["first"], state.x, base)
        prediction, carry = problem.predict(state.x, row, state.carry)
        velocity = jnp.where(row["second"] > 0, 0.5 * (slope + prediction.velocity), prediction.velocity)
        process = problem.grid.process
        a, s = process.alpha(row["now"]), process.sigma(row["now"])
        da, ds = process.dalpha(row["now"]), process.dsigma(row["now"])
        # the data prediction that has this velocity at the step's start: velocity = a' D + s' (x - a D) / s
        denoised = (s * velocity - ds * base) / (da * s - ds * a)
        x = row["data"] * denoised + row["noise"] * unit
        return SolverState(x, carry, (unit, base, prediction.velocity))


@dataclasses.dataclass(frozen=True)
class Backstep:
    """Two steps forward by DDIM, one step back by fresh noise (Meng et al. 2022, arXiv 2210.03142, sec. 3.3).

    From t_i the student jumps to t_{i+2}, and noise brings it back to t_{i+1}: x' = (a' / a_s) x_s + sqrt(s'^2 - (a'
    s_s / a_s)^2) z. The last step ends at its data prediction.
    """

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        xp, (a, s) = grid.xp, (grid.alpha, grid.sigma)
        far = xp.minimum(xp.arange(grid.steps) + 2, grid.steps)
        keep = a[1:] / a[far]
        spread = xp.sqrt(xp.maximum(s[1:] ** 2 - (keep * s[far]) ** 2, 0.0))
        last = xp.arange(grid.steps) == grid.steps - 1
        return {
            "t": grid.times[:-1],
            "data": xp.where(last, 1.0, a[far]),
            "direction": xp.where(last, 0.0, s[far]),
            "keep": xp.where(last, 1.0, keep),
            "spread": xp.where(last, 0.0, spread),
        }

    def start(self, problem: Problem) -> SolverState:
        """Does what `Solver.start` says."""
        return SolverState(problem.x, problem.carry)

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        prediction, carry = problem.predict(state.x, row, state.carry)
        x = row["data"] * prediction.denoised + row["direction"] * prediction.eps
        return SolverState(row["keep"] * x + row["spread"] * problem.noise(row["i"]), carry)
