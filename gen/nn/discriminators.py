"""Networks that judge whether an image is real: PatchGAN, TiTok's and StyleGAN's, as tokenizers train against them.

All take images (B, H, W, C) in [-1, 1] and give logits with the new values of their batch statistics, which are
`gen.nn.network.Buffer`s. Under a sharded program a batch statistic is that of the global batch: the official codes take
each device's own.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.nn.adversarial import torch_uniform
from gen.nn.convolution import convolution, general_convolution
from gen.nn.layers import linear
from gen.nn.network import Buffer

__all__ = [
    "BLUR",
    "PatchGAN",
    "Statistics",
    "StyleBlock",
    "StyleGAN",
    "TiTokDiscriminator",
    "adaptive_max_pool",
    "blur",
]

Statistics = dict[str, jax.Array]  # new values of a network's buffers by path
Dtype = Literal["float32", "bfloat16"]

BLUR = np.outer([1.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 1.0]).astype(np.float32) / 64.0  # the binomial filter
_MOMENTUM, _BATCH_EPS = 0.1, 1e-5  # PyTorch's batch norm


@dataclasses.dataclass(frozen=True)
class PatchGAN:
    """PatchGAN is pix2pix's discriminator as VQGAN and latent diffusion use it (Isola et al. 2017, arXiv 1611.07004).

    4x4 convolutions, `layers` of them of stride 2, then two of stride 1; one logit for each patch.

    Attributes:
      channels: of the images.
      width: channels of the first layer; the k-th further one has min(2^k, 8) times as many.
      layers: convolutions of stride 2; a patch is 70 pixels wide for 3 of them.
      norm: "batch", with the statistics of the batch as published; or "group", with those of each image in 32 groups
        or one for every two channels, so that a logit depends on its image alone.
      dtype: compute type; normalisations are float32.

    Raises GenError for no channel or layer.
    """

    channels: int = 3
    width: int = 64
    layers: int = 3
    norm: Literal["batch", "group"] = "batch"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if min(self.channels, self.width, self.layers) < 1:
            raise GenError("a PatchGAN needs at least one channel and layer; give positive numbers")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes (B, H, W, channels) to logits (B, h, w) and statistics."""
        return _PatchGAN(self, rngs)


