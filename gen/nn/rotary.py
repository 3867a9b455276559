"""Rotary positions (Su et al. 2021, arXiv 2104.09864): channels of q and k turned by angles of a token's place."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["axial_rotation", "rotate_pairs"]


def axial_rotation(
    shape: Sequence[int], head_dim: int, theta: float = 10000.0, spacing: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles, each (prod(shape), head_dim) float32.

    The channels are shared equally by the axes, rows first. An axis of d channels has d / 2 frequencies
    theta^(-2k / d); the n-th place turns channels 2k and 2k + 1 by n `spacing` times the k-th.
    """
    d = head_dim // len(shape)
    frequencies = np.repeat(theta ** (-2.0 * np.arange(d // 2) / d), 2)
    positions = np.meshgrid(*(spacing * np.arange(n) for n in shape), indexing="ij")
    angles = np.concatenate([p.reshape(-1, 1) * frequencies for p in positions], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate_pairs(x: jax.Array, cos: Any, sin: Any) -> jax.Array:
    """Turns adjacent channel pairs of x (B, N, H, D) by the angles of each token, float32.

    cos, sin: (N, D), or (B, N, D) where every sample has tokens of its own.
    """
    x = x.astype(jnp.float32)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * jnp.asarray(cos)[..., None, :] + turned * jnp.asarray(sin)[..., None, :]
