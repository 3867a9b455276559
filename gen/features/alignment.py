"""Patch features of clean images, which latents and generators are aligned with (REPA, VA-VAE) and RAE decodes."""

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.features.resize import resize
from gen.features.vit import DEVIATION, MEAN, ViTConfig
from gen.nn.network import Network, Params
from gen.training.sharding import constrain

__all__ = ["patch_features", "seen"]


def seen(images: jax.Array, side: int, *, resampling: str = "torch-bicubic", standardised: bool = True) -> jax.Array:
    """Gives what an encoder is shown: images (B, H, W, 3 or 1) in [-1, 1], square, resized to (B, side, side, 3).

    Args:
      resampling: a name in `gen.features.resize.METHODS`.
      standardised: ImageNet's mean and deviation are removed first, as the encoders were trained.

    Raises GenError for images that are not square or have other channels.
    """
    height, width, channels = images.shape[1:]
    if height != width or channels not in (1, 3):
        raise GenError(f"alignment features of images {images.shape[1:]}; expected squares with 3 channels or 1")
    x = jnp.broadcast_to(images, (*images.shape[:3], 3))
    if standardised:
        x = (0.5 * (x + 1.0) - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
    return resize(x, (side, side), resampling)


def patch_features(
    network: ViTConfig,
    params: Params,
    images: jax.Array,
    tokens: int,
    *,
    resampling: str = "torch-bicubic",
    standardised: bool = True,
) -> jax.Array:
    """Gives the final, normalised patch tokens of an encoder for images resized to `tokens` patches per side.

    REPA and RAE: torch's bicubic filter without antialiasing; 256 pixels become 224 for patches of 14, 16 x 16 tokens,
    as many as a DiT with patch 2 has on latents of 32 x 32. VA-VAE's published runs: "torch-bilinear", and images that
    are not standardised (its authors call that an oversight without visible harm).

    Args:
      images, resampling, standardised: see `seen`.

    Returns:
      (B, tokens^2, width) float32, row by row from the top left.

    Raises GenError for images that are not square or have other channels.
    """
    x = seen(images, tokens * network.patch, resampling=resampling, standardised=standardised)
    patches: jax.Array = Network(network).apply(params, x)["patches"]
    # else XLA cuts their channels where weights are cut by "tensor", and computes wrong gradients of what is compared
    # with them (jax 0.10, a mesh of all three axes; the devices test of VA-VAE shows it)
    return constrain(patches)
