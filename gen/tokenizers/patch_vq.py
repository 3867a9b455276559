"""Vector quantisation of patches: no encoder, and a decoder of one dense layer.

The oldest of the tokenizers that name patches (Gersho and Gray 1992, "Vector Quantization and Signal Compression"). A
token says what one patch looks like and nothing of its surroundings. That is poor compression of photographs, but on
few small images such tokens are easier to model than those of a network that may hide anything in them.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.layers import linear, patchify, unpatchify
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.discrete import Discrete, DiscreteModule
from gen.tokenizers.quantizers.vq import VQ

__all__ = ["PatchVQ", "PatchVQConfig"]


@dataclasses.dataclass(frozen=True)
class PatchVQConfig(Discrete):
    """Each patch becomes the nearest code; itself the `gen.tokenizers.base.DiscreteTokenizer`.

    The dense layer of the decoder starts as the identity.

    Attributes:
      image: (H, W, C) of the images, multiples of the patch.
      patch: side of a square patch in pixels.
      quantizer: a `gen.tokenizers.quantizers.vq.VQ` as wide as a patch has entries.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int]
    patch: int
    quantizer: VQ

    last_layer: ClassVar[str] = "out/kernel"

    def __post_init__(self) -> None:
        h, w, channels = self.image
        if h % self.patch or w % self.patch:
            raise GenError(
                f"images of {h}x{w} do not divide into patches of {self.patch}; choose a patch that divides both"
            )
        if self.quantizer.width != self.patch**2 * channels:
            raise GenError(
                f"codes have width {self.quantizer.width}, and a patch {self.patch**2 * channels} entries; make the "
                "quantizer as wide"
            )

    @property
    def spec(self) -> TokenizerSpec:
        """Tokens (H / patch, W / patch)."""
        (h, w, _), quantizer = self.image, self.quantizer
        grid = (h // self.patch, w // self.patch)
        return TokenizerSpec("tokens", grid, self.image, quantizer.vocabulary, quantizer.width)

    def build(self, rngs: nnx.Rngs) -> "PatchVQ":
        """Gives the module with freshly drawn codes."""
        return PatchVQ(self, rngs)


def _identity(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """The identity as an initialiser of square matrices."""
    del key
    return jnp.eye(shape[0], dtype=dtype)


class PatchVQ(DiscreteModule):
    """The network of a `PatchVQConfig`."""

    def __init__(self, config: PatchVQConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.quantizer.width
        self.out = linear(width, width, init=_identity, rngs=rngs)
        self.quantizer: Any = config.quantizer.build(rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """(B, H, W, C) in [-1, 1] -> (B, H / patch, W / patch, entries of a patch).

        Raises GenError for images of another size.
        """
        if images.shape[1:] != self.config.image:
            raise GenError(f"images are {images.shape[1:]}, and the tokenizer takes {self.config.image}; resize them")
        tokens = patchify(images, self.config.patch)
        return tokens.reshape(len(images), *self.config.spec.shape, -1)

    def pixels(self, codes: jax.Array) -> jax.Array:
        """(B, H / patch, W / patch, entries of a patch) -> (B, H, W, C) float32, about [-1, 1]."""
        h, w, _ = self.config.image
        tokens = codes.reshape(len(codes), math.prod(self.config.spec.shape), -1)
        return unpatchify(self.out(tokens), (h, w), self.config.patch).astype(jnp.float32)
