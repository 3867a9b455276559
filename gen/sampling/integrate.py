"""What all solvers share: the problem that they solve, and the one scan that runs their steps.

A solver is a frozen dataclass of its options that reads like its paper's algorithm box. `Solver.rows` makes the
coefficients on the host in float64, one row for each network call; `Solver.start` gives the state before the first
row; `Solver.step` takes the state over one row. The network thus stands at one place in the scan and is compiled once.
A method of several calls a step has as many rows for it (see `interleave`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.prediction import Denoise, Prediction
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling.grids import Grid
from gen.sampling.noise import Noise

__all__ = ["Problem", "Row", "Solver", "SolverState", "integrate", "interleave", "nfe", "states", "weighted"]

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The integration of a denoiser from ``grid.times[0]`` to the grid's last time.

    Attributes:
      denoise: a denoiser with parameters bound, guided or not.
      x: (B, ...) float32 (or float64), the state at ``grid.times[0]``; for samples noise scaled by
        `gen.sampling.noise.prior`.
      grid: the times of the steps.
      noise: noise(i) is step i's standard normal noise, shaped like x; deterministic solvers do not call it.
      cond: conditioning arrays with leading axis B.
      carry: the initial state of the guidance.
    """

    denoise: Denoise
    x: jax.Array
    grid: Grid
    noise: Noise
    cond: Cond
    carry: Any = ()

    def predict(self, x: jax.Array, row: Row, carry: Any) -> tuple[Prediction, Any]:
        """Gives what the network says of `x` at the row's time, and the guidance's state after the call."""
        return self.denoise(x, row["t"], self.cond, row["i"], carry)


class SolverState(NamedTuple):
    """A solver's state between two rows.

    Attributes:
      x: (B, ...) the point that the network sees next; after the last row of a step, the state at the step's end.
      carry: the state of the guidance.
      memory: what else the solver keeps.
    """

    x: jax.Array
    carry: Any
    memory: Any = ()


class Solver(Protocol):
    """See the module docstring.

    Attributes:
      order: the stated order of convergence to the probability flow (where deterministic).
    """

    @property
    def order(self) -> int: ...

    @property
    def stochastic(self) -> bool:
        """Tells whether noise enters after the start."""
        ...

    def rows(self, grid: Grid) -> Row:
        """Columns by name whose leading axis runs over the network calls.

        ``t`` is the time of the call. ``i`` is its step, rising from 0, as NumPy integers; without it every step has
        one call. The other columns are the method's coefficients. Raises GenError for a grid that does not suit.
        """
        ...

    def start(self, problem: Problem) -> SolverState:
        """Gives the state before the first row."""
        ...

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Gives the state after a row: one call of ``problem.predict`` and what the method makes of it.

        Args:
          row: one entry of each column, in x's dtype, the step ``i`` (int32), and whether the row is the ``first`` and
            the ``last`` of its step (bool).
        """
        ...


def nfe(solver: Solver, grid: Grid) -> int:
    """Gives the network calls per sample (a guided call on a doubled batch counts once)."""
    return len(solver.rows(grid)["t"])


def integrate(solver: Solver, problem: Problem) -> jax.Array:
    """Gives x at the grid's last time, (B, ...)."""
    state, _, _ = _scan(solver, problem, every=False)
    return state.x


def states(solver: Solver, problem: Problem) -> SolverState:
    """Gives the states after each step, stacked: ``states(...).x`` is the trajectory (N, B, ...)."""
    _, rows, ends = _scan(solver, problem, every=True)
    return jax.tree.map(lambda v: v[ends], rows)


def _scan(solver: Solver, problem: Problem, *, every: bool) -> tuple[SolverState, Any, np.ndarray]:
    """(last state, states after each row or None, the places of the rows that end a step)."""
    for name, value in problem.grid.extras.items():
        if len(value) != problem.grid.steps:
            raise GenError(
                f"the grid's '{name}' is for {len(value)} steps; expected one entry for each of {problem.grid.steps}"
            )
    columns = dict(solver.rows(problem.grid))
    i = np.asarray(columns.pop("i", np.arange(problem.grid.steps)))
    passed = np.diff(i) > 0
    first, last = np.append(True, passed), np.append(passed, True)
    rows = {k: jnp.asarray(v, problem.x.dtype) for k, v in columns.items()}
    rows |= {"i": jnp.asarray(i, jnp.int32), "first": jnp.asarray(first), "last": jnp.asarray(last)}

    def step(state: SolverState, row: Row) -> tuple[SolverState, SolverState | None]:
        state = solver.step(problem, state, row)
        return state, state if every else None

    state, found = jax.lax.scan(step, solver.start(problem), rows)
    return state, found, np.flatnonzero(last)


def interleave(*stages: Row, drop: int = 0) -> dict[str, Any]:
    """Gives rows of a method that calls the network several times a step.

    Args:
      stages: for each call of a step its columns, whose leading axis runs over the steps.
      drop: how many calls the last step leaves out.
    """
    traced = any(isinstance(v, jax.Array) for stage in stages for v in stage.values())
    xp = jnp if traced else np
    kept = len(stages) * len(stages[0]["t"]) - drop
    rows = {k: xp.stack([stage[k] for stage in stages], axis=1) for k in stages[0]}
    rows = {k: v.reshape(-1, *v.shape[2:])[:kept] for k, v in rows.items()}
    return rows | {"i": np.arange(kept) // len(stages)}


def weighted(weights: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """Gives the sum of `values`, each times its entry of `weights` (K,)."""
    return sum((weights[k] * v for k, v in enumerate(values)), jnp.zeros_like(values[0]))
