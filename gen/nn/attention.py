"""Attention: the one place where softmax(q k^T) v is calculated, and the layer of self-attention made of it.

Today these are explicit products on every backend. Fused kernels (cuDNN's on GPUs, the TPU's flash kernel) are to be
chosen here, by backend, length and type, and never under `gen.nn.forward_mode`: they have no Jacobian-vector product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.nn.layers import linear, xavier

__all__ = ["Attention", "attention"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T + bias) v for every head, with the softmax in float32.

    The heads are moved in front of the tokens first: einsums over the given layout copy the N x S weights as well,
    which costs a CPU half of the time again.

    Args:
      q: (*B, N, H, D) with any number of leading axes; k, v: (*B, S, H, D), all of one type.
      mask: bool, broadcast to (*B, H, N, S): where to look; None for everywhere.
      bias: float32, broadcast to (*B, H, N, S), added to the scaled products; None for none.
      scale: factor on the products; None for 1 / sqrt(D).

    Returns:
      (*B, N, H, D) in the type of v.
    """
    q, k, v = (x.swapaxes(-2, -3) for x in (q, k, v))
    batch, last = tuple(range(q.ndim - 2)), q.ndim - 1
    scores = jax.lax.dot_general(q, k, (((last,), (last,)), (batch, batch)), preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jax.lax.dot_general(weights, v, (((last,), (last - 1,)), (batch, batch))).swapaxes(-2, -3)


class Attention(nnx.Module):
    """Multi-head self-attention; one qkv projection with rows ordered q, k, v, then head, then head_dim.

    Args of the constructor:
      bias, proj_bias: whether the projection to q, k and v, and the last one, have biases.
      norm: makes the norms of q and k, each over head_dim, from (head_dim, rngs); None for none.
      scale: factor on the products of q and k; None for 1 / sqrt(head_dim).
      proj_init: of the output projection's weights; those of q, k and v are Xavier-uniform.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        proj_bias: bool = True,
        norm: Callable[[int, nnx.Rngs], Any] | None = None,
        scale: float | None = None,
        proj_init: Callable[..., jax.Array] = xavier,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.normed, self.scale = heads, norm is not None, scale
        self.qkv = linear(width, 3 * width, bias=bias, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, bias=proj_bias, init=proj_init, dtype=dtype, rngs=rngs)
        if norm is not None:
            self.q_norm, self.k_norm = norm(width // heads, rngs), norm(width // heads, rngs)

    def project(
        self, x: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v (B, N, H, D) of x (B, N, width), q and k normed and rotated."""
        b, n, width = x.shape
        q, k, v = (part.reshape(b, n, self.heads, width // self.heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return q.astype(v.dtype), k.astype(v.dtype), v

    def __call__(
        self,
        x: jax.Array,
        *,
        rotate: Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Attends; `rotate` acts on q and k (B, N, H, D): the caller's choice of position encoding, or None."""
        q, k, v = self.project(x, rotate)
        return self.proj(attention(q, k, v, mask=mask, scale=self.scale).reshape(x.shape))
