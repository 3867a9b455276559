"""Solvers: pure functions over one `lax.scan`, each short enough to read as its paper's algorithm box.

A solver is a frozen dataclass of its options; calling it integrates from ``grid.times[0]`` to the last time.
``noise(i)`` gives step i's noise, shaped like x, from per-sample keys (see `per_sample_noise`) or a fixture's.
Coefficients are made on the host in float64 and used in x's dtype. The network is called at one place in the
scan, so that it is compiled once, and never at clean data.

Notation: a, s are alpha and sigma at the step's start, primes (here ``a_next``, ``s_next``) at its end;
D = E[x | x_t] is ``prediction.denoised``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.prediction import Denoise
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling.grids import Grid, snap

__all__ = [
    "DDIM",
    "Ancestral",
    "EDMStochastic",
    "Euler",
    "Heun",
    "Noise",
    "Renoise",
    "Solver",
    "per_sample_noise",
    "prior",
    "step_rows",
    "unit_noise",
]

Noise = Callable[[Any], jax.Array]


class Solver(Protocol):
    """See the module docstring.

    Attributes:
      order: the stated order of convergence to the probability flow (where deterministic).
    """

    @property
    def order(self) -> int: ...

    @property
    def stochastic(self) -> bool:
        """Whether noise enters after the start."""
        ...

    def nfe(self, grid: Grid) -> int:
        """Network calls per sample (a guided call on a doubled batch counts once)."""
        ...

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
        """x at the last time: (B, ...); with `trajectory` the states after each step, (N, B, ...).

        Args:
          denoise: a denoiser with parameters bound, guided or not.
          x: (B, ...) float32 (or float64), the state at ``grid.times[0]`` (prior noise scaled by `prior`).
          noise: noise(i) is step i's standard normal noise, shaped like x; not called by deterministic solvers.
          cond: conditioning arrays with leading axis B.
          carry: initial guidance state.
        """
        ...


def per_sample_noise(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """noise(i) = standard normals (B, *shape) that depend on each sample's key and on i alone.

    Args:
      keys: (B,) typed PRNG keys, one per sample.
    """
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def unit_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The standard normals (B, *shape) from which sample i starts, from its key alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def prior(grid: Grid, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The solver's starting point: sigma(times[0]) times `unit_noise`."""
    return jnp.asarray(grid.sigma[0], jnp.float32) * unit_noise(keys, shape)


def step_rows(grid: Grid, x: jax.Array, **columns: Any) -> dict[str, jax.Array]:
    """Per-step scan inputs: the step index ``i``, the time ``t`` of its start and `columns`, in x's dtype."""
    values = {"t": grid.times[:-1], **columns}
    return {"i": jnp.arange(grid.steps)} | {k: jnp.asarray(v, x.dtype) for k, v in values.items()}


def _stages(
    denoise: Denoise,
    x: jax.Array,
    grid: Grid,
    hats: Any,
    kick: Callable[[jax.Array, Any], jax.Array] | None,
    cond: Cond,
    carry: Any,
    *,
    alpha: float | None,
    trajectory: bool,
) -> jax.Array:
    """Euler (`alpha` None) or a two-stage Runge-Kutta method on the probability flow, Euler in the last step.

    The second stage lies at t + alpha h with weight 1 / (2 alpha): 1 is Heun's method (Karras et al. 2022, alg. 3).
    Stages are rows of one scan: x' = x + h (old * first slope + new * this slope).

    Args:
      hats: (N,) times from which the steps start.
      kick: applied to x at the start of each step, ``(x, i) -> x`` at time hats[i]; None for none.
    """
    xp, n = grid.xp, grid.steps
    h = grid.times[1:] - hats
    zeros, ones = xp.zeros(n), xp.ones(n)
    if alpha is None:
        rows = {"t": hats, "h": h, "old": zeros, "new": ones, "first": ones, "last": ones}
    else:
        final = xp.arange(n) == n - 1
        predict = {
            "t": hats,
            "h": h,
            "old": zeros,
            "new": xp.where(final, 1.0, alpha),
            "first": ones,
            "last": 1.0 * final,
        }
        correct = {
            "t": hats + alpha * h,
            "h": h,
            "old": ones - 0.5 / alpha,
            "new": ones * 0.5 / alpha,
            "first": zeros,
            "last": ones,
        }
        rows = {k: xp.stack([predict[k], correct[k]], axis=1).reshape(-1)[:-1] for k in predict}
    stages = 1 if alpha is None else 2
    columns = {k: jnp.asarray(v, x.dtype) for k, v in rows.items()}
    columns["i"] = jnp.repeat(jnp.arange(n), stages)[: len(rows["t"])]

    def stage(state: Any, row: Any) -> Any:
        base, point, slope, carry = state
        if kick is not None:
            base = jnp.where(row["first"] > 0, kick(base, row["i"]), base)
            point = jnp.where(row["first"] > 0, base, point)
        prediction, carry = denoise(point, row["t"], cond, row["i"], carry)
        velocity = prediction.velocity
        point = base + row["h"] * (row["old"] * slope + row["new"] * velocity)
        base = jnp.where(row["last"] > 0, point, base)
        return (base, point, velocity, carry), base if trajectory else None

    start: Any = (x, x, jnp.zeros_like(x), carry)
    (x, *_), states = jax.lax.scan(stage, start, columns)
    if not trajectory:
        return x
    return states if alpha is None else jnp.concatenate([states[1::2], states[-1:]])


