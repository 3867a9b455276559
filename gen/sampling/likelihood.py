"""Exact likelihoods of probability-flow models, by any deterministic solver (Song et al. 2021, app. D.2)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.prediction import Prediction
from gen.nn.network import Cond
from gen.sampling.integrate import Problem
from gen.sampling.noise import Noise

__all__ = ["bits_per_dimension", "log_likelihood", "rademacher"]


def rademacher(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """Gives probe(i) = random signs (B, *shape) that depend on each sample's key and on i alone."""
    return lambda i: jax.vmap(lambda key: jax.random.rademacher(jax.random.fold_in(key, i), shape, jnp.float32))(keys)


def log_likelihood(problem: Problem, integrate: Callable[[Problem], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Gives log p(x) in nats (B,), and the latents that x is encoded to.

    The state is x with one number more, the integral of the velocity's divergence, estimated by e . J e with random
    signs e (Hutchinson); then log p(x) = log N(latent; 0, sigma(t_max)^2) + integral.

    Args:
      problem: its x (B, ...) are data, its grid rises from data to pure noise, its velocity must be defined where the
        grid starts, and its noise(i) are the signs of step i (see `rademacher`).
      integrate: the integration of a problem by a deterministic method, for example
        ``functools.partial(gen.sampling.integrate.integrate, solver)``.
    """
    x, grid = problem.x, problem.grid
    shape, rows = x.shape, x.shape[0]

    def augmented(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
        signs = problem.noise(step)

        def velocity(y: jax.Array) -> tuple[jax.Array, tuple[Prediction, Any]]:
            prediction, after = problem.denoise(y, t, cond, step, carry)
            return prediction.velocity, (prediction, after)

        v, slope, (prediction, after) = jax.jvp(velocity, (x[:, :-1].reshape(shape),), (signs,), has_aux=True)
        divergence = (slope * signs).reshape(rows, -1).sum(-1, keepdims=True)
        value = jnp.concatenate([v.reshape(rows, -1), divergence], axis=-1)
        return Prediction(value, x, prediction.t, {}, prediction.process, "velocity"), after

    state = jnp.concatenate([x.reshape(rows, -1), jnp.zeros((rows, 1), x.dtype)], axis=-1)
    end = integrate(dataclasses.replace(problem, denoise=augmented, x=state))
    latent, integral = end[:, :-1], end[:, -1]
    scale = jnp.asarray(grid.sigma[-1], x.dtype)
    prior = -0.5 * (jnp.square(latent / scale) + jnp.log(2.0 * math.pi * scale**2)).sum(-1)
    return prior + integral, latent.reshape(shape)


def bits_per_dimension(log_likelihood: jax.Array, size: int, levels: int = 256) -> jax.Array:
    """Bits per number of data in [-1, 1] that were dequantised from `levels` levels: -log2 p / size + log2(levels / 2).

    Args:
      log_likelihood: (B,) nats; size: numbers in one sample.
    """
    return -log_likelihood / (size * math.log(2.0)) + math.log2(levels / 2)
