"""Adaptive integration of the probability flow: Dormand-Prince 5(4) from diffrax.

A sibling of the solvers whose number of network calls is measured, not stated. Every sample chooses its own steps, so
that it does not depend on those integrated beside it.
"""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.denoiser import Denoise
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling import likelihood
from gen.sampling.grids import Grid
from gen.sampling.solvers import Noise

__all__ = ["Dopri5"]

STAGES = 6  # network calls of an attempted step; the seventh stage is the next step's first


@dataclasses.dataclass(frozen=True)
class Dopri5:
    """Dormand and Prince's method of order 5 with adaptive steps (torchdiffeq's and SciPy's ``dopri5`` / ``RK45``).

    Guidance acts as in a solver at step 0, without memory from call to call: no momentum, and intervals by time.

    Attributes:
      rtol, atol: relative and absolute tolerance of a step's error, root mean square over a sample.
      max_steps: attempted steps after which a sample is given up: its entries are NaN.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096

    def __post_init__(self) -> None:
        if not (self.rtol > 0.0 and self.atol > 0.0 and self.max_steps > 0):
            raise GenError("dopri5 needs positive rtol, atol and max_steps")

    def integrate(
        self, denoise: Denoise, x: jax.Array, process: Any, start: float, end: float, cond: Cond
    ) -> tuple[jax.Array, jax.Array]:
        """The probability flow from time `start` to `end`: sampling downwards, inversion (encoding) upwards.

        Args:
          denoise: a denoiser with parameters bound, guided or not; its velocity must be defined at both ends
            (see `gen.diffusion.transport.interval`).
          x: (B, ...) state at `start`.
          cond: conditioning arrays with leading axis B.

        Returns:
          x at `end` and the network calls of each sample, (B,) int32.
        """
        grid = Grid(_ends(process, start, end), process)
        out, calls = jax.vmap(lambda x, cond: self._solve(denoise, x[None], grid, _batch(cond)))(x, cond)
        return out[:, 0], calls

    def log_likelihood(
        self, denoise: Denoise, x: jax.Array, process: Any, start: float, end: float, keys: jax.Array, cond: Cond
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log p(x) in nats (B,), the latents at `end` and the network calls; see `likelihood.log_likelihood`.

        Args:
          keys: (B,) typed PRNG keys, from which each sample's signs for the divergence are drawn (one set per sample).
        """
        grid, counted = Grid(_ends(process, start, end), process), []

        def integrate(denoise: Denoise, x: jax.Array, grid: Grid, noise: Noise, cond: Cond, carry: Any) -> jax.Array:
            del noise, carry
            out, calls = self._solve(denoise, x, grid, cond)
            counted.append(calls)
            return out

        solver: Any = integrate  # called as a solver is, without its other attributes

        def one(x: jax.Array, key: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array, jax.Array]:
            signs = jax.random.rademacher(key, (1, *x.shape), x.dtype)
            log_p, latent = likelihood.log_likelihood(denoise, x[None], solver, grid, lambda i: signs, _batch(cond))
            return log_p[0], latent[0], counted.pop()

        return jax.vmap(one)(x, keys, cond)

    def _solve(self, denoise: Denoise, x: jax.Array, grid: Grid, cond: Cond) -> tuple[jax.Array, jax.Array]:
        """One error control over the whole of x."""
        start, end = (float(t) for t in grid.times)

        def velocity(t: Any, x: jax.Array, _: Any) -> jax.Array:
            return denoise(x, jnp.asarray(t, x.dtype), cond, jnp.int32(0), ())[0].velocity

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            diffrax.Dopri5(),
            start,
            end,
            (end - start) / 100.0,
            x,
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            max_steps=self.max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        return jnp.where(done, solution.ys[0], jnp.nan), 1 + STAGES * jnp.asarray(
            solution.stats["num_steps"], jnp.int32
        )


def _ends(process: Any, start: float, end: float) -> np.ndarray:
    if not (0.0 <= min(start, end) < max(start, end) <= process.t_max * (1.0 + 1e-9)):
        raise GenError(
            f"integration from time {start:g} to {end:g}; expected two different times within 0 and {process.t_max:g} "
            f"of {type(process).__name__}"
        )
    return np.array([start, end], np.float64)


def _batch(cond: Cond) -> Cond:
    return {k: v[None] for k, v in cond.items()}
