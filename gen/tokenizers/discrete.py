"""What tokenizers of tokens and bits have in common: features, a quantizer, and pixels of its codes."""

import abc
import dataclasses
from typing import Any

import jax
from flax import nnx

from gen.nn.network import Cond, Network, Params
from gen.tokenizers.base import Quantized, TokenizerSpec
from gen.tokenizers.quantizers.base import QuantizerModule, within

__all__ = ["Discrete", "DiscreteModule"]


@dataclasses.dataclass(frozen=True)
class Discrete(abc.ABC):
    """A `gen.tokenizers.base.DiscreteTokenizer` whose functions are methods of its `DiscreteModule`."""

    @property
    @abc.abstractmethod
    def spec(self) -> TokenizerSpec:
        """Does what `gen.tokenizers.base.Tokenizer` says."""

    @property
    @abc.abstractmethod
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> "DiscreteModule":
        """Gives the module with freshly drawn parameters."""

    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Quantized:
        """images (B, H, W, C) float in [-1, 1] -> ids (B, *spec.shape) and codes (B, ..., spec.width).

        Raises GenError for images that the tokenizer does not take.
        """
        del cond
        return Network(self).apply(params, images, keys, method="encode")

    def snap(self, params: Params, codes: jax.Array) -> Quantized:
        """Gives the nearest codes of vectors (B, ..., spec.width)."""
        return Network(self).apply(params, codes, method="snap")

    def embed(self, params: Params, ids: jax.Array) -> jax.Array:
        """Code vectors (B, ..., spec.width) of ids (B, *spec.shape)."""
        return Network(self).apply(params, ids, method="embed")

    def decode(
        self,
        params: Params,
        codes: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """codes (B, ..., spec.width) -> images (B, H, W, C) float32, about [-1, 1], unclipped."""
        del cond, keys, options
        return Network(self).apply(params, codes, method="decode")


class DiscreteModule(nnx.Module):
    """The network of a `Discrete`: `features` and `pixels`, with `quantizer` between them."""

    quantizer: QuantizerModule

    @abc.abstractmethod
    def features(self, images: jax.Array) -> jax.Array:
        """images (B, H, W, C) in [-1, 1] -> what the quantizer takes, (B, ..., width)."""

    @abc.abstractmethod
    def pixels(self, codes: jax.Array) -> jax.Array:
        """codes (B, ..., width) -> images (B, H, W, C) float32."""

    def encode(self, images: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the quantised features; statistics by their path in this module."""
        return within("quantizer", self.quantizer(self.features(images), keys))

    def snap(self, codes: jax.Array) -> Quantized:
        """Does what `gen.tokenizers.base.DiscreteTokenizer` says."""
        return within("quantizer", self.quantizer.snap(codes))

    def embed(self, ids: jax.Array) -> jax.Array:
        """Does what `gen.tokenizers.base.DiscreteTokenizer` says."""
        return self.quantizer.embed(ids)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return self.pixels(codes)
