"""VAR's tokenizer: a convolutional autoencoder whose codes are a pyramid of token maps.

Tian et al. 2024, "Visual Autoregressive Modeling", arXiv 2404.02905, section 3.2. One network serves several image
sizes, each with scales of its own.
"""

import dataclasses

import jax

from gen.config import suggest
from gen.errors import GenError
from gen.nn.network import Network, Params
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.vqgan import VQGANConfig

__all__ = ["SCALES", "VARVQVAEConfig", "var_vqvae"]

# image side -> sides of the token maps, coarse to fine, as published
SCALES: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
}


@dataclasses.dataclass(frozen=True)
class VARVQVAEConfig(VQGANConfig):
    """A `VQGANConfig` with a multi-scale quantizer; the defaults are published. See there for the other attributes.

    Attributes:
      quantizer: its last scale is the side of the features.

    Raises GenError for images whose features are not of the last scale.
    """

    quantizer: Residual = Residual()
    width: int = 160
    inner: int = 32
    quant_kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        side = self.quantizer.scales[-1]
        if (self.image[0], self.image[1]) != (side * self.factor, side * self.factor):
            raise GenError(
                f"images of {self.image[0]}x{self.image[1]} give maps of {self.image[0] // self.factor}x"
                f"{self.image[1] // self.factor}, and the last scale is {side}; change image or quantizer.scales"
            )

    @property
    def spec(self) -> TokenizerSpec:
        """Tokens (tokens of all scales,), coarse to fine, row by row within a scale."""
        scales, quantizer = self.quantizer.scales, self.quantizer
        shape = (quantizer.tokens,)
        return TokenizerSpec("tokens", shape, self.image, quantizer.vocabulary, quantizer.width, scales)

    def scaled(self, scales: tuple[int, ...]) -> "VARVQVAEConfig":
        """Gives the same network with as many other scales, for images of the size that they are of.

        Raises GenError for another number of scales.
        """
        if len(scales) != len(self.quantizer.scales):
            raise GenError(f"scales {scales} for {len(self.quantizer.scales)} maps; give the tokenizer of these scales")
        side = scales[-1] * self.factor
        quantizer = dataclasses.replace(self.quantizer, scales=tuple(scales))
        return dataclasses.replace(self, image=(side, side, self.image[2]), quantizer=quantizer)

    def inputs(self, params: Params, ids: jax.Array) -> jax.Array:
        """Says what a next-scale model reads of ids (B, tokens): see `gen.tokenizers.quantizers.residual`."""
        quantizer: Params = params["quantizer"]
        return Network(self.quantizer).apply(quantizer, ids, method="inputs")


def var_vqvae(side: int = 256) -> VARVQVAEConfig:
    """Gives the published tokenizer for images of 256 or 512 pixels. Raises GenError for another size."""
    if side not in SCALES:
        raise GenError(f"no scales are published for images of {side}; {suggest(str(side), map(str, SCALES))}")
    return VARVQVAEConfig(image=(side, side, 3), quantizer=Residual(scales=SCALES[side]))
