"""A discrete tokenizer seen as a continuous one, so that models of continuous latents work on its codes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gen.errors import GenError
from gen.nn.network import Cond, Network, Params, param_shapes
from gen.tokenizers.base import Gaussian, TokenizerSpec

__all__ = ["CodeVectors", "code_table", "decodable"]


@dataclasses.dataclass(frozen=True)
class CodeVectors:
    """The code vectors of a tokenizer of tokens or bits as latents; itself a `gen.tokenizers.base.Tokenizer`.

    Encoding gives the codes, without spread; decoding first takes each vector to the nearest code. Its parameters are
    the tokenizer's.

    Attributes:
      discrete: the tokenizer.

    Raises GenError for a tokenizer of continuous latents.
    """

    discrete: Any

    def __post_init__(self) -> None:
        if self.discrete.spec.kind == "continuous":
            raise GenError("a tokenizer of continuous latents has no code vectors; use it as it is")

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents of the shape of one image's code vectors."""
        own: TokenizerSpec = self.discrete.spec
        return TokenizerSpec("continuous", _shape(self.discrete), own.image, conditions=own.conditions)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        path: str = self.discrete.last_layer
        return path

    def build(self, rngs: Any) -> Any:
        """Gives the tokenizer's module."""
        return self.discrete.build(rngs)

    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Gaussian:
        """images (B, H, W, C) float in [-1, 1] -> their codes, as a Gaussian without spread."""
        codes = self.discrete.encode(params, images, cond=cond, keys=keys).mode()
        return Gaussian(codes, jnp.full_like(codes, -jnp.inf))

    def decode(
        self,
        params: Params,
        latents: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """latents (B, *spec.shape) -> images (B, H, W, C) of the nearest codes."""
        codes = self.discrete.embed(params, self.discrete.snap(params, latents).ids)
        decoded: jax.Array = self.discrete.decode(params, codes, cond=cond, keys=keys, options=options)
        return decoded


@functools.cache
def _shape(tokenizer: Any) -> tuple[int, ...]:
    ids = jax.ShapeDtypeStruct((1, *tokenizer.spec.shape), jnp.uint8 if tokenizer.spec.kind == "bits" else jnp.int32)
    return tuple(jax.eval_shape(tokenizer.embed, param_shapes(tokenizer), ids).shape[1:])


def code_table(tokenizer: Any, params: Params) -> jax.Array:
    """Gives the code vectors (V, width) float32 of all ids of a tokenizer of tokens, on one scale or several.

    Raises GenError for a tokenizer of other latents.
    """
    spec = tokenizer.spec
    if spec.kind != "tokens":
        raise GenError(f"a table of codes is asked of a tokenizer of {spec.kind}; give one of tokens")
    if spec.scales:  # `embed` gives the sum of the scales' maps
        codebook: jax.Array = params["quantizer"]["embedding"]
        return codebook
    rows = -(-spec.vocabulary // math.prod(spec.shape))
    ids = jnp.arange(rows * math.prod(spec.shape), dtype=jnp.int32) % spec.vocabulary
    codes: jax.Array = tokenizer.embed(params, ids.reshape(rows, *spec.shape))
    return codes.reshape(-1, spec.width)[: spec.vocabulary]


def decodable(tokenizer: Any, params: Params, vectors: jax.Array) -> jax.Array:
    """Gives what the tokenizer decodes of one vector for each token, (B, tokens, width), which need not be codes."""
    if tokenizer.spec.scales:
        found: jax.Array = Network(tokenizer.quantizer).apply(params["quantizer"], vectors, method="together")
        return found
    return vectors.reshape(len(vectors), *tokenizer.spec.shape, tokenizer.spec.width)
