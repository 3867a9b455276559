"""The convolutional autoencoder with a quantizer in place of the Gaussian: VQGAN, and LlamaGen's tokenizer.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", arXiv 2012.09841; Sun et al. 2024,
"Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", arXiv 2406.06525, whose codes are short
(8 channels) and of length 1. The network is fully convolutional.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.errors import GenError
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.discrete import Discrete, DiscreteModule
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.towers import Decoder, Encoder, TowerSizes, check_images, check_latents, check_levels, conv

__all__ = ["SIZES", "VQGAN", "VQGANConfig", "vqgan"]


@dataclasses.dataclass(frozen=True)
class VQGANConfig(TowerSizes, Discrete):
    """A quantising autoencoder; itself the `gen.tokenizers.base.DiscreteTokenizer`. The defaults are LlamaGen's VQ-16.

    The last level's every residual block is followed by self-attention, and so is the first of the middle.

    Attributes:
      image: (H, W, C) of the images it is used on.
      quantizer: a `gen.tokenizers.quantizers.base.Quantizer` of tokens or of bits.
      width: channels of the finest level.
      mult: factor on it at each level, finest first; each further level halves the image.
      decoder_mult: the same of the decoder where it is another one; () for that of the encoder.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      inner: channels at the two towers' narrow ends (z_channels).
      quant_kernel: side of the two convolutions between the narrow ends and the quantizer.
      groups: of the group norms.
      dtype: compute type of convolutions and attention; parameters, norms and quantizer are float32.
      remat: what the backward pass recomputes: nothing, or every residual block.

    Raises GenError where the numbers do not fit together.
    """

    middle_attention: ClassVar[bool] = True

    image: tuple[int, int, int] = (256, 256, 3)
    quantizer: Any = VQ(16384, 8, normalize=True)
    width: int = 128
    mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_mult: tuple[int, ...] = ()
    blocks: int = 2
    inner: int = 256
    quant_kernel: int = 1
    groups: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        if self.inner < 1 or self.quant_kernel % 2 == 0:
            raise GenError(
                f"inner {self.inner} and quant_kernel {self.quant_kernel}; give at least one channel and an odd kernel"
            )
        if len(self.decoder_mult) not in (0, len(self.mult)):
            raise GenError(
                f"the encoder has {len(self.mult)} levels and the decoder {len(self.decoder_mult)}: images would come "
                "back in another size; give as many"
            )
        for mult in (self.mult, self.decoder_mult or self.mult):
            check_levels(self.image, self.width, mult, self.blocks, self.groups)

    @property
    def attention(self) -> tuple[int, ...]:
        """Gives the encoder's levels with attention: the last."""
        return (len(self.mult) - 1,)

    @property
    def decoder_attention(self) -> tuple[int, ...]:
        """Gives the decoder's levels with attention: the last."""
        return self.attention

    @property
    def spec(self) -> TokenizerSpec:
        """Tokens (H / factor, W / factor), or bits (H / factor, W / factor, width of the quantizer)."""
        (h, w, _), quantizer = self.image, self.quantizer
        grid = (h // self.factor, w // self.factor)
        shape = (*grid, quantizer.width) if quantizer.kind == "bits" else grid
        return TokenizerSpec(quantizer.kind, shape, self.image, quantizer.vocabulary, quantizer.width)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "decoder/conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "VQGAN":
        """Gives the module with freshly drawn parameters."""
        return VQGAN(self, rngs)


# name -> factors of the levels, of the published networks
SIZES: dict[str, tuple[int, ...]] = {"vq-8": (1, 2, 2, 4), "vq-16": (1, 1, 2, 2, 4)}


def vqgan(name: str, **changes: Any) -> VQGANConfig:
    """Gives a published tokenizer of LlamaGen by name (`SIZES`). Raises GenError for an unknown name."""
    if name not in SIZES:
        raise GenError(f"unknown VQ tokenizer '{name}'; {suggest(name, SIZES)}")
    return dataclasses.replace(VQGANConfig(mult=SIZES[name]), **changes)


class VQGAN(DiscreteModule):
    """The network of a `VQGANConfig`."""

    def __init__(self, config: VQGANConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, size = config.quantizer.width, config.quant_kernel
        self.encoder = Encoder(config, config.inner, rngs)
        self.decoder = Decoder(dataclasses.replace(config, mult=config.decoder_mult or config.mult), rngs)
        self.quant = conv(config.inner, width, size, jnp.float32, rngs)
        self.post_quant = conv(width, config.inner, size, jnp.float32, rngs)
        self.quantizer = config.quantizer.build(rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """(B, H, W, C) in [-1, 1] -> (B, H / factor, W / factor, width of the quantizer) float32."""
        check_images(images, self.config.image[2], self.config.factor)
        return self.quant(self.encoder(images).astype(jnp.float32))

    def pixels(self, codes: jax.Array) -> jax.Array:
        """(B, h, w, width of the quantizer) -> (B, h factor, w factor, C) float32, about [-1, 1]."""
        check_latents(codes, self.config.quantizer.width)
        return self.decoder(self.post_quant(codes)).astype(jnp.float32)
