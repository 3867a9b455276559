"""Alignment of latents with the features of a frozen encoder: the vision-foundation (VF) loss of VA-VAE.

Yao, Yang & Wang 2025, "Reconstruction vs. Generation", section 3 (arXiv 2501.01423). A projected latent is pulled
towards the encoder's feature at the same place, and the similarities between places towards those of the features.
"""

import jax
import jax.numpy as jnp

from gen.errors import GenError

__all__ = ["marginal_cosine", "marginal_distance", "vf_loss"]


def _directions(x: jax.Array) -> jax.Array:
    """(B, ..., C) -> (B, N, C) float32 of length 1; a zero vector stays zero, with a gradient of zero."""
    x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def marginal_cosine(z: jax.Array, features: jax.Array, margin: float) -> jax.Array:
    """mean of relu(1 - margin - cos(z, f)) over all places, per sample: (B,); equation 5.

    z, features: (B, ..., C). Places that agree up to the margin are left alone.
    """
    cosine = (_directions(z) * _directions(features)).sum(-1)
    return jax.nn.relu(1.0 - margin - cosine).mean(-1)


def marginal_distance(z: jax.Array, features: jax.Array, margin: float) -> jax.Array:
    """mean of relu(|S(z) - S(f)| - margin) over all pairs of places, per sample: (B,); equation 6.

    S holds the cosines between the places of one image; z (B, ..., C) and features (B, ..., D) need equal places only.
    """

    def similarity(x: jax.Array) -> jax.Array:
        x = _directions(x)
        return jnp.einsum("bic,bjc->bij", x, x, precision="highest")

    difference = jnp.abs(similarity(z) - similarity(features))
    return jax.nn.relu(difference - margin).mean((-2, -1))


def vf_loss(z: jax.Array, features: jax.Array, *, cosine_margin: float, distance_margin: float) -> dict[str, jax.Array]:
    """Both terms, per sample (B,), as "cosine" and "distance"; the loss is the mean of their sum.

    Args:
      z: (B, ..., C) latents, projected to the width of the features.
      features: (B, ..., C) of the frozen encoder on the same places; no gradient reaches them.

    Raises GenError where places or widths differ.
    """
    if z.shape != features.shape:
        raise GenError(
            f"projected latents are {z.shape} and the encoder's features {features.shape}; choose an encoder (its "
            "patch, the size of its input) that sees as many places as the latents have"
        )
    features = jax.lax.stop_gradient(features)
    return {
        "cosine": marginal_cosine(z, features, cosine_margin),
        "distance": marginal_distance(z, features, distance_margin),
    }
