"""Layers of models that write token by token: causal attention that keeps keys and values, and what calls it by layer.

The same layers read a whole sequence at once (training, likelihoods) and a token at a time with a cache.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.nn.attention import attention, extend_cache
from gen.nn.layers import Remat, dropout, linear, run_stack, xavier
from gen.training.sharding import constrain

__all__ = ["CausalAttention", "Reading", "added", "run_causal"]

KeyValues = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a block is told of the tokens that it reads.

    Attributes:
      layer: () int32, which block of the stack this is.
      rotate: turns q and k (B, N, H, D) by the tokens' positions; None for no rotary positions.
      mask: bool, broadcast to (B, heads, N, S), where a token may look if causality lets it; None for everywhere.
      cache: keys and values of all layers (`gen.nn.attention.new_cache`); None where the whole sequence is read.
      at: place of the first token in the cache.
      keys: (B,) PRNG keys of this layer's dropout; None for none.
    """

    layer: jax.Array
    rotate: Callable[[jax.Array], jax.Array] | None = None
    mask: jax.Array | None = None
    cache: KeyValues | None = None
    at: jax.Array | int = 0
    keys: jax.Array | None = None

    def dropped(self, x: jax.Array, rate: float, place: int) -> jax.Array:
        """Drops a share of x (B, N, D) where the reading has keys; places of a block draw apart."""
        if self.keys is None or not rate:
            return x
        return dropout(x, rate, jax.vmap(lambda key: jax.random.fold_in(key, place))(self.keys))


class CausalAttention(nnx.Module):
    """Self-attention in which a token looks at itself and the tokens before it; rows of qkv ordered q, k, v.

    Args of the constructor:
      kv_heads: heads of keys and values, each shared by heads / kv_heads query heads that follow each other (grouped
        queries, Ainslie et al. 2023, arXiv 2305.13245); None for as many as query heads.
      bias: whether both projections have biases.
      norm: makes the norms of q and k, each over head_dim, from (head_dim, rngs); None for none.
      init: of both projections' weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        norm: Callable[[int, nnx.Rngs], Any] | None = None,
        init: Callable[..., jax.Array] = xavier,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.size = heads, width // heads
        self.kv_heads = kv_heads or heads
        rows = (heads + 2 * self.kv_heads) * self.size
        self.qkv = linear(width, rows, bias=bias, init=init, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, bias=bias, init=init, dtype=dtype, rngs=rngs)
        self.normed = norm is not None
        if norm is not None:
            self.q_norm, self.k_norm = norm(self.size, rngs), norm(self.size, rngs)

    def __call__(self, x: jax.Array, reading: Reading) -> tuple[jax.Array, KeyValues | None]:
        """Attends, x (B, N, width) -> the same, and gives the cache with these tokens where there is one."""
        ends = (self.heads * self.size, (self.heads + self.kv_heads) * self.size)
        parts = jnp.split(self.qkv(x), ends, axis=-1)
        q, k, v = (part.reshape(*x.shape[:-1], -1, self.size) for part in parts)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if reading.rotate is not None:
            q, k = reading.rotate(q), reading.rotate(k)
        q, k = q.astype(v.dtype), k.astype(v.dtype)
        if reading.cache is None:
            out, cache = attention(q, k, v, mask=reading.mask, causal=True), None
        else:
            cache, k, v, mask = extend_cache(reading.cache, reading.layer, k, v, reading.at)
            out = attention(q, k, v, mask=mask if reading.mask is None else mask & reading.mask)
        return self.proj(out.reshape(*x.shape[:-1], -1)), cache


def added(x: jax.Array, branch: jax.Array) -> jax.Array:
    """x + branch, summed in float32, in the type of the residual stream x."""
    return (x.astype(jnp.float32) + branch.astype(jnp.float32)).astype(x.dtype)


def run_causal(
    blocks: nnx.Module,
    x: jax.Array,
    reading: Reading,
    depth: int,
    call: Callable[[Any, jax.Array, Reading], tuple[jax.Array, KeyValues | None]],
    *,
    remat: Remat = "none",
    scan: bool = True,
    keep: tuple[int, ...] = (),
) -> tuple[jax.Array, KeyValues | None, Mapping[int, jax.Array]]:
    """Runs x (B, N, width) through stacked blocks: ``x, cache = call(block, x, reading of its layer)``.

    Args:
      blocks: what `gen.nn.layers.stack` made.
      reading: of the first layer; its keys are folded by layer.
      remat, scan, keep: as in `gen.nn.layers.run_stack`.

    Returns:
      The last block's output, the cache with these tokens, and the outputs of the layers `keep`.
    """

    def layer(block: Any, carry: Any, index: jax.Array) -> tuple[Any, None]:
        x, cache = carry
        keys = None if reading.keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(reading.keys)
        x, cache = call(block, x, dataclasses.replace(reading, layer=index, cache=cache, keys=keys))
        return (constrain(x), cache), None

    carry: Any = (x, reading.cache)
    indices = jnp.arange(depth, dtype=jnp.int32)
    ran = run_stack(blocks, carry, layer, per_layer=indices, remat=remat, scan=scan, keep=keep)
    (x, cache), kept = ran.x, ran.kept
    return x, cache, {index: state[0] for index, state in kept.items()}
