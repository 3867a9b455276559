"""The reverse SDE of interpolants with a freely chosen diffusion coefficient (Ma et al. 2024, SiT, sec. 2.4)."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from gen.diffusion.transport import DiffusionForm, diffusion
from gen.errors import GenError
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, Row, SolverState, interleave

__all__ = ["EulerMaruyama"]


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
    """dx = (velocity - w score) dt + sqrt(2 w) dB from noise to data; every w(t) >= 0 gives the same marginals.

    A step of length h: x' = x + h b(x, t) + sqrt(2 w |h|) z with b = velocity - w score, h < 0. With `second_order` the
    noise comes first and Heun's method with b follows. The last step of the grid, where the score is steep, adds no
    noise: see `last`. SiT's grid is ``Uniform(end=0.04)``.

    Attributes:
      form, norm: the coefficient w(t), see `gen.diffusion.transport.diffusion`.
      last: ``mean``: one Euler step with b; ``euler``: with the velocity alone; ``tweedie``: the denoised prediction;
        ``none``: a step like the others.
      second_order: SiT's stochastic Heun method.

    Raises GenError for a negative norm.
    """

    form: DiffusionForm = "sigma"
    norm: float = 1.0
    last: Literal["mean", "tweedie", "euler", "none"] = "mean"
    second_order: bool = False

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.norm < 0.0:
            raise GenError(f"euler-maruyama has norm {self.norm:g}; expected 0 (the probability flow) or more")

    def start(self, problem: Problem) -> SolverState:
        """Starts with a memory of x at the step's start and of the drift of the step's first call."""
        return SolverState(problem.x, problem.carry, (problem.x, jnp.zeros_like(problem.x)))

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says. The score is evaluated at every time but the grid's last (with last "none",
        there too).
        """
        (base, slope), x = state.memory, state.x
        if self.second_order:
            base = base + row["kick"] * problem.noise(row["i"])
            x = jnp.where(row["first"], base, x)
        prediction, carry = problem.predict(x, row, state.carry)
        drift = prediction.velocity
        drift = jnp.where(row["w"] > 0, drift - row["w"] * prediction.score, drift)
        x = base + row["h"] * (row["old"] * slope + row["new"] * drift)
        if not self.second_order:
            x = x + row["kick"] * problem.noise(row["i"])
        if self.last == "tweedie":
            x = jnp.where(row["jump"] > 0, prediction.denoised, x)
        return SolverState(x, carry, (jnp.where(row["last"], x, base), drift))

    def rows(self, grid: Grid) -> Row:
        """Per network call: time, step length, weights of the two slopes, w, noise scale, jump to the prediction.

        One call a step; with `second_order` two, except for a special last step. Raises GenError where w is infinite.
        """
        xp, n = grid.xp, grid.steps
        t, ends, h = grid.times[:-1], grid.times[1:], grid.times[1:] - grid.times[:-1]
        final = np.arange(n) == n - 1 if self.last != "none" else np.zeros(n, bool)
        with np.errstate(divide="ignore"):
            w = diffusion(grid.process, t, self.form, self.norm)
        if xp is np and not np.isfinite(w).all():
            raise GenError(
                f"euler-maruyama with form {self.form} is infinite at pure noise; start the grid below time 1"
            )
        zeros, ones = np.zeros(n), np.ones(n)
        first = {
            "t": t,
            "h": h,
            "old": zeros,
            "new": ones,
            "w": xp.where(final, 0.0, w) if self.last == "euler" else w,
            "kick": xp.where(final, 0.0, xp.sqrt(2.0 * w * xp.abs(h))),
            "jump": final,
        }
        if not self.second_order:
            return first
        with np.errstate(divide="ignore", invalid="ignore"):
            w_end = xp.where(final, 0.0, diffusion(grid.process, xp.where(final, t, ends), self.form, self.norm))
        halves = {"old": 0.5 * ones, "new": 0.5 * ones}
        second = first | halves | {"t": ends, "w": w_end, "kick": zeros, "jump": zeros}
        return interleave(first, second, drop=int(final[-1]))
