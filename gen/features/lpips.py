"""LPIPS (Zhang et al. 2018, version 0.1): the perceptual distance of two images on VGG16, AlexNet or SqueezeNet.

The layers are those that the parameters hold, under the names of the published files, so that one walk serves all
three trunks at any width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.config import suggest
from gen.errors import GenError
from gen.features.resize import resize
from gen.nn.convolution import convolution
from gen.nn.network import Params

__all__ = ["SCALE", "SHIFT", "TRUNKS", "Trunk", "distances", "lpips", "lpips_map", "trunk", "unit"]

# ImageNet's mean and deviation, moved to the range [-1, 1]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What the weights of a trunk do not tell.

    Attributes:
      stride, pad: of the first convolution; the others have stride 1 and keep the size.
      pool: side of the max pools, of stride 2.
      pooled: the slices (from 1) that begin with one.
      ceil: whether a last, partial window of a pool counts.
    """

    stride: int
    pad: int
    pool: int
    pooled: tuple[int, ...]
    ceil: bool = False


TRUNKS = {
    "vgg": Trunk(1, 1, 2, (2, 3, 4, 5)),
    "alex": Trunk(4, 2, 3, (2, 3)),
    "squeeze": Trunk(2, 0, 3, (2, 3, 4), ceil=True),
}


def _conv(layer: Mapping[str, Any], x: jax.Array, stride: int = 1, pad: int | None = None) -> jax.Array:
    kernel = layer["kernel"]
    x = convolution(x, kernel, stride=stride, padding=pad)
    return jax.nn.relu(x + layer["bias"])


def _layer(layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A convolution, or a fire module (Iandola et al. 2016, section 3.2)."""
    if "squeeze" not in layer:
        return _conv(layer, x)
    x = _conv(layer["squeeze"], x)
    return jnp.concatenate([_conv(layer["expand1x1"], x), _conv(layer["expand3x3"], x)], -1)


def _pool(x: jax.Array, kind: Trunk) -> jax.Array:
    pads = [(0, -(n - kind.pool) % 2 if kind.ceil else 0) for n in x.shape[1:3]]
    window = (1, kind.pool, kind.pool, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), [(0, 0), *pads, (0, 0)])


def trunk(params: Params, images: jax.Array, net: str = "vgg") -> list[jax.Array]:
    """images (B, H, W, 3) in [-1, 1] -> the feature map (B, h, w, C) after every slice, finest first.

    Raises GenError for an unknown net and images that are not RGB.
    """
    if net not in TRUNKS:
        raise GenError(f"LPIPS has no trunk '{net}'; {suggest(net, TRUNKS)}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise GenError(
            f"LPIPS compares images of shape (B, H, W, 3), got {images.shape}; repeat the channel of grey ones"
        )
    kind = TRUNKS[net]
    x = (images - jnp.asarray(SHIFT, images.dtype)) / jnp.asarray(SCALE, images.dtype)
    found = []
    for i in range(1, len(params["net"]) + 1):
        layers = params["net"][f"slice{i}"]
        x = _pool(x, kind) if i in kind.pooled else x
        for name in sorted(layers, key=int):
            first = i == 1 and name == "0"
            x = _conv(layers[name], x, kind.stride, kind.pad) if first else _layer(layers[name], x)
        found.append(x)
    return found


def unit(x: jax.Array) -> jax.Array:
    """Gives x (..., C) at unit length over channels; 0 stays 0, with gradient 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x / (length + _EPS)


def distances(params: Params, a: jax.Array, b: jax.Array, net: str = "vgg", heads: bool = True) -> list[jax.Array]:
    """Gives the weighted squared distance (B, h, w) of the two images' features at every position, slice by slice.

    Args:
      params: "net" (slices) and "lin0" (C,) ... as `gen.pretrained.lpips.fold` makes them.
      a, b: (B, H, W, 3) float32 in [-1, 1].
      heads: whether channels are weighted by the learned heads; else their plain sum ("baseline").

    Raises GenError for images of different shapes.
    """
    if a.shape != b.shape:
        raise GenError(f"LPIPS compares images of equal shapes, got {a.shape} and {b.shape}")
    pairs = zip(trunk(params, a, net), trunk(params, b, net), strict=True)
    squares = [jnp.square(unit(x) - unit(y)) for x, y in pairs]
    return [(d * params[f"lin{i}"]).sum(-1) if heads else d.sum(-1) for i, d in enumerate(squares)]


def lpips(params: Params, a: jax.Array, b: jax.Array, net: str = "vgg", heads: bool = True) -> jax.Array:
    """Gives the distance of each pair, (B,): the spatial means of `distances`, summed over the slices."""
    return jnp.stack([d.mean((1, 2)) for d in distances(params, a, b, net, heads)]).sum(0)


def lpips_map(params: Params, a: jax.Array, b: jax.Array, net: str = "vgg") -> jax.Array:
    """Where two images differ, (B, H, W): every slice's distances enlarged bilinearly to the image, summed."""
    size = (a.shape[1], a.shape[2])
    maps = [resize(d[..., None], size, "torch-bilinear") for d in distances(params, a, b, net)]
    return jnp.stack(maps).sum(0)[..., 0]
