"""Solvers that look at one step alone: Euler, Heun and EDM's sampler, DDIM, DDPM's ancestral sampler, renoising.

No solver here evaluates the network at clean data. Notation: a, s are alpha and sigma at the step's start, primes (here
``a_next``, ``s_next``) at its end; D = E[x | x_t] is ``prediction.denoised``; z is fresh noise.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.sampling.grids import Grid, snap
from gen.sampling.integrate import Problem, Row, SolverState, interleave

__all__ = ["DDIM", "Ancestral", "EDMStochastic", "Euler", "Heun", "Renoise"]


class _OnePoint:
    """The start of a solver that keeps nothing but x."""

    def start(self, problem: Problem) -> SolverState:
        """See `Solver`."""
        return SolverState(problem.x, problem.carry)


@dataclasses.dataclass(frozen=True)
class Euler(_OnePoint):
    """Euler on the probability-flow ODE: x' = x + (t' - t) velocity(x, t)."""

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        return {"t": grid.times[:-1], "h": grid.times[1:] - grid.times[:-1]}

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        prediction, carry = problem.predict(state.x, row, state.carry)
        return SolverState(state.x + row["h"] * prediction.velocity, carry)


class _Stages:
    """Rows of Euler's or of a two-stage Runge-Kutta method: x' = base + h (old * first slope + new * this slope)."""

    def start(self, problem: Problem) -> SolverState:
        """The memory holds x at the step's start and the slope of the step's first call."""
        return SolverState(problem.x, problem.carry, (problem.x, jnp.zeros_like(problem.x)))

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """See `Solver`."""
        base, slope = state.memory
        prediction, carry = problem.predict(state.x, row, state.carry)
        velocity = prediction.velocity
        x = base + row["h"] * (row["old"] * slope + row["new"] * velocity)
        return SolverState(x, carry, (jnp.where(row["last"], x, base), velocity))


def _two_stages(grid: Grid, starts: Any, alpha: float) -> dict[str, Any]:
    """Two calls a step, one in the last, which is Euler's.

    The second call is made at t + alpha h and weighs 1 / (2 alpha) (Karras et al. 2022, algorithm 3 of the appendix).

    Args:
      starts: (N,) times from which the steps start.
    """
    xp, n, h = grid.xp, grid.steps, grid.times[1:] - starts
    ones, final = xp.ones(n), xp.arange(n) == n - 1
    predict = {"t": starts, "h": h, "old": xp.zeros(n), "new": xp.where(final, 1.0, alpha)}
    correct = {"t": starts + alpha * h, "h": h, "old": ones - 0.5 / alpha, "new": ones * 0.5 / alpha}
    return interleave(predict, correct, drop=1)


@dataclasses.dataclass(frozen=True)
class Heun(_Stages):
    """Heun's second-order method on the probability-flow ODE; the last step is Euler (arXiv 2206.00364, alg. 1).

    The last step never evaluates the network at the data end, where noise predictions are undefined.
    """

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        return _two_stages(grid, grid.times[:-1], alpha=1.0)


@dataclasses.dataclass(frozen=True)
class EDMStochastic(_Stages):
    """EDM's sampler with churn (arXiv 2206.00364, alg. 2) on any process (their appendix C generalisation).

    Each step first raises the noise level sigma / alpha by the factor 1 + gamma with fresh noise, where
    gamma = min(s_churn / N, sqrt(2) - 1) if the level is within [s_min, s_max] and 0 elsewhere, then steps by
    Heun's method (its alpha generalisation) or Euler's.

    Attributes:
      s_churn: overall amount of stochasticity; 0 is the deterministic sampler.
      s_min, s_max: range of noise levels that are churned; None for no upper limit.
      s_noise: standard deviation of the fresh noise.
      second_order: Heun's correction, as opposed to plain Euler.
      alpha: place of the second evaluation within the step, in (0, 1]; 1 is Heun's method.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float | None = None
    s_noise: float = 1.0
    second_order: bool = True
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise GenError(f"edm-stochastic has alpha {self.alpha:g}; expected a number in (0, 1], 1 for Heun's method")
        if self.s_churn < 0.0:
            raise GenError(f"edm-stochastic has s_churn {self.s_churn:g}; expected 0 (none) or more")

    @property
    def order(self) -> int:
        """Gives the order of convergence: 2 with the correction, else 1."""
        return 2 if self.second_order else 1

    @property
    def stochastic(self) -> bool:
        """Tells whether there is churn."""
        return self.s_churn > 0.0

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        hats, grow, spread = self._churn(grid)
        if self.second_order:
            rows = _two_stages(grid, hats, self.alpha)
        else:
            zeros = grid.xp.zeros(grid.steps)
            rows = interleave({"t": hats, "h": grid.times[1:] - hats, "old": zeros, "new": zeros + 1.0})
        return rows | {"grow": grow[rows["i"]], "spread": spread[rows["i"]]}

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        if self.stochastic:
            base, slope = state.memory
            churned = row["grow"] * base + row["spread"] * problem.noise(row["i"])
            base = jnp.where(row["first"], churned, base)
            state = SolverState(jnp.where(row["first"], base, state.x), state.carry, (base, slope))
        return super().step(problem, state, row)

    def _churn(self, grid: Grid) -> tuple[Any, Any, Any]:
        """Per step: the raised time, the factor on x and the scale of the fresh noise that lead there."""
        xp, times, a = grid.xp, grid.times[:-1], grid.alpha[:-1]
        if not self.stochastic:
            return times, xp.ones(grid.steps), xp.zeros(grid.steps)
        with np.errstate(divide="ignore", invalid="ignore"):
            level = grid.sigma[:-1] / a
            within = (level >= self.s_min) & (level <= (xp.inf if self.s_max is None else self.s_max)) & (a > 0)
            raised = snap(grid.process, (1.0 + min(self.s_churn / grid.steps, 2**0.5 - 1)) * level, grid.levels)
            hats = xp.where(within, raised, times)
            a_hat = grid.process.alpha(hats)
            added = (grid.process.sigma(hats) / a_hat) ** 2 - level**2
            grow = xp.where(within, a_hat / a, 1.0)
            spread = xp.where(within, self.s_noise * a_hat * xp.sqrt(xp.maximum(added, 0.0)), 0.0)
        return hats, grow, spread


