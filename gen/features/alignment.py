"""Patch features of clean images, which representation alignment regresses on (Yu et al. 2025, REPA)."""

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.features.dinov2 import DEVIATION, MEAN, DINOv2Config
from gen.features.resize import resize
from gen.nn.network import Network, Params

__all__ = ["patch_features"]


def patch_features(network: DINOv2Config, params: Params, images: jax.Array, tokens: int) -> jax.Array:
    """The final, normalised patch tokens of DINOv2 for images resized to `tokens` patches per side.

    As REPA's code does: ImageNet's mean and deviation first, then torch's bicubic filter without antialiasing; 256
    pixels become 224, 16 x 16 tokens, as many as a DiT with patch 2 has on latents of 32 x 32.

    Args:
      images: (B, H, W, 3 or 1) float32 in [-1, 1], square.

    Returns:
      (B, tokens^2, width) float16, row by row from the top left.

    Raises GenError for images that are not square or have other channels.
    """
    height, width, channels = images.shape[1:]
    if height != width or channels not in (1, 3):
        raise GenError(f"alignment features of images {images.shape[1:]}; expected squares with 3 channels or 1")
    x = (0.5 * (jnp.broadcast_to(images, (*images.shape[:3], 3)) + 1.0) - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
    x = resize(x, (tokens * network.patch, tokens * network.patch), "torch-bicubic")
    return Network(network).apply(params, x)["patches"].astype(jnp.float16)
