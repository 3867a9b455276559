"""A discriminator's head for any teacher: where it looks, and how large it is, follow from the teacher's network."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.nn.adversarial import ConvHead, Heads, TokenLogits
from gen.nn.conditions import make_conditions
from gen.nn.network import param_shapes

__all__ = ["bottleneck_head", "every_block"]


def bottleneck_head(denoiser: Denoiser) -> dict[str, Any]:
    """Gives ``taps`` and ``head`` on the deepest features: a U-Net's last encoder block, a transformer's middle one.

    Raises GenError for a network of neither kind.
    """
    tap = _deepest(_names(denoiser))
    (shape,) = _shapes(denoiser, (tap,))
    return {"taps": (tap,), "head": _head(shape)}


def every_block(denoiser: Denoiser) -> dict[str, Any]:
    """Gives ``taps`` and ``head`` with a head on each of a transformer's blocks; on a U-Net, the deepest features."""
    taps = tuple(name for name in _names(denoiser) if name.startswith("block_"))
    if not taps:
        return bottleneck_head(denoiser)
    return {"taps": taps, "head": Heads(tuple(_head(shape) for shape in _shapes(denoiser, taps)))}


def _names(denoiser: Denoiser) -> list[str]:
    """What can be tapped."""
    names: list[str] = denoiser.net.module(param_shapes(denoiser.network)).features()
    return names


def _deepest(names: Sequence[str]) -> str:
    encoder, blocks = ([name for name in names if name.startswith(word)] for word in ("enc", "block_"))
    if encoder:
        return encoder[-1]
    if blocks:
        return blocks[(len(blocks) - 1) // 2]
    if "middle" in names:
        return "middle"
    raise GenError(f"no features to judge among {', '.join(names)}; give the task its own `taps` and `head`")


def _shapes(denoiser: Denoiser, taps: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Shapes of one sample's features."""
    network = denoiser.network
    x, cond = jax.ShapeDtypeStruct((1, *network.shape), jnp.float32), make_conditions(network.conditions, range(1))
    found = jax.eval_shape(
        lambda params, x: denoiser.features(params, x, jnp.float32(0.5), cond, taps), param_shapes(network), x
    )
    return [found[tap].shape[1:] for tap in taps]


def _head(shape: tuple[int, ...]) -> Any:
    """DMD2's head down to one position for a square map, one logit for each token otherwise."""
    channels = shape[-1]
    if len(shape) < 3:
        return TokenLogits(channels)
    downs = max(0, int(math.log2(min(shape[:2]))) - 2)
    return ConvHead(channels, min(shape[:2]) >> downs, downs, math.gcd(32, max(1, channels // 2)))
