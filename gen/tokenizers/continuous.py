"""What tokenizers of continuous latents have in common: their functions are methods of their module."""

import abc
import dataclasses
from typing import Any

import jax
from flax import nnx

from gen.nn.network import Cond, Network, Params
from gen.tokenizers.base import Exact, Gaussian, TokenizerSpec

__all__ = ["Continuous"]


@dataclasses.dataclass(frozen=True)
class Continuous(abc.ABC):
    """A `gen.tokenizers.base.Tokenizer` whose module has ``encode(images)`` and ``decode(latents)``."""

    @property
    @abc.abstractmethod
    def spec(self) -> TokenizerSpec:
        """Does what `gen.tokenizers.base.Tokenizer` says."""

    @property
    @abc.abstractmethod
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives the module with freshly drawn parameters."""

    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Gaussian | Exact:
        """images (B, *spec.image) float in [-1, 1] -> posterior over latents (B, *spec.shape), float32.

        Raises GenError for images that the tokenizer does not take.
        """
        del cond, keys
        return Network(self).apply(params, images, method="encode")

    def decode(
        self,
        params: Params,
        latents: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """latents (B, *spec.shape) -> images (B, *spec.image) float32, about [-1, 1], unclipped."""
        del cond, keys, options
        return Network(self).apply(params, latents, method="decode")
