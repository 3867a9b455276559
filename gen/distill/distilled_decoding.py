"""Distilled Decoding 1: a generator of one or two calls from an autoregressive teacher (arXiv 2412.17153).

The teacher's own randomness is made a function of noise: token i is where the probability flow of its distribution
takes the noise eps_i (`gen.distill.code_flow`). Noise and tokens then belong to each other, and a network can learn to
say all tokens from the noise alone, or, given the first t of them, the rest. Two heads answer: logits over the codes
are surer for early tokens, on which all others depend, and code vectors go straight into the tokenizer's decoder.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gen.autoregressive.base import cross_entropy

__all__ = ["answered", "distillation_loss", "nearest", "perturbed", "sampled", "spliced"]

Student = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # (x, known) -> logits, vectors


def _given(known: jax.Array, length: int) -> jax.Array:
    """(B, N, 1) bool: which positions hold data."""
    return (jnp.arange(length) < known[:, None])[..., None]


def perturbed(data: jax.Array, noise: jax.Array, known: jax.Array) -> jax.Array:
    """Gives x_t: the first `known` (B,) vectors of data (B, N, D), noise after them."""
    return jnp.where(_given(known, data.shape[1]), data, noise)


def nearest(codes: jax.Array, x: jax.Array) -> jax.Array:
    """Gives the ids (...) int32 of the codes (V, D) that are nearest to x (..., D)."""
    inner = jnp.matmul(x, codes.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codes).sum(-1) - 2.0 * inner, axis=-1).astype(jnp.int32)


def answered(
    x: jax.Array, known: jax.Array, logits: jax.Array, vectors: jax.Array, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gives the student's ids (B, N) and vectors (B, N, D), those of known positions replaced by what they hold."""
    given = _given(known, x.shape[1])
    ids = jnp.where(given[..., 0], nearest(codes, x), jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return ids, jnp.where(given, x, vectors)


def spliced(ids: jax.Array, vectors: jax.Array, codes: jax.Array, split: int) -> jax.Array:
    """Gives (B, N, D): the codes of the ids before position `split`, the vectors from there on."""
    return jnp.where((jnp.arange(ids.shape[1]) < split)[:, None], codes[ids], vectors)


def sampled(student: Student, noise: jax.Array, codes: jax.Array, starts: Sequence[int], split: int) -> jax.Array:
    """Gives code vectors (B, N, D) of noise by a call for each of `starts`, rising from 0.

    The call at t keeps the first t vectors of the one before; all others start again from their own noise.
    """
    x = noise
    for start in starts:
        known = jnp.full(len(x), start, jnp.int32)
        x = perturbed(x, noise, known)
        x = spliced(*answered(x, known, *student(x, known), codes), codes, split)
    return x


def distillation_loss(
    logits: jax.Array, vectors: jax.Array, ids: jax.Array, codes: jax.Array, known: jax.Array, weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gives -log p(token) + weight |vector - code|^2 / D, both means over the positions from `known` on, (B,).

    The published trainer is not public; this loss follows the paper's account of its two heads, with squared errors in
    place of a perceptual distance of decoded images.

    Args:
      logits: (B, N, V); vectors: (B, N, D); ids: (B, N) the teacher's tokens; known: (B,) int32, below N.
    """
    asked = (jnp.arange(ids.shape[1]) >= known[:, None]).astype(jnp.float32)
    share = asked / asked.sum(axis=1, keepdims=True)
    said = (share * cross_entropy(logits, ids)).sum(axis=1)
    off = (share * jnp.square(vectors - codes[ids]).mean(axis=-1)).sum(axis=1)
    return said + weight * off, {"cross_entropy": said, "distance": off}
