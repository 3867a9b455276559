"""Noise of samplers, drawn for each sample from its own key: batches of any size give the same samples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gen.sampling.grids import Grid

__all__ = ["Noise", "decode_keys", "per_sample_noise", "prior", "unit_noise"]

_DECODE = 2**31 - 1  # beyond the number of any step

Noise = Callable[[Any], jax.Array]  # noise(i) is step i's standard normal noise, shaped like x


def per_sample_noise(keys: jax.Array, shape: tuple[int, ...]) -> Noise:
    """Gives noise(i) = standard normals (B, *shape) that depend on each sample's key and on i alone.

    Args:
      keys: (B,) typed PRNG keys, one per sample.
    """
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def unit_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gives the standard normals (B, *shape) from which sample i starts, from its key alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def prior(grid: Grid, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gives the state (B, *shape) float32 from which a solver starts: sigma(times[0]) times `unit_noise`."""
    return jnp.asarray(grid.sigma[0], jnp.float32) * unit_noise(keys, shape)


def decode_keys(keys: jax.Array) -> jax.Array:
    """Gives the keys (B,) that decoders draw from when they decode the samples of `keys`: a stream of their own."""
    return jax.vmap(lambda key: jax.random.fold_in(key, _DECODE))(keys)