@dataclasses.dataclass(frozen=True)
class Euler:
    """Euler on the probability-flow ODE: x' = x + (t' - t) velocity(x, t)."""

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def nfe(self, grid: Grid) -> int:
        """One call a step."""
        return grid.steps

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

        def step(state: Any, row: Any) -> Any:
            x, carry = state
            prediction, carry = denoise(x, row["t"], cond, row["i"], carry)
            x = x + row["h"] * prediction.velocity
            return (x, carry), x if trajectory else None

        rows = step_rows(grid, x, h=grid.times[1:] - grid.times[:-1])
        (x, _), states = jax.lax.scan(step, (x, carry), rows)
        return states if trajectory else x


@dataclasses.dataclass(frozen=True)
class Heun:
    """Heun's second-order method on the probability-flow ODE; the last step is Euler (Karras et al. 2022, alg. 1).

    The last step never evaluates the network at the data end, where noise predictions are undefined.
    """

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def nfe(self, grid: Grid) -> int:
        """Two calls a step, one in the last."""
        return 2 * grid.steps - 1

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
        return _stages(denoise, x, grid, grid.times[:-1], None, cond, carry, alpha=1.0, trajectory=trajectory)


@dataclasses.dataclass(frozen=True)
class EDMStochastic:
    """EDM's sampler with churn (Karras et al. 2022, alg. 2) on any process (their appendix C generalisation).

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
        """2 with the correction, else 1."""
        return 2 if self.second_order else 1

    @property
    def stochastic(self) -> bool:
        """Whether there is churn."""
        return self.s_churn > 0.0

    def nfe(self, grid: Grid) -> int:
        """Two calls a step, one in the last; one a step for Euler."""
        return 2 * grid.steps - 1 if self.second_order else grid.steps

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
        xp, hats, kick = grid.xp, grid.times[:-1], None
        if self.stochastic:
            hats, *scales = self._churn(grid, xp)
            grow, spread = (jnp.asarray(v, x.dtype) for v in scales)

            def kick(x: jax.Array, i: Any) -> jax.Array:
                return grow[i] * x + spread[i] * noise(i)

        alpha = self.alpha if self.second_order else None
        return _stages(denoise, x, grid, hats, kick, cond, carry, alpha=alpha, trajectory=trajectory)

    def _churn(self, grid: Grid, xp: Any) -> tuple[Any, Any, Any]:
        """Per step: the raised time, the factor on x and the scale of the fresh noise that lead there."""
        times, a = grid.times[:-1], grid.alpha[:-1]
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
class DDIM:
    """DDIM in alpha / sigma form (Song et al. 2021, eq. 12), for any process.

    x' = a' D + sqrt(s'^2 - tau^2) eps + tau z with tau = eta s' sqrt(1 - (a s' / (a' s))^2). On a DDPM chain
    eta = 1 is the ancestral sampler with the small variance. With eta = 0 the grid may run backwards (encoding).

    Attributes:
      eta: share of the ancestral noise, in [0, 1]; 0 is deterministic.
    """

    eta: float = 0.0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise GenError(f"ddim has eta {self.eta:g}; expected a number between 0 (deterministic) and 1 (ancestral)")

    @property
    def stochastic(self) -> bool:
        """Whether eta > 0."""
        return self.eta > 0.0

    def nfe(self, grid: Grid) -> int:
        """One call a step."""
        return grid.steps

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
        xp, (a, s) = grid.xp, (grid.alpha, grid.sigma)
        a_next, s_next = a[1:], s[1:]
        tau = xp.zeros(grid.steps)
        if self.stochastic:
            tau = self.eta * s_next * xp.sqrt(xp.maximum(1.0 - (a[:-1] * s_next / (a_next * s[:-1])) ** 2, 0.0))
        direction = xp.sqrt(xp.maximum(s_next**2 - tau**2, 0.0))

        def step(state: Any, row: Any) -> Any:
            x, carry = state
            prediction, carry = denoise(x, row["t"], cond, row["i"], carry)
            x = row["data"] * prediction.denoised + row["direction"] * prediction.eps
            if self.stochastic:
                x = x + row["tau"] * noise(row["i"])
            return (x, carry), x if trajectory else None

        rows = step_rows(grid, x, data=a_next, direction=direction, tau=tau)
        (x, _), states = jax.lax.scan(step, (x, carry), rows)
        return states if trajectory else x


@dataclasses.dataclass(frozen=True)
class Renoise:
    """x' = a' D + s' z: the data prediction, noised afresh to the next time.

    Multistep sampling of consistency models and few-step students (Song et al. 2023, alg. 1), whose D is a sample.
    With the mean prediction of a diffusion model the result is too smooth, however small the steps.
    """

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def nfe(self, grid: Grid) -> int:
        """One call a step."""
        return grid.steps

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

        def step(state: Any, row: Any) -> Any:
            x, carry = state
            prediction, carry = denoise(x, row["t"], cond, row["i"], carry)
            x = row["data"] * prediction.denoised + row["noise"] * noise(row["i"])
            return (x, carry), x if trajectory else None

        rows = step_rows(grid, x, data=grid.alpha[1:], noise=grid.sigma[1:])
        (x, _), states = jax.lax.scan(step, (x, carry), rows)
        return states if trajectory else x


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """DDPM's ancestral sampler (Ho et al. 2020, alg. 2) in alpha / sigma form, for any process and spacing.

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

    def nfe(self, grid: Grid) -> int:
        """One call a step."""
        return grid.steps

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
        """See `Solver`. Raises GenError where the network gives no learned variance and that was asked for."""
        xp, (a, s) = grid.xp, (grid.alpha, grid.sigma)
        a_next, s_next, a, s = a[1:], s[1:], a[:-1], s[:-1]
        ratio = a / a_next
        beta = s**2 - (ratio * s_next) ** 2
        small = beta * (s_next / s) ** 2
        # the step to clean data has no posterior variance; its logarithm is the previous step's
        clipped = xp.where(small > 0, small, xp.concatenate([beta[:1], small[:-1]]))
        large = xp.where(small > 0, beta, clipped)

        def step(state: Any, row: Any) -> Any:
            x, carry = state
            prediction, carry = denoise(x, row["t"], cond, row["i"], carry)
            mean = row["data"] * prediction.denoised + row["keep"] * x
            variance = row[self.variance] if self.variance != "learned" else self._learned(prediction, row)
            if "mean_gradient" in prediction.extra:
                mean = mean + variance * prediction.extra["mean_gradient"]
            x = mean + row["live"] * jnp.sqrt(variance) * noise(row["i"])
            return (x, carry), x if trajectory else None

        rows = step_rows(
            grid,
            x,
            data=a_next * beta / s**2,
            keep=ratio * (s_next / s) ** 2,
            small=small,
            large=large,
            log_small=xp.log(clipped),
            log_large=xp.log(beta),
            live=s_next > 0,
        )
        (x, _), states = jax.lax.scan(step, (x, carry), rows)
        return states if trajectory else x

    def _learned(self, prediction: Any, row: Any) -> jax.Array:
        if "variance" not in prediction.extra:
            raise GenError("this network predicts no variance; use the ancestral solver with variance small or large")
        share = 0.5 * (prediction.extra["variance"] + 1.0)
        return jnp.exp(share * row["log_large"] + (1.0 - share) * row["log_small"])
