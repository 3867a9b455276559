"""Random image changes on the device: pure functions of a key and images."""

import dataclasses

import jax
import jax.numpy as jnp

from gen.errors import GenError

__all__ = ["RandomAffine", "affine"]


def affine(images: jax.Array, matrix: jax.Array, shift: jax.Array, fill: float = -1.0) -> jax.Array:
    """Resamples images bilinearly: the output at q (pixels from the centre) is the input at matrix q + shift.

    Args:
      images: (B, H, W, C) float.
      matrix: (B, 2, 2), rows and columns ordered (y, x).
      shift: (B, 2) in pixels, (y, x).
      fill: value outside the image.

    Returns (B, H, W, C). The identity returns the images unchanged.
    """
    b, h, w, _ = images.shape
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2], jnp.float32)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), axis=-1) - centre  # (H, W, 2)
    # Multiplied out by hand: a matmul at reduced precision would move pixels.
    where = (matrix[:, None, None] * grid[None, :, :, None, :]).sum(-1) + shift[:, None, None] + centre
    low = jnp.floor(where)
    fraction = where - low
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
    out = jnp.zeros_like(images)
    for dy in (0, 1):
        for dx in (0, 1):
            y = jnp.clip(low[..., 0] + dy, -1, h).astype(jnp.int32) + 1
            x = jnp.clip(low[..., 1] + dx, -1, w).astype(jnp.int32) + 1
            weight = jnp.abs(1 - dy - fraction[..., 0]) * jnp.abs(1 - dx - fraction[..., 1])
            out += weight[..., None] * padded[jnp.arange(b)[:, None, None], y, x]
    return out


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Small random shifts, rotations and changes of size, independent for every image.

    Attributes:
      shift: largest shift in pixels along each axis (uniform).
      rotate: largest rotation in degrees (uniform).
      scale: largest change of size as a fraction; the size is uniform in log between 1 / (1 + scale) and 1 + scale.
      fill: value that comes in from outside (-1 is black).

    Raises GenError for a negative shift, rotation or scale.
    """

    shift: float = 0.5
    rotate: float = 8.0
    scale: float = 0.08
    fill: float = -1.0

    def __post_init__(self) -> None:
        if min(self.shift, self.rotate, self.scale) < 0:
            raise GenError("shift, rotate and scale of the random affine map must not be negative; 0 turns one off")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Maps images (B, H, W, C) float -> the same shape; `key` is one key for the batch."""
        draws = jax.random.uniform(key, (images.shape[0], 4), minval=-1.0, maxval=1.0)
        angle = draws[:, 0] * jnp.deg2rad(self.rotate)
        size = jnp.exp(draws[:, 1] * jnp.log1p(self.scale))
        cos, sin = jnp.cos(angle) / size, jnp.sin(angle) / size
        matrix = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], axis=-2)
        return affine(images, matrix, draws[:, 2:] * self.shift, self.fill)
