"""Solvers: pure functions over one `lax.scan`, each short enough to read as its paper's algorithm box.

A solver is a frozen dataclass of its options; calling it integrates from ``grid.times[0]`` to the last time.
``noise(i)`` gives step i's noise, shaped like x, from per-sample keys (see `per_sample_noise`) or a fixture's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Denoise
from gen.nn.network import Cond
from gen.sampling.grids import Grid

__all__ = ["Euler", "Heun", "Noise", "Solver", "per_sample_noise", "prior"]

Noise = Callable[[Any], jax.Array]


class Solver(Protocol):
    """See the module docstring.

    Attributes:
      order: the stated order of convergence.
    """

    order: ClassVar[int]

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
          x: (B, ...) float32, the state at ``grid.times[0]`` (prior noise scaled by `prior`).
          carry: initial guidance state.
        """
        ...


def per_sample_noise(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """noise(i) = standard normals (B, *shape) that depend on each sample's key and on i alone.

    Args:
      keys: (B,) typed PRNG keys, one per sample.
    """
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def prior(process: Any, grid: Grid, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The solver's starting point: sigma(times[0]) times standard normals (B, *shape) from per-sample keys."""
    scale = jnp.float32(process.sigma(float(grid.times[0])))
    return scale * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _steps(grid: Grid) -> tuple[jax.Array, jax.Array, jax.Array]:
    times = jnp.asarray(grid.times, jnp.float32)
    return jnp.arange(grid.steps), times[:-1], times[1:]


@dataclasses.dataclass(frozen=True)
class Euler:
    """Euler on the probability-flow ODE: x' = x + (t' - t) velocity(x, t)."""

    order: ClassVar[int] = 1

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

        def step(state: Any, inputs: Any) -> Any:
            (x, carry), (i, t, t_next) = state, inputs
            prediction, carry = denoise(x, t, cond, i, carry)
            x = x + (t_next - t) * prediction.velocity
            return (x, carry), x if trajectory else None

        (x, _), states = jax.lax.scan(step, (x, carry), _steps(grid))
        return states if trajectory else x


@dataclasses.dataclass(frozen=True)
class Heun:
    """Heun's second-order method on the probability-flow ODE; the last step is Euler (Karras et al. 2022).

    The last step never evaluates the network at the data end, where noise predictions are undefined.
    """

    order: ClassVar[int] = 2

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

        def step(state: Any, inputs: Any) -> Any:
            (x, carry), (i, t, t_next) = state, inputs
            first, carry = denoise(x, t, cond, i, carry)
            euler = x + (t_next - t) * first.velocity
            second, carry = denoise(euler, t_next, cond, i, carry)
            x = x + (t_next - t) * 0.5 * (first.velocity + second.velocity)
            return (x, carry), x if trajectory else None

        i, t, t_next = _steps(grid)
        (x, carry), states = jax.lax.scan(step, (x, carry), (i[:-1], t[:-1], t_next[:-1]))
        last, _ = denoise(x, t[-1], cond, i[-1], carry)
        x = x + (t_next[-1] - t[-1]) * last.velocity
        return jnp.concatenate([states, x[None]]) if trajectory else x
