"""Sampling of models that write tokens of bits, one token at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gen.autoregressive.sampler import WritingSampler, write
from gen.errors import GenError
from gen.nn.network import Cond
from gen.sampling.generator import GeneratorParams

__all__ = ["BitSampler"]


@dataclasses.dataclass(frozen=True)
class BitSampler(WritingSampler):
    """How a model is sampled that writes one token of bits at a time: each bit by its own probability.

    Attributes:
      guidance: the scale of classifier-free guidance by token (`gen.autoregressive.decoding.ScaleSchedule`).
      temperature: divides the guided logits; 0 takes the likelier values.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for a negative temperature.
    """

    temperature: float = 1.0
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise GenError(f"temperature {self.temperature} is negative; give a number from 0 on")

    def tokens(self, model: Any, params: GeneratorParams, keys: jax.Array, cond: Cond, tokenizer: Any) -> jax.Array:
        """Does what `TokenSamplerConfig.tokens` says."""
        del tokenizer

        def pick(logits: jax.Array, at: Any) -> jax.Array:
            if self.temperature == 0:
                return (logits > 0).astype(jnp.int32)
            own = jax.vmap(lambda key: jax.random.fold_in(key, at))(keys)
            uniforms = jax.vmap(lambda key: jax.random.uniform(key, logits.shape[1:]))(own)
            return (uniforms < jax.nn.sigmoid(logits / self.temperature)).astype(jnp.int32)

        return write(model, params["net"], cond, len(keys), pick, self.guidance)
