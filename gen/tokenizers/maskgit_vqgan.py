"""MaskGIT's VQGAN: the convolutional tokenizer behind TiTok's proxy codes, and TiTok's pixel decoder.

Chang et al. 2022, "MaskGIT", arXiv 2202.04200, in the layout of the weights that TiTok (Yu et al. 2024, arXiv
2406.07550) was trained with. No attention; the network is fully convolutional. Where a residual block changes the
number of channels, its 1x1 shortcut reads the block's own branch and not its input, which is lost: the published
weights were trained so.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.discrete import Discrete, DiscreteModule
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.towers import TowerSizes, check_images, check_latents, check_levels, conv, norm
from gen.training.sharding import constrain

__all__ = ["Decoder", "Encoder", "MaskGITVQGAN", "MaskGITVQGANConfig"]


@dataclasses.dataclass(frozen=True)
class MaskGITVQGANConfig(TowerSizes, Discrete):
    """The VQ autoencoder of MaskGIT; itself the `gen.tokenizers.base.DiscreteTokenizer`. The defaults are published.

    Attributes:
      image: (H, W, C) of the images it is used on.
      width: channels of the finest level.
      mult: factor on it at each level, finest first; each further level halves the image.
      blocks: residual blocks per level and in the middle of each tower.
      quantizer: the codebook, whose width is that of the towers' narrow ends.
      groups: of the group norms.
      dtype: compute type of the convolutions; parameters, norms and quantizer are float32.
      remat: what the backward pass recomputes: nothing, or every residual block.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int] = (256, 256, 3)
    width: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    quantizer: VQ = VQ(1024, 256)
    groups: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        check_levels(self.image, self.width, self.mult, self.blocks, self.groups)

    @property
    def spec(self) -> TokenizerSpec:
        """Tokens (H / factor, W / factor)."""
        h, w, _ = self.image
        shape, quantizer = (h // self.factor, w // self.factor), self.quantizer
        return TokenizerSpec("tokens", shape, self.image, quantizer.vocabulary, quantizer.width)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "decoder/conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "MaskGITVQGAN":
        """Gives the module with freshly drawn parameters."""
        return MaskGITVQGAN(self, rngs)


class Block(nnx.Module):
    """h + x, or h + shortcut(h) where channels change; h = conv2(silu(norm2(conv1(silu(norm1(x))))))."""

    def __init__(self, inputs: int, outputs: int, config: MaskGITVQGANConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        self.changes = inputs != outputs
        self.norm1 = norm(inputs, config.groups, rngs)
        self.conv1 = conv(inputs, outputs, 3, dtype, rngs, bias=False)
        self.norm2 = norm(outputs, config.groups, rngs)
        self.conv2 = conv(outputs, outputs, 3, dtype, rngs, bias=False)
        if self.changes:
            self.shortcut = conv(outputs, outputs, 1, dtype, rngs, bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv2(jax.nn.silu(self.norm2(self.conv1(jax.nn.silu(self.norm1(x))))))
        return h + (self.shortcut(h) if self.changes else x)


class Blocks(nnx.Module):
    """Residual blocks at one resolution, the first of which may change the number of channels."""

    def __init__(self, inputs: int, outputs: int, config: MaskGITVQGANConfig, rngs: nnx.Rngs) -> None:
        self.remat = config.remat
        self.res = nnx.Dict(
            {f"block{i}": Block(outputs if i else inputs, outputs, config, rngs) for i in range(config.blocks)}
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.res.values():
            x = constrain(jax.checkpoint(block)(x) if self.remat == "full" else block(x))
        return x


class Encoder(nnx.Module):
    """Images (B, H, W, C) in [0, 1] -> (B, h, w, width of the codes): halved by averages of 2x2 pixels."""

    def __init__(self, config: MaskGITVQGANConfig, rngs: nnx.Rngs) -> None:
        widths, dtype = config.widths, jnp.dtype(config.dtype)
        before = (config.width, *widths)
        self.conv_in = conv(config.image[2], config.width, 3, dtype, rngs, bias=False)
        self.down = nnx.Dict({f"level{i}": Blocks(before[i], w, config, rngs) for i, w in enumerate(widths)})
        self.mid = Blocks(widths[-1], widths[-1], config, rngs)
        self.norm_out = norm(widths[-1], config.groups, rngs)
        self.conv_out = conv(widths[-1], config.quantizer.width, 1, dtype, rngs)

    def level(self, x: jax.Array, i: int) -> jax.Array:
        """Gives the blocks of level i and, at all levels but the last, the halving."""
        x = self.down[f"level{i}"](x)
        if i == len(self.down) - 1:
            return x
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for i in range(len(self.down)):
            x = self.level(x, i)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Codes (B, h, w, width) -> images (B, H, W, C) float32, about [0, 1]. Level 0 is the finest, and the last to run.

    By itself it is the pixel decoder of a two-stage TiTok.
    """

    def __init__(self, config: MaskGITVQGANConfig, rngs: nnx.Rngs) -> None:
        widths, dtype, last = config.widths, jnp.dtype(config.dtype), len(config.widths) - 1
        self.conv_in = conv(config.quantizer.width, widths[-1], 3, dtype, rngs)
        self.mid = Blocks(widths[-1], widths[-1], config, rngs)
        self.up = nnx.Dict(
            {f"level{i}": Blocks(widths[min(i + 1, last)], w, config, rngs) for i, w in enumerate(widths)}
        )
        self.upsample = nnx.Dict({f"level{i}": conv(w, w, 3, dtype, rngs) for i, w in enumerate(widths) if i})
        self.norm_out = norm(widths[0], config.groups, rngs)
        self.conv_out = conv(widths[0], config.image[2], 3, dtype, rngs)

    def level(self, x: jax.Array, i: int) -> jax.Array:
        """Gives the blocks of level i and, at all levels but the finest, the doubling."""
        x = self.up[f"level{i}"](x)
        return self.upsample[f"level{i}"](x.repeat(2, axis=1).repeat(2, axis=2)) if i else x

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(x))
        for i in reversed(range(len(self.up))):
            x = self.level(x, i)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)


class MaskGITVQGAN(DiscreteModule):
    """The network of a `MaskGITVQGANConfig`; the published towers see images in [0, 1]."""

    def __init__(self, config: MaskGITVQGANConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        self.quantizer = config.quantizer.build(rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """images (B, H, W, C) in [-1, 1] -> (B, h, w, width) float32."""
        check_images(images, self.config.image[2], self.config.factor)
        return self.encoder(0.5 * images + 0.5).astype(jnp.float32)

    def pixels(self, codes: jax.Array) -> jax.Array:
        """codes (B, h, w, width) -> images (B, H, W, C), about [-1, 1]."""
        check_latents(codes, self.config.quantizer.width)
        return 2.0 * self.decoder(codes) - 1.0
