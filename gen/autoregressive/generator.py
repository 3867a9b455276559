"""Generators of token models: tokens, their code vectors, and the tokenizer's image of them."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gen.autoregressive.base import TokenModel
from gen.config import fingerprint
from gen.nn.network import Cond
from gen.sampling.generator import GeneratorParams, LatentGenerator, decode

__all__ = ["TokenGenerator", "TokenSamplerConfig", "WrittenTokens"]


class TokenSamplerConfig(abc.ABC):
    """What the samplers of token models share: a frozen dataclass that draws tokens.

    Attributes:
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.
    """

    decoding: Any

    @abc.abstractmethod
    def calls(self, model: Any) -> int:
        """Tells how many network calls a sample costs; a guided call, of two halves in one batch, counts once."""

    @abc.abstractmethod
    def tokens(self, model: Any, params: GeneratorParams, keys: jax.Array, cond: Cond, tokenizer: Any) -> jax.Array:
        """Draws sequences (B, N) int32, of bits (B, N, K); sample i depends on keys[i] and cond[i] alone.

        Args:
          model: the token model.
          params: arrays by role: ``net``, and ``tokenizer`` for models that read code vectors.
          keys: (B,) typed PRNG keys.
          cond: conditions by name.
          tokenizer: configuration of the tokenizer, or None.
        """


@dataclasses.dataclass(frozen=True)
class TokenGenerator(LatentGenerator):
    """Keys and conditions -> tokens -> code vectors -> image; a `gen.sampling.generator.Generator`.

    Attributes:
      model: the token model.
      sampler: draws its tokens.
      tokenizer: configuration of the tokenizer of these tokens, or None: samples are then the ids, as floats.

    Raises GenError for a tokenizer of other tokens.
    """

    model: Any
    sampler: Any
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            spec = self.tokenizer.spec
            self.model.check_tokens("the tokenizer", spec.kind, spec.shape, spec.vocabulary, spec.scales)

    @property
    def subject(self) -> TokenModel:
        """Gives the model."""
        found: TokenModel = self.model
        return found

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder, as the sampler states them."""
        return self.sampler.decoding

    @property
    def nfe(self) -> int:
        """Gives the network calls per sample."""
        calls: int = self.sampler.calls(self.model)
        return calls

    def tokens(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the drawn ids (B, *model.shape) int32, as a cache keeps them."""
        found: jax.Array = self.sampler.tokens(self.model, params, keys, cond, self.tokenizer)
        return self.subject.stored(found)

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says."""
        ids = self.tokens(params, keys, cond)
        if self.tokenizer is None:
            return ids.astype(jnp.float32)
        codes = self.tokenizer.embed(params["tokenizer"], ids)
        return decode(self.tokenizer, params, codes, keys=keys, cond=cond, options=self.options)


@dataclasses.dataclass(frozen=True)
class WrittenTokens:
    """A `gen.sampling.records.Make`: the ``tokens`` that a generator draws, or the bits under the same name.

    Attributes:
      generator: the model with its sampler.
    """

    generator: TokenGenerator

    @property
    def identity(self) -> str:
        """Does what `gen.sampling.records.Make.identity` says."""
        return f"written {fingerprint(self.generator)}"

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> dict[str, jax.Array]:
        """Does what `gen.sampling.records.Make.__call__` says."""
        return {"tokens": self.generator.tokens(params, keys, cond)}
