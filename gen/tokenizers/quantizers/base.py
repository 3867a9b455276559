"""What a quantizer offers to every tokenizer of tokens or bits, and what is logged of its ids."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.tokenizers.base import Quantized

__all__ = ["Quantizer", "QuantizerModule", "frequencies", "usage", "used", "within"]


class QuantizerModule(Protocol):
    """The NNX module of a quantizer: codebooks and their averages are its variables.

    It quantises in float32 whatever the tokenizer computes in, and sees the global batch under any sharding.
    """

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the codes of encoder outputs.

        Args:
          z: (B, ..., width) float.
          keys: (B,) typed keys, one a sample, for quantizers that draw while training; None where nothing is drawn.

        Returns:
          ids (B, ...) int32, or bits (B, ..., width) uint8; codes (B, ..., width) float32 by the straight-through
          estimator; losses (B,) unweighted; statistics by path from this module, each a mean over the batch.
        """
        ...

    def embed(self, ids: jax.Array) -> jax.Array:
        """Gives the code vectors (B, ..., width) float32 of ids, equal to `codes` in value."""
        ...

    def snap(self, codes: jax.Array) -> Quantized:
        """Gives the nearest code vectors of vectors (B, ..., width) that are on the scale of codes.

        What a call gives, except where a call first bounds the encoder's outputs (FSQ).
        """
        ...


class Quantizer(Protocol):
    """A quantizer's configuration, a frozen dataclass."""

    kind: ClassVar[Literal["tokens", "bits"]]

    @property
    def vocabulary(self) -> int | None:
        """Gives the number of token ids; None for bits."""
        ...

    @property
    def width(self) -> int:
        """Channels of the vectors it takes and of the code vectors it gives."""
        ...

    def build(self, rngs: Any) -> QuantizerModule:
        """Gives the module with freshly drawn parameters."""
        ...


def within(prefix: str, quantized: Quantized) -> Quantized:
    """Gives the same with its statistics named by their path in a network that holds the quantizer at `prefix`."""
    statistics = {f"{prefix}/{path}": value for path, value in quantized.statistics.items()}
    return dataclasses.replace(quantized, statistics=statistics)


def frequencies(ids: jax.Array, vocabulary: int | None, weight: jax.Array | None = None) -> jax.Array:
    """Says how often each token id occurs among ids (B, ...), or how often each bit of (B, ..., width) is 1.

    Args:
      vocabulary: number of token ids; None for bits.
      weight: (B,) of the samples; 1 by default.

    Returns:
      (vocabulary,) float32 that add up to the sum of the weights, or (width,) from 0 to it.
    """
    rows = ids.reshape(len(ids), -1) if vocabulary is not None else ids.reshape(len(ids), -1, ids.shape[-1])
    share = jnp.ones(len(ids)) if weight is None else weight
    if vocabulary is None:
        return (rows.astype(jnp.float32).mean(axis=1) * share[:, None]).sum(axis=0)
    shares = jnp.broadcast_to(share[:, None] / rows.shape[1], rows.shape)
    return jnp.zeros(vocabulary).at[rows].add(shares)


def used(frequency: Any, vocabulary: int | None) -> dict[str, Any]:
    """Says what `frequencies` of one sample on average say of a codebook; see `usage`."""
    if vocabulary is None:
        share = ((frequency > 0) & (frequency < 1)).mean()
        entropy = (_surprise(frequency) + _surprise(1 - frequency)).mean()
    else:
        share, entropy = (frequency > 0).mean(), _surprise(frequency).sum()
    return {"usage": share, "entropy": entropy, "perplexity": 2.0**entropy}


def usage(ids: jax.Array, vocabulary: int | None) -> Mapping[str, jax.Array]:
    """Says how much of a codebook the ids of a batch use: scalars for the training log.

    Args:
      ids: (B, ...) tokens from 0 to vocabulary - 1, or bits (B, ..., width).
      vocabulary: number of token ids; None for bits.

    Returns:
      ``usage``: the fraction of the token ids that occur, or of the bits that take both values. ``entropy``: of the
      batch's distribution of ids, in bits, or the mean entropy of one bit. ``perplexity``: 2^entropy, the number of
      equally frequent ids with that entropy.
    """
    return used(frequencies(ids, vocabulary) / len(ids), vocabulary)


def _surprise(p: Any) -> Any:
    """-p log2 p, 0 at p = 0."""
    return -p * jnp.log2(jnp.where(p > 0, p, 1.0))
