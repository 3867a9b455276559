"""Multistep solvers in lambda = log(alpha / sigma): DPM-Solver++ and UniPC, one network call a step.

The probability flow from a level to the cleaner one (primes), with h = lambda' - lambda and D = E[x | x_t], is

    x' = (sigma' / sigma) x + sigma' integral over [lambda, lambda'] of e^l D(l) dl;

both methods put a polynomial through the D of past levels. They keep the guided D. Processes enter through alpha and
sigma alone; a level of pure noise or clean data lies at infinite lambda and takes part by first-order steps only.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, Row, SolverState, weighted

__all__ = ["DPMSolver", "UniPC"]


def _lambdas(grid: Grid) -> tuple[Any, Any]:
    """lambda at the N + 1 levels (0 where it is infinite) and where it is finite."""
    xp, a, s = grid.xp, grid.alpha, grid.sigma
    finite = (a > 0) & (s > 0)
    return xp.log(xp.where(finite, a, 1.0) / xp.where(finite, s, 1.0)), finite


def _orders(grid: Grid, lam: Any, finite: Any, most: Any) -> Any:
    """(N,) order of each step: at most `most` and the levels passed, 1 into, out of, or along infinite lambda."""
    passed = grid.xp.arange(grid.steps) + finite[0]
    inner = finite[:-1] & finite[1:] & (lam[:-1] != lam[1:])
    return grid.xp.where(inner, grid.xp.clip(passed, 1, most), 1)


@dataclasses.dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ multistep (arXiv 2211.01095): 2M, 3M and, stochastic, 2M SDE; `solver_order` 1 is DDIM.

    With E = 1 - e^-ch (c = 1, or 2 for the SDE) and divided differences f01, f012 of past D:

        x' = (sigma' / sigma) e^-(c-1)h x + alpha' E D + C + [SDE] sigma' sqrt(1 - e^-2h) z
        order 2: C = alpha' E h f01 / 2 (midpoint) or alpha' (h - E / c) f01 (heun)
        order 3: C = alpha' (h - E) (f01 + f012 (lambda - lambda_prev)) + alpha' (h^2 - 2h + 2E) f012 / 2

    The last factor 1/2 is that of the published multistep code; exact integration of the quadratic has none.

    Attributes:
      solver_order: 1, 2 or 3 (3 for the deterministic method only).
      form: the second-order term.
      stochastic: the SDE instead of the probability flow.
      lower_final: in runs of fewer than 15 steps the last two are of order 2 and 1 at most. A step to clean data is of
        order 1 in any case.

    Raises GenError for an order that the form does not have.
    """

    solver_order: int = 2
    form: Literal["midpoint", "heun"] = "midpoint"
    stochastic: bool = False
    lower_final: bool = True

    def __post_init__(self) -> None:
        most = 2 if self.stochastic else 3
        if not 1 <= self.solver_order <= most:
            kind = "stochastic dpm-solver" if self.stochastic else "dpm-solver"
            raise GenError(f"{kind} of order {self.solver_order}; expected 1 to {most}")

    @property
    def order(self) -> int:
        """Gives the order of convergence, 2 at most: the first step is always of order 1."""
        return 1 if self.stochastic else min(self.solver_order, 2)

    def start(self, problem: Problem) -> SolverState:
        """Starts with a memory of the D of past levels, newest first."""
        return SolverState(problem.x, problem.carry, (jnp.zeros_like(problem.x),) * (self.solver_order - 1))

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        prediction, carry = problem.predict(state.x, row, state.carry)
        known = (prediction.denoised, *state.memory)
        x = row["keep"] * state.x + weighted(row["data"], known)
        if self.stochastic:
            x = x + row["noise"] * problem.noise(row["i"])
        return SolverState(x, carry, known[:-1])

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says; factors of x, of D at this and the past levels (solver_order,) and of the
        noise.
        """
        xp, n = grid.xp, grid.steps
        (lam, finite), i = _lambdas(grid), np.arange(n)
        most = np.full(n, self.solver_order)
        if self.lower_final and n < 15:
            most[-2:] = np.minimum(most[-2:], [2, 1][-n:])
        order = _orders(grid, lam, finite, most)
        a, s, a_next, s_next = grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:]
        keep, data, spread, c = s_next / s, a_next - a * s_next / s, xp.zeros(n), 1.0
        if self.stochastic:
            decay = a * s_next / (a_next * s)  # e^-h
            spread = s_next * xp.sqrt(xp.maximum(1.0 - decay**2, 0.0))
            keep, data, c = keep * decay, a_next * (1.0 - decay**2), 2.0
        l0, l1, l2 = (lam[np.maximum(i - k, 0)] for k in range(3))
        h = xp.where(order > 1, lam[1:] - l0, 1.0)
        d1 = xp.where(order > 1, l0 - l1, 1.0)
        d2 = xp.where(order > 2, l1 - l2, 1.0)
        e = -xp.expm1(-c * h)
        slope = a_next * (h - e / c)
        if self.form == "midpoint":
            slope = xp.where(order == 2, a_next * e * h / 2.0, slope)
        curve = xp.where(order > 2, a_next * ((h - e) * d1 + (h**2 - 2.0 * h + 2.0 * e) / 2.0), 0.0) / (d1 + d2)
        slope = xp.where(order > 1, slope, 0.0)
        # slope f01 + curve (f01 - f12), sorted by level
        first, second = (slope + curve) / d1, curve / d2
        weights = [data + first, -first - second, second][: self.solver_order]
        return {"t": grid.times[:-1], "keep": keep, "data": xp.stack(weights, axis=1), "noise": spread}


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC, predictor-corrector on data predictions (arXiv 2302.04867), one call a step.

    The network is evaluated at the predicted state of a level; that evaluation then corrects the state and serves the
    next prediction. With nodes r_j = (lambda_j - lambda) / h and their D_j,

        x' = (sigma' / sigma) x + alpha' (1 - e^-h) D + alpha' sum_j c_j (D_j - D) / r_j,
        sum_j c_j r_j^(k-1) = M_k;  M_0 = 1 - e^-h, M_k = 1 - k M_(k-1) / h.

    The predictor of order p has the p - 1 past levels as nodes, the corrector these and the new level. Where there is
    one node (predictor of order 2, corrector of order 1) its weight is B / 2 as published.

    Attributes:
      solver_order: 1 or more; published for 1 to 3.
      form: B = h (``bh1``) or 1 - e^-h (``bh2``).
      lower_final: the order is at most the number of steps left.
      uncorrected: steps whose result is not corrected.

    Raises GenError for an order below 1.
    """

    solver_order: int = 2
    form: Literal["bh1", "bh2"] = "bh2"
    lower_final: bool = True
    uncorrected: tuple[int, ...] = ()

    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.solver_order < 1:
            raise GenError(f"unipc of order {self.solver_order}; expected 1 or more")

    @property
    def order(self) -> int:
        """Gives the order of convergence, 2 at most where the run ends at clean data, since that step is of order 1;
        see `DPMSolver`.
        """
        return min(self.solver_order, 2)

    def start(self, problem: Problem) -> SolverState:
        """Starts with x as the predicted state; the memory holds the corrected one and the D of past levels, newest
        first.
        """
        zeros = jnp.zeros_like(problem.x)
        return SolverState(problem.x, problem.carry, (zeros, (zeros,) * self.solver_order))

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        base, past = state.memory
        prediction, carry = problem.predict(state.x, row, state.carry)
        known = (prediction.denoised, *past)
        base = row["fresh"] * state.x + row["keep_corrected"] * base + weighted(row["correct"], known)
        x = row["keep"] * base + weighted(row["predict"], known[:-1])
        return SolverState(x, carry, (base, known[:-1]))

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        xp, n = grid.xp, grid.steps
        lam, finite = _lambdas(grid)
        most = self.solver_order
        order = _orders(grid, lam, finite, np.minimum(most, n - np.arange(n)) if self.lower_final else most)
        keep = grid.sigma[1:] / grid.sigma[:-1]
        # the corrector into a level belongs to the step before
        fresh = np.isin(np.arange(n), [0, *(k + 1 for k in self.uncorrected)])
        correct = self._weights(grid, lam, order, corrector=True)
        correct = xp.concatenate([correct[:1], correct[:-1]])
        before = xp.concatenate([keep[:1], keep[:-1]])
        return {
            "t": grid.times[:-1],
            "fresh": fresh,
            "keep_corrected": xp.where(fresh, 0.0, before),
            "correct": xp.where(fresh[:, None], 0.0, correct),
            "keep": keep,
            "predict": self._weights(grid, lam, order, corrector=False),
        }

    def _weights(self, grid: Grid, lam: Any, order: Any, *, corrector: bool) -> Any:
        """Factors of D per step: (N, solver_order) at its start and past levels; a corrector's first at its end."""
        xp, n, i = grid.xp, grid.steps, np.arange(grid.steps)
        data = grid.alpha[1:] - grid.alpha[:-1] * grid.sigma[1:] / grid.sigma[:-1]
        step = lam[1:] - lam[:-1]
        inner = (grid.alpha[:-1] > 0) & (grid.sigma[1:] > 0) & (step != 0)
        h = xp.where(inner, step, 1.0)
        single = xp.where(inner & (self.form == "bh1"), grid.alpha[1:] * h, data) / 2.0
        moments = [-xp.expm1(-h)]
        for k in range(1, self.solver_order + 1):
            moments.append(1.0 - k * moments[-1] / h)
        base = 1 if corrector else 0  # place of the step's start among the levels, newest first
        weights = xp.zeros((n, base + self.solver_order))
        for p in range(1, self.solver_order + 1):
            nodes = {
                base + k: xp.where(order == p, (lam[np.maximum(i - k, 0)] - lam[:-1]) / h, -k) for k in range(1, p)
            }
            if corrector:
                nodes[0] = xp.ones(n)
            if len(nodes) <= 1:
                share = {k: single / r for k, r in nodes.items()}
            else:
                r = xp.stack(list(nodes.values()), axis=1)
                powers = xp.stack([r**k for k in range(len(nodes))], axis=1)
                target = xp.stack(moments[1 : len(nodes) + 1], axis=1)[..., None]
                c = grid.alpha[1:, None] * xp.linalg.solve(powers, target)[..., 0]
                share = dict(zip(nodes, (c / r).T, strict=True))
            share[base] = data - sum(share.values())
            columns = [share.get(k, xp.zeros(n)) for k in range(base + self.solver_order)]
            weights = xp.where((order == p)[:, None], xp.stack(columns, axis=1), weights)
        return weights