@dataclasses.dataclass(frozen=True)
class TiTokDiscriminator:
    """The patch discriminator of TiTok and TA-TiTok (Yu et al. 2024, arXiv 2406.07550): 16x16 logits for any size.

    Attributes:
      channels: of the images.
      width: channels of the first layers; later stages double it. A multiple of 32.
      stages: halvings of the image.
      dtype: compute type; normalisations are float32.

    Raises GenError for no stage, and a width that 32 does not divide.
    """

    channels: int = 3
    width: int = 128
    stages: int = 3
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.width < 32 or self.width % 32 or self.stages < 1:
            raise GenError(
                f"TiTok's discriminator has {self.stages} stages of width {self.width}; expected at least one, and a "
                "multiple of 32, which are the groups of its norms"
            )

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes (B, H, W, channels) to logits (B, 16, 16) and has no statistics."""
        return _TiTokDiscriminator(self, rngs)


@dataclasses.dataclass(frozen=True)
class StyleGAN:
    """The residual discriminator of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958) in the form of ViTok.

    Residual blocks halve the image, under a binomial blur, down to 4x4.

    Attributes:
      image: (side, channels) of the square images; the side is a power of two, at least 8.
      multiplier: on the channels: 64 at 256 pixels, 128 at 128, 256 at 64, 512 below.
      group: images whose standard deviation is a further map of the last block (minibatch standard deviation); 0 for
        none, as in ViTok. It divides the batch.
      dtype: compute type.

    Raises GenError for a side that is no power of two from 8 on.
    """

    image: tuple[int, int] = (256, 3)
    multiplier: float = 1.0
    group: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        side = self.image[0]
        if side < 8 or side & (side - 1):
            raise GenError(
                f"images of side {side}; this discriminator halves them down to 4: use a power of two from 8"
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Lists the sides of the maps that are halved, the largest first."""
        return tuple(self.image[0] >> i for i in range(self.image[0].bit_length()) if self.image[0] >> i > 4)

    def width(self, side: int) -> int:
        """Says how many channels the maps of `side` x `side` have."""
        return max(1, int(self.multiplier * min(512, 16384 // side)))

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes (B, side, side, channels) to logits (B, 1) and has no statistics."""
        return _StyleGAN(self, rngs)


def blur(x: jax.Array, pads: Any = ((1, 1), (1, 1))) -> jax.Array:
    """Halves x (B, H, W, C) under the binomial filter [1, 3, 3, 1] on both axes."""
    channels = x.shape[-1]
    kernel = jnp.broadcast_to(jnp.asarray(BLUR, x.dtype)[:, :, None, None], (4, 4, 1, channels))
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels
    )


def adaptive_max_pool(x: jax.Array, size: int) -> jax.Array:
    """Takes x (B, H, W, C) to (B, size, size, C): maxima over floor(i n / size) to ceil((i + 1) n / size)."""
    for axis in (1, 2):
        n = x.shape[axis]
        starts, ends = np.arange(size) * n // size, -(-(np.arange(size) + 1) * n // size)
        windows = np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1)
        x = jnp.take(x, windows, axis=axis).max(axis + 1)
    return x


def _leaky(x: jax.Array, slope: float) -> jax.Array:
    return jnp.where(x > 0, x, slope * x)


def _plain(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What `nnx.Conv` calls where an odd kernel keeps the size."""
    return convolution(x, kernel)


def _conv(
    inputs: int, outputs: int, size: int, rngs: nnx.Rngs, *, stride: int = 1, bias: bool = True, dtype: Any, init: Any
) -> nnx.Conv:
    """A convolution: odd kernels keep the size, 4x4 ones are padded by 1."""
    pad = size // 2 if size % 2 else 1
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        dtype=dtype,
        kernel_init=init,
        conv_general_dilated=_plain if size % 2 else general_convolution,
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """Batch norm over all axes but the last, in float32, with running averages of mean and unbiased variance."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(1.0 + 0.02 * jax.random.normal(rngs.params(), (channels,)))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = Buffer(jnp.zeros(channels))
        self.var = Buffer(jnp.ones(channels))

    def __call__(self, x: jax.Array, stored: bool) -> tuple[jax.Array, Statistics]:
        """Normalises x (..., channels) by the batch's statistics or the running ones; gives the latter after it."""
        x = x.astype(jnp.float32)
        mean, var, new = self.mean[...], self.var[...], {}
        if not stored:
            axes = tuple(range(x.ndim - 1))
            count = math.prod(x.shape[:-1])
            batch_mean, batch_var = x.mean(axes), x.var(axes)
            new = {
                "mean": mean + _MOMENTUM * (batch_mean - mean),
                "var": var + _MOMENTUM * (batch_var * count / max(count - 1, 1) - var),
            }
            mean, var = batch_mean, batch_var
        y = (x - mean) * jax.lax.rsqrt(var + _BATCH_EPS) * self.scale[...] + self.bias[...]
        return y, jax.lax.stop_gradient(new)


class _GroupNorm(nnx.Module):
    """Group norm in place of a batch norm."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        groups = math.gcd(32, max(1, channels // 2))
        self.norm = nnx.GroupNorm(channels, groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, stored: bool) -> tuple[jax.Array, Statistics]:
        del stored
        return self.norm(x.astype(jnp.float32)), {}


class _PatchGAN(nnx.Module):
    def __init__(self, config: PatchGAN, rngs: nnx.Rngs) -> None:
        self.config = config
        normal = nnx.initializers.normal(0.02)
        batch, dtype = config.norm == "batch", jnp.dtype(config.dtype)
        widths = [config.width * min(2**k, 8) for k in range(config.layers + 1)]
        self.first = _conv(config.channels, widths[0], 4, rngs, stride=2, dtype=dtype, init=normal)
        convs, norms = {}, {}
        for k in range(1, config.layers + 1):
            stride = 2 if k < config.layers else 1
            conv = _conv(widths[k - 1], widths[k], 4, rngs, stride=stride, bias=False, dtype=dtype, init=normal)
            convs[f"layer{k}"] = conv
            norms[f"layer{k}"] = BatchNorm(widths[k], rngs) if batch else _GroupNorm(widths[k], rngs)
        self.convs, self.norms = nnx.Dict(convs), nnx.Dict(norms)
        self.last = _conv(widths[-1], 1, 4, rngs, dtype=dtype, init=normal)

    def __call__(self, x: jax.Array, stored: bool = False) -> tuple[jax.Array, Statistics]:
        """Logits and statistics; with `stored` the norms use their running averages."""
        statistics: Statistics = {}
        x = _leaky(self.first(x), 0.2)
        for k in range(1, self.config.layers + 1):
            name = f"layer{k}"
            x, new = self.norms[name](self.convs[name](x), stored)
            statistics |= {f"norms/{name}/{key}": value for key, value in new.items()}
            x = _leaky(x, 0.2)
        return self.last(x).astype(jnp.float32)[..., 0], statistics


class _TiTokStage(nnx.Module):
    """Convolution, blur, group norm."""

    def __init__(self, inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.conv = _conv(inputs, outputs, 3, rngs, dtype=dtype, init=torch_uniform)
        self.norm = nnx.GroupNorm(outputs, 32, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def halved(self, x: jax.Array) -> jax.Array:
        return blur(self.conv(x), "SAME")

    def __call__(self, x: jax.Array) -> jax.Array:
        return _leaky(self.norm(self.halved(x).astype(jnp.float32)), 0.1)


class _TiTokDiscriminator(nnx.Module):
    def __init__(self, config: TiTokDiscriminator, rngs: nnx.Rngs) -> None:
        dtype, width = jnp.dtype(config.dtype), config.width
        widths = [width, *(width * 2**i for i in range(config.stages))]
        self.block_in = _conv(config.channels, width, 5, rngs, dtype=dtype, init=torch_uniform)
        self.stages = nnx.Dict(
            {f"stage{i}": _TiTokStage(widths[i], widths[i + 1], dtype, rngs) for i in range(config.stages)}
        )
        self.to_logits = _conv(widths[-1], widths[-1], 1, rngs, dtype=dtype, init=torch_uniform)
        self.out = _conv(widths[-1], 1, 5, rngs, dtype=dtype, init=torch_uniform)

    def first(self, x: jax.Array) -> jax.Array:
        """The first layer; images are [0, 1] inside, as in the published models."""
        return _leaky(self.block_in(0.5 * (x + 1.0)), 0.1)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Statistics]:
        x = self.first(x)
        for i in range(len(self.stages)):
            x = self.stages[f"stage{i}"](x)
        x = _leaky(self.to_logits(adaptive_max_pool(x, 16)), 0.1)
        return self.out(x).astype(jnp.float32)[..., 0], {}


class StyleBlock(nnx.Module):
    """Two 3x3 convolutions with a blurred halving between them, and a blurred 1x1 convolution beside them."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        init = nnx.initializers.xavier_uniform()
        self.conv1 = _conv(inputs, outputs, 3, rngs, dtype=dtype, init=init)
        self.conv2 = _conv(outputs, outputs, 3, rngs, dtype=dtype, init=init)
        self.skip = _conv(inputs, outputs, 1, rngs, bias=False, dtype=dtype, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Takes (B, H, W, inputs) to (B, H / 2, W / 2, outputs)."""
        h = _leaky(self.conv2(blur(_leaky(self.conv1(x), 0.2))), 0.2)
        return (h + self.skip(blur(x))) / math.sqrt(2.0)


class _StyleGAN(nnx.Module):
    def __init__(self, config: StyleGAN, rngs: nnx.Rngs) -> None:
        self.config = config
        (side, channels), dtype, init = config.image, jnp.dtype(config.dtype), nnx.initializers.xavier_uniform()
        self.first = _conv(channels, config.width(side), 3, rngs, dtype=dtype, init=init)
        self.blocks = nnx.Dict(
            {f"side{n}": StyleBlock(config.width(n), config.width(n // 2), rngs, dtype) for n in config.sides}
        )
        width = config.width(4)
        self.conv = _conv(width + bool(config.group), width, 3, rngs, dtype=dtype, init=init)
        self.fc = linear(16 * width, width, rngs=rngs)
        self.out = linear(width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Statistics]:
        x = _leaky(self.first(x), 0.2)
        for side in self.config.sides:
            x = self.blocks[f"side{side}"](x)
        if self.config.group:
            x = jnp.concatenate([x, _deviation(x, self.config.group).astype(x.dtype)], -1)
        x = _leaky(self.conv(x), 0.2).astype(jnp.float32).reshape(x.shape[0], -1)
        return self.out(_leaky(self.fc(x), 0.2)), {}


def _deviation(x: jax.Array, group: int) -> jax.Array:
    """The mean standard deviation over each group of images as a map (B, H, W, 1), StyleGAN2's minibatch layer."""
    b, h, w, c = x.shape
    if b % group:
        raise GenError(f"a batch of {b} does not divide into groups of {group} images; change one of them")
    # image i of a group lies b / group after the one before it, as in the official code
    spread = jnp.sqrt(x.astype(jnp.float32).reshape(group, b // group, h, w, c).var(0) + 1e-8).mean((1, 2, 3))
    return jnp.broadcast_to(jnp.tile(spread, group)[:, None, None, None], (b, h, w, 1))
