"""The convolutional KL autoencoder of latent diffusion: SD-VAE, LDM's kl-f4 to kl-f32, VA-VAE, MAR's VAE.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G; VA-VAE (Yao et al.
2025) keeps the network and changes its training. The network is fully convolutional: images may have any size that
`KLVAEConfig.factor` divides.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.errors import GenError
from gen.tokenizers.base import Gaussian, TokenizerSpec
from gen.tokenizers.continuous import Continuous
from gen.tokenizers.towers import Decoder, Encoder, TowerSizes, check_images, check_latents, check_levels, conv

__all__ = ["KLVAE", "SIZES", "KLVAEConfig", "kl_vae"]


@dataclasses.dataclass(frozen=True)
class KLVAEConfig(TowerSizes, Continuous):
    """A KL autoencoder; itself the `gen.tokenizers.base.Tokenizer`. The defaults are the SD-VAE (kl-f8).

    Attributes:
      image: (H, W, C) of the images it is used on.
      width: channels of the finest level.
      mult: factor on it at each level, finest first; each further level halves the image.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      channels: channels of the latents.
      inner: channels at the two towers' narrow ends, before quant_conv and after post_quant_conv (z_channels).
      attention, decoder_attention: levels (0 = finest) whose every residual block is followed by self-attention.
      middle_attention: self-attention between the two blocks at the lowest resolution.
      quant_conv: the 1x1 convolutions between towers and latents; without them `inner` equals `channels`.
      groups: of the group norms.
      dtype: compute type of convolutions and attention; parameters, norms and posterior are float32.
      remat: what the backward pass recomputes: nothing, or every residual block.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int] = (256, 256, 3)
    width: int = 128
    mult: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    channels: int = 4
    inner: int = 4
    attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    groups: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        if min(self.channels, self.inner) < 1:
            raise GenError("a KL autoencoder needs at least one channel; give positive numbers")
        check_levels(self.image, self.width, self.mult, self.blocks, self.groups)
        for level in (*self.attention, *self.decoder_attention):
            if not 0 <= level < len(self.mult):
                raise GenError(f"attention at level {level}; this autoencoder has levels 0 to {len(self.mult) - 1}")
        if not self.quant_conv and self.inner != self.channels:
            raise GenError(f"without quant_conv inner ({self.inner}) and channels ({self.channels}) must be equal")

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (H / factor, W / factor, channels)."""
        h, w, _ = self.image
        return TokenizerSpec("continuous", (h // self.factor, w // self.factor, self.channels), self.image)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "decoder/conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "KLVAE":
        """Gives the module with freshly drawn parameters."""
        return KLVAE(self, rngs)


# name -> (mult, channels, levels with attention in the encoder, in the decoder), vavae.md's published networks
SIZES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], tuple[int, ...]]] = {
    "kl-f4": ((1, 2, 4), 3, (), ()),
    "kl-f8": ((1, 2, 4, 4), 4, (), ()),
    "kl-f16": ((1, 1, 2, 2, 4), 16, (4,), (4,)),
    "kl-f32": ((1, 1, 2, 2, 4, 4), 64, (4, 5), (4, 5)),
    "sd-vae": ((1, 2, 4, 4), 4, (), ()),
    "vavae-f16d16": ((1, 1, 2, 2, 4), 16, (4,), (4,)),
    "vavae-f16d32": ((1, 1, 2, 2, 4), 32, (4,), (4,)),
    "vavae-f16d64": ((1, 1, 2, 2, 4), 64, (4,), (4,)),
    "mar-kl16": ((1, 1, 2, 2, 4), 16, (4,), ()),
}


def kl_vae(name: str, *, image: tuple[int, int, int] = (256, 256, 3), **changes: Any) -> KLVAEConfig:
    """Gives a published autoencoder by name (`SIZES`): latent diffusion's, the SD-VAE, VA-VAE's and MAR's.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown KL autoencoder '{name}'; {suggest(name, SIZES)}")
    mult, channels, attention, decoder_attention = SIZES[name]
    config = KLVAEConfig(image, 128, mult, 2, channels, channels, attention, decoder_attention)
    return dataclasses.replace(config, **changes)


class KLVAE(nnx.Module):
    """The network of a `KLVAEConfig`."""

    def __init__(self, config: KLVAEConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Encoder(config, 2 * config.inner, rngs)
        self.decoder = Decoder(config, rngs)
        if config.quant_conv:
            self.quant = conv(2 * config.inner, 2 * config.channels, 1, jnp.float32, rngs)
            self.post_quant = conv(config.channels, config.inner, 1, jnp.float32, rngs)

    def encode(self, images: jax.Array) -> Gaussian:
        """(B, H, W, C) in [-1, 1] -> Gaussian over (B, H / factor, W / factor, channels), float32."""
        config = self.config
        check_images(images, config.image[2], config.factor)
        moments = self.encoder(images).astype(jnp.float32)
        mean, logvar = jnp.split(self.quant(moments) if config.quant_conv else moments, 2, axis=-1)
        return Gaussian(mean, logvar)

    def decode(self, latents: jax.Array) -> jax.Array:
        """(B, h, w, channels) -> (B, h factor, w factor, C) float32."""
        check_latents(latents, self.config.channels)
        return self.decoder(self.post_quant(latents) if self.config.quant_conv else latents).astype(jnp.float32)
