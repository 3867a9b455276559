"""What an autoregressive teacher says of a noisy code: the closed form on which both Distilled Decodings stand.

A teacher gives probabilities p_j of the next token, whose codes are c_j. Noised as x_t = alpha q + sigma eps, the next
code has the density sum_j p_j N(x_t; alpha c_j, sigma^2 I). Its posterior is

    w_j = softmax_j( log p_j - |x_t - alpha c_j|^2 / (2 sigma^2) ),   E[q | x_t] = sum_j w_j c_j,

the exact denoiser of the teacher, which the solvers integrate: Distilled Decoding 1 (Liu et al. 2024, arXiv 2412.17153)
maps noise to tokens along its probability flow, Distilled Decoding 2 (arXiv 2510.21003) matches its score. Formulas are
derived from the abstracts and the paper's idea; neither trainer is public.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.prediction import Prediction
from gen.diffusion.process import Linear, Process, expand, pair
from gen.nn.network import Cond
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, Solver, states
from gen.sampling.noise import Noise
from gen.sampling.solvers import Euler

__all__ = ["CodeDenoiser", "code_weights", "flow_to_codes", "log_density"]


def _log_joint(process: Process, log_p: jax.Array, codes: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """log p_j - |x - alpha c_j|^2 / (2 sigma^2) + |x|^2 / (2 sigma^2), (..., V): one product, not V differences."""
    a, s = pair(process, t, x)
    inner = jnp.matmul(x, codes.T, precision=jax.lax.Precision.HIGHEST)
    return log_p + (a * inner - 0.5 * a**2 * jnp.square(codes).sum(-1)) / s**2


def code_weights(process: Process, log_p: jax.Array, codes: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Gives the posterior probabilities w (..., V) of the codes given x_t.

    Args:
      log_p: (..., V) the teacher's log probabilities; -inf for a code that it never gives, which then never wins.
      codes: (V, D) the codebook.
      x: (..., D) x_t.
      t: a time, or one for each row, on the clock of `process`; above 0.
    """
    return jax.nn.softmax(_log_joint(process, log_p, codes, x, t), axis=-1)


def log_density(process: Process, log_p: jax.Array, codes: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """Gives the log density (...) of x_t under the teacher; arguments as in `code_weights`."""
    s = expand(process.sigma(t), x)
    joint = jax.nn.logsumexp(_log_joint(process, log_p, codes, x, t), axis=-1)
    return joint - (0.5 * jnp.square(x / s) + jnp.log(s) + 0.5 * np.log(2.0 * np.pi)).sum(-1)


@dataclasses.dataclass(frozen=True)
class CodeDenoiser:
    """The teacher as a `gen.sampling.integrate.Denoise`: exact, and not a network.

    Attributes:
      process: how codes are noised.
      log_p: (..., V) log probabilities of each row's code.
      codes: (V, D) the codebook.
    """

    process: Process
    log_p: jax.Array
    codes: jax.Array

    def __call__(self, x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
        """Gives E[q | x_t] as a prediction of the data, for x (..., D)."""
        del cond, step
        t = jnp.asarray(t, x.dtype)
        mean = jnp.matmul(
            code_weights(self.process, self.log_p, self.codes, x, t), self.codes, precision=jax.lax.Precision.HIGHEST
        )
        return Prediction(mean, x, t, {}, self.process, "x"), carry


def flow_to_codes(
    log_p: jax.Array, codes: jax.Array, noise: jax.Array, steps: int = 100, solver: Solver = Euler()
) -> tuple[jax.Array, jax.Array]:
    """Maps noise to tokens along the probability flow, which carries the normal distribution onto the teacher's.

    Time runs evenly from 1 (noise) to 0; the last network call is at 1 / steps, where the likeliest code is the token.

    Args:
      log_p: (..., V) log probabilities; codes: (V, D); noise: (..., D) standard normal.
      steps: of the solver.
      solver: its last step is one of Euler's.

    Returns:
      ids (...) int32, and the states after each step, (steps, ..., D).
    """
    process, times = Linear(), np.linspace(1.0, 0.0, steps + 1)
    denoise, grid = CodeDenoiser(process, log_p, codes), Grid(times, process)
    never: Noise = lambda i: noise  # noqa: E731 - the solvers here are deterministic
    path = states(solver, Problem(denoise, noise, grid, never, {})).x
    before = noise if steps == 1 else path[-2]
    last = code_weights(process, log_p, codes, before, jnp.asarray(times[-2], noise.dtype))
    return jnp.argmax(last, axis=-1).astype(jnp.int32), path
