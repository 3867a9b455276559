"""The convolutional towers of latent diffusion's autoencoders, which KL, VQ and binary tokenizers share.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G, after Esser et al. 2021
(VQGAN): residual blocks by resolution, attention where the configuration says, and a middle part at the lowest.
"""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.convolution import convolution, general_convolution
from gen.training.sharding import constrain

__all__ = [
    "Decoder",
    "Encoder",
    "ResBlock",
    "SelfAttention",
    "TowerConfig",
    "check_images",
    "check_latents",
    "check_levels",
    "conv",
    "factor_of",
    "norm",
]


class TowerSizes:
    """What follows for every configuration of towers from its `width` and `mult`, finest level first."""

    width: int
    mult: tuple[int, ...]

    @property
    def factor(self) -> int:
        """Pixels per position of the narrow end, along each side."""
        return factor_of(self.mult)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level, finest first."""
        return tuple(self.width * m for m in self.mult)


class TowerConfig(Protocol):
    """What the towers read of a configuration; `gen.tokenizers.kl_vae.KLVAEConfig` says what each of these means."""

    @property
    def image(self) -> tuple[int, int, int]: ...
    @property
    def width(self) -> int: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def attention(self) -> tuple[int, ...]: ...
    @property
    def decoder_attention(self) -> tuple[int, ...]: ...
    @property
    def middle_attention(self) -> bool: ...
    @property
    def groups(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> str: ...


def factor_of(mult: tuple[int, ...]) -> int:
    """Pixels per latent along each side, from the factors of the levels."""
    return int(2 ** (len(mult) - 1))


def check_levels(image: tuple[int, int, int], width: int, mult: tuple[int, ...], blocks: int, groups: int) -> None:
    """Raises GenError for towers that cannot be built, or not be used on such images."""
    if not mult or min(width, blocks, groups, *mult) < 1:
        raise GenError("an autoencoder needs at least one level, block, channel and group; give positive numbers")
    if image[0] % factor_of(mult) or image[1] % factor_of(mult):
        raise GenError(
            f"images of {image[0]}x{image[1]} cannot be halved {len(mult) - 1} times; use multiples of "
            f"{factor_of(mult)}"
        )
    for level in (width * m for m in mult):
        if level % groups:
            raise GenError(f"level width {level} does not divide into {groups} groups; change one of them")


def check_images(images: jax.Array, channels: int, factor: int) -> None:
    """Raises GenError unless images are (B, H, W, channels), H and W multiples of `factor`."""
    if images.ndim != 4 or images.shape[3] != channels or images.shape[1] % factor or images.shape[2] % factor:
        raise GenError(
            f"images are {images.shape}; this autoencoder takes (B, H, W, {channels}), H and W multiples of {factor}"
        )


def check_latents(latents: jax.Array, channels: int) -> None:
    """Raises GenError unless latents, or codes, are (B, h, w, channels)."""
    if latents.ndim != 4 or latents.shape[3] != channels:
        raise GenError(f"latents are {latents.shape}; this autoencoder decodes (B, h, w, {channels})")


def conv(
    inputs: int, outputs: int, size: int, dtype: Any, rngs: nnx.Rngs, *, half: bool = False, bias: bool = True
) -> nnx.Conv:
    """Gives a convolution that keeps the size, or halves it with zeros on the far sides only.

    Weights and biases start as U(+-1 / sqrt(fan in)), as in the published training code.
    """
    bound = (size * size * inputs) ** -0.5

    def law(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    padding = ((0, 1), (0, 1)) if half else ((size // 2, size // 2),) * 2
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=2 if half else 1,
        padding=padding,
        use_bias=bias,
        dtype=dtype,
        kernel_init=law,
        bias_init=law,
        conv_general_dilated=general_convolution if half else _same,
        rngs=rngs,
    )


def _same(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What `nnx.Conv` calls where the size is kept."""
    return convolution(x, kernel)


def norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group norm in float32 with eps 1e-6."""
    return nnx.GroupNorm(channels, groups, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class ResBlock(nnx.Module):
    """x (or its 1x1 projection) + conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, inputs: int, outputs: int, groups: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.norm1 = norm(inputs, groups, rngs)
        self.conv1 = conv(inputs, outputs, 3, dtype, rngs)
        self.norm2 = norm(outputs, groups, rngs)
        self.conv2 = conv(outputs, outputs, 3, dtype, rngs)
        if inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv2(jax.nn.silu(self.norm2(self.conv1(jax.nn.silu(self.norm1(x))))))
        return h + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class SelfAttention(nnx.Module):
    """x + proj(attention(norm(x))) over all positions, one head."""

    def __init__(self, channels: int, groups: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.norm = norm(channels, groups, rngs)
        self.q, self.k, self.v, self.proj = (conv(channels, channels, 1, dtype, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        normed = self.norm(x)
        q, k, v = (part(normed).reshape(b, h * w, 1, c) for part in (self.q, self.k, self.v))
        return x + self.proj(attention(q, k, v).reshape(b, h, w, c))


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention where there is some, then the resampling."""

    def __init__(
        self,
        config: TowerConfig,
        inputs: int,
        outputs: int,
        blocks: int,
        *,
        attention: bool,
        resample: Literal["down", "up", ""],
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.remat, self.resample = config.remat, resample
        self.res = nnx.Dict(
            {
                f"block{i}": ResBlock(outputs if i else inputs, outputs, config.groups, dtype, rngs)
                for i in range(blocks)
            }
        )
        if attention:
            self.attn = nnx.Dict(
                {f"block{i}": SelfAttention(outputs, config.groups, dtype, rngs) for i in range(blocks)}
            )
        if resample:
            self.conv = conv(outputs, outputs, 3, dtype, rngs, half=resample == "down")

    def __call__(self, x: jax.Array) -> jax.Array:
        for name, block in self.res.items():
            x = constrain(jax.checkpoint(block)(x) if self.remat == "full" else block(x))
            x = self.attn[name](x) if hasattr(self, "attn") else x
        if self.resample == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        return self.conv(x) if self.resample else x


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: TowerConfig, rngs: nnx.Rngs) -> None:
        channels, dtype = config.widths[-1], jnp.dtype(config.dtype)
        self.block_1 = ResBlock(channels, channels, config.groups, dtype, rngs)
        if config.middle_attention:
            self.attn_1 = SelfAttention(channels, config.groups, dtype, rngs)
        self.block_2 = ResBlock(channels, channels, config.groups, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block_1(x)
        return self.block_2(self.attn_1(x) if hasattr(self, "attn_1") else x)


class Encoder(nnx.Module):
    """(B, H, W, C) -> (B, h, w, outputs); `activate`: whether a SiLU stands between the last norm and convolution."""

    def __init__(self, config: TowerConfig, outputs: int, rngs: nnx.Rngs, *, activate: bool = True) -> None:
        self.activate = activate
        widths, dtype, last = config.widths, jnp.dtype(config.dtype), len(config.widths) - 1
        self.conv_in = conv(config.image[2], config.width, 3, dtype, rngs)
        self.down = nnx.Dict(
            {
                f"level{i}": Level(
                    config,
                    widths[i - 1] if i else config.width,
                    widths[i],
                    config.blocks,
                    attention=i in config.attention,
                    resample="down" if i < last else "",
                    rngs=rngs,
                )
                for i in range(last + 1)
            }
        )
        self.mid = Middle(config, rngs)
        self.norm_out = norm(widths[-1], config.groups, rngs)
        self.conv_out = conv(widths[-1], outputs, 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for i in range(len(self.down)):
            x = self.down[f"level{i}"](x)
        x = self.norm_out(self.mid(x))
        return self.conv_out(jax.nn.silu(x) if self.activate else x)


class Decoder(nnx.Module):
    """(B, h, w, inner) -> (B, H, W, C). Level 0 is the finest, and the last to run.

    Args of the constructor:
      blocks: residual blocks per level; by default one more than the encoder has.
      activate: as of the `Encoder`.
    """

    def __init__(
        self, config: TowerConfig, rngs: nnx.Rngs, *, blocks: int | None = None, activate: bool = True
    ) -> None:
        self.activate = activate
        widths, dtype, last = config.widths, jnp.dtype(config.dtype), len(config.widths) - 1
        self.conv_in = conv(config.inner, widths[-1], 3, dtype, rngs)
        self.mid = Middle(config, rngs)
        self.up = nnx.Dict(
            {
                f"level{i}": Level(
                    config,
                    widths[min(i + 1, last)],
                    widths[i],
                    config.blocks + 1 if blocks is None else blocks,
                    attention=i in config.decoder_attention,
                    resample="up" if i else "",
                    rngs=rngs,
                )
                for i in range(last + 1)
            }
        )
        self.norm_out = norm(widths[0], config.groups, rngs)
        self.conv_out = conv(widths[0], config.image[2], 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(x))
        for i in reversed(range(len(self.up))):
            x = self.up[f"level{i}"](x)
        x = self.norm_out(x)
        return self.conv_out(jax.nn.silu(x) if self.activate else x)
