"""The binary autoencoder of binary latent diffusion: a convolutional autoencoder with a vector of bits per position.

Wang et al. 2023, "Binary Latent Diffusion", arXiv 2304.04820, section 3.1. The towers are VQGAN's without a SiLU before
their last convolutions, and the decoder has as many blocks as the encoder. Any `Quantizer` of bits may stand in for the
Bernoulli one: lookup-free and binary spherical quantisation train on the same network.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.discrete import Discrete, DiscreteModule
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.towers import (
    Decoder,
    Encoder,
    TowerSizes,
    check_images,
    check_latents,
    check_levels,
    conv,
    norm,
)

__all__ = ["BinaryAutoencoder", "BinaryAutoencoderConfig"]


@dataclasses.dataclass(frozen=True)
class BinaryAutoencoderConfig(TowerSizes, Discrete):
    """An autoencoder of bits; itself the `gen.tokenizers.base.DiscreteTokenizer`.

    The defaults are the published C64; C128 has 128 bits a position and 6 `decoder_blocks`.

    Attributes:
      image: (H, W, C) of the images it is used on.
      quantizer: a `gen.tokenizers.quantizers.base.Quantizer` of bits.
      width: channels of the finest level.
      mult: factor on it at each level, finest first; each further level halves the image.
      blocks, decoder_blocks: residual blocks per level of the encoder and of the decoder.
      inner: channels at the two towers' narrow ends, from which bits are projected and to which codes are.
      attention: levels (0 = finest) whose every residual block is followed by self-attention.
      normed: a group norm stands before the decoder (norm_first).
      groups: of the group norms.
      dtype: compute type of convolutions and attention; parameters, norms and quantizer are float32.
      remat: what the backward pass recomputes: nothing, or every residual block.

    Raises GenError where the numbers do not fit together.
    """

    middle_attention: ClassVar[bool] = True

    image: tuple[int, int, int] = (256, 256, 3)
    quantizer: Any = Binary(64, squashed_loss=True)
    width: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    decoder_blocks: int = 2
    inner: int = 256
    attention: tuple[int, ...] = (4,)
    normed: bool = True
    groups: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        if self.quantizer.kind != "bits":
            raise GenError(f"a binary autoencoder needs a quantizer of bits; got one of {self.quantizer.kind}")
        check_levels(self.image, self.width, self.mult, min(self.blocks, self.decoder_blocks), self.groups)
        if self.inner < 1 or (self.normed and self.inner % self.groups):
            raise GenError(f"inner {self.inner} does not divide into {self.groups} groups; change one of them")
        for level in self.attention:
            if not 0 <= level < len(self.mult):
                raise GenError(f"attention at level {level}; this autoencoder has levels 0 to {len(self.mult) - 1}")

    @property
    def decoder_attention(self) -> tuple[int, ...]:
        """Levels of the decoder with attention: those of the encoder."""
        return self.attention

    @property
    def spec(self) -> TokenizerSpec:
        """Bits (H / factor, W / factor, bits of a position)."""
        (h, w, _), bits = self.image, self.quantizer.width
        return TokenizerSpec("bits", (h // self.factor, w // self.factor, bits), self.image, width=bits)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "decoder/conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "BinaryAutoencoder":
        """Gives the module with freshly drawn parameters."""
        return BinaryAutoencoder(self, rngs)


class BinaryAutoencoder(DiscreteModule):
    """The network of a `BinaryAutoencoderConfig`."""

    def __init__(self, config: BinaryAutoencoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        bits = config.quantizer.width
        self.encoder = Encoder(config, config.inner, rngs, activate=False)
        self.decoder = Decoder(config, rngs, blocks=config.decoder_blocks, activate=False)
        if config.normed:
            self.norm_in = norm(config.inner, config.groups, rngs)
        self.to_bits = conv(config.inner, bits, 1, jnp.float32, rngs)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (bits, config.inner)))
        self.quantizer = config.quantizer.build(rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """(B, H, W, C) in [-1, 1] -> what the quantizer takes, (B, H / factor, W / factor, bits) float32."""
        check_images(images, self.config.image[2], self.config.factor)
        return self.to_bits(self.encoder(images).astype(jnp.float32))

    def pixels(self, codes: jax.Array) -> jax.Array:
        """(B, h, w, bits) -> (B, h factor, w factor, C) float32, about [-1, 1]."""
        check_latents(codes, self.config.quantizer.width)
        inner = codes @ self.embedding[...]
        return self.decoder(self.norm_in(inner) if self.config.normed else inner).astype(jnp.float32)