@dataclasses.dataclass(frozen=True)
class DDIM(_OnePoint):
    """DDIM in alpha / sigma form (arXiv 2010.02502, eq. 12), for any process.

    x' = a' D + sqrt(s'^2 - tau^2) eps + tau z with tau = eta s' sqrt(1 - (a s' / (a' s))^2). On a DDPM chain
    eta = 1 is the ancestral sampler with the small variance. With eta = 0 the grid may run backwards (encoding).

    Attributes:
      eta: share of the ancestral noise, in [0, 1]; 0 is deterministic.

    Raises GenError for an eta outside [0, 1].
    """

    eta: float = 0.0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise GenError(f"ddim has eta {self.eta:g}; expected a number between 0 (deterministic) and 1 (ancestral)")

    @property
    def stochastic(self) -> bool:
        """Tells whether eta > 0."""
        return self.eta > 0.0

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        xp, (a, s) = grid.xp, (grid.alpha, grid.sigma)
        a_next, s_next = a[1:], s[1:]
        tau = xp.zeros(grid.steps)
        if self.stochastic:
            tau = self.eta * s_next * xp.sqrt(xp.maximum(1.0 - (a[:-1] * s_next / (a_next * s[:-1])) ** 2, 0.0))
        direction = xp.sqrt(xp.maximum(s_next**2 - tau**2, 0.0))
        return {"t": grid.times[:-1], "data": a_next, "direction": direction, "tau": tau}

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        prediction, carry = problem.predict(state.x, row, state.carry)
        x = row["data"] * prediction.denoised + row["direction"] * prediction.eps
        if self.stochastic:
            x = x + row["tau"] * problem.noise(row["i"])
        return SolverState(x, carry)


@dataclasses.dataclass(frozen=True)
class Renoise(_OnePoint):
    """x' = alpha' D + sigma' z: the data prediction, noised afresh to the next time (arXiv 2303.01469, alg. 1).

    Multistep sampling of consistency models and few-step students (Song et al. 2023, alg. 1), whose D is a sample.
    With the mean prediction of a diffusion model the result is too smooth, however small the steps.
    """

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        return {"t": grid.times[:-1], "data": grid.alpha[1:], "noise": grid.sigma[1:]}

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says."""
        prediction, carry = problem.predict(state.x, row, state.carry)
        return SolverState(row["data"] * prediction.denoised + row["noise"] * problem.noise(row["i"]), carry)


@dataclasses.dataclass(frozen=True)
class Ancestral(_OnePoint):
    """DDPM's ancestral sampler (arXiv 2006.11239, alg. 2) in alpha / sigma form, for any process and spacing.

    x' = mean + sqrt(variance) z; the mean and the small variance are those of q(x' | x_t, x = D). With
    r = a / a' and b = s^2 - r^2 s'^2 (beta of the spaced chain): mean = a' b / s^2 D + r s'^2 / s^2 x_t.
    A gradient that guidance leaves in ``prediction.extra["mean_gradient"]`` shifts the mean by variance times it.

    Attributes:
      variance: ``small`` (posterior), ``large`` (b), or ``learned``: log variance between the two by the
        network's ``extra["variance"]`` in [-1, 1] (Nichol & Dhariwal 2021, eq. 15).
    """

    variance: Literal["small", "large", "learned"] = "small"

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def rows(self, grid: Grid) -> Row:
        """Does what `Solver.rows` says."""
        xp, (a, s) = grid.xp, (grid.alpha, grid.sigma)
        a_next, s_next, a, s = a[1:], s[1:], a[:-1], s[:-1]
        ratio = a / a_next
        beta = s**2 - (ratio * s_next) ** 2
        small = beta * (s_next / s) ** 2
        # the step to clean data has no posterior variance; its logarithm is the previous step's
        clipped = xp.where(small > 0, small, xp.concatenate([beta[:1], small[:-1]]))
        return {
            "t": grid.times[:-1],
            "data": a_next * beta / s**2,
            "keep": ratio * (s_next / s) ** 2,
            "small": small,
            "large": xp.where(small > 0, beta, clipped),
            "log_small": xp.log(clipped),
            "log_large": xp.log(beta),
            "live": s_next > 0,
        }

    def step(self, problem: Problem, state: SolverState, row: Row) -> SolverState:
        """Does what `Solver.step` says. Raises GenError where the network gives no learned variance and that was asked
        for.
        """
        prediction, carry = problem.predict(state.x, row, state.carry)
        mean = row["data"] * prediction.denoised + row["keep"] * state.x
        variance = row[self.variance] if self.variance != "learned" else self._learned(prediction, row)
        if "mean_gradient" in prediction.extra:
            mean = mean + variance * prediction.extra["mean_gradient"]
        return SolverState(mean + row["live"] * jnp.sqrt(variance) * problem.noise(row["i"]), carry)

    def _learned(self, prediction: Any, row: Row) -> jax.Array:
        if "variance" not in prediction.extra:
            raise GenError("this network predicts no variance; use the ancestral solver with variance small or large")
        share = 0.5 * (prediction.extra["variance"] + 1.0)
        return jnp.exp(share * row["log_large"] + (1.0 - share) * row["log_small"])
