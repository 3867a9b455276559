"""The pre-norm block of vision transformers, in the variants of published encoders and tokenizers."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.nn.attention import Attention
from gen.nn.layers import MLP, linear, xavier

__all__ = ["FeedForward", "Gated", "ViTBlock", "normed"]

FeedForward = Literal["mlp", "swiglu", "geglu"]


def normed(kind: Literal["layer", "rms"], width: int, eps: float, rngs: nnx.Rngs) -> Any:
    """LayerNorm with gain and bias, computed in two passes as torch does, or RMSNorm with a gain; float32."""
    if kind == "layer":
        return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)
    return nnx.RMSNorm(width, epsilon=eps, rngs=rngs)


class Gated(nnx.Module):
    """fc2(activation(a) b) with (a, b) the halves of fc1: SwiGLU, GEGLU (Shazeer 2020, arXiv 2002.05202).

    (..., width) -> (..., width), through `hidden` channels.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        bias: bool = True,
        init: Callable[..., jax.Array] = xavier,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        self.fc1 = linear(width, 2 * hidden, bias=bias, init=init, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, bias=bias, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = jnp.split(self.fc1(x), 2, -1)
        return self.fc2(self.activation(gate) * value)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


_GATES: dict[str, Callable[[jax.Array], jax.Array]] = {"swiglu": jax.nn.silu, "geglu": _exact_gelu}


class ViTBlock(nnx.Module):
    """x + g1 attention(norm1 x), then x + g2 feed-forward(norm2 x).

    Args of the constructor:
      hidden: inner width of the feed-forward layers.
      feedforward: an MLP with the exact GELU, or gated layers.
      norm: "layer" with gain and bias, or "rms" with a gain.
      eps: of the norms.
      bias, qkv_bias: whether the layers have biases; those of q, k and v by themselves. An MLP always has.
      qk_norm: whether q and k are RMS-normed over each head.
      scaled: whether g1 and g2 are learned vectors (LayerScale); 1 otherwise.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        feedforward: FeedForward = "mlp",
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-6,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scaled: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1, self.norm2 = (normed(norm, width, eps, rngs) for _ in range(2))
        self.attn = Attention(
            width,
            heads,
            bias=bias and qkv_bias,
            proj_bias=bias,
            norm=(lambda size, rngs: nnx.RMSNorm(size, epsilon=eps, rngs=rngs)) if qk_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp: Any = (
            MLP(width, hidden, approximate=False, dtype=dtype, rngs=rngs)
            if feedforward == "mlp"
            else Gated(width, hidden, _GATES[feedforward], bias=bias, dtype=dtype, rngs=rngs)
        )
        self.scaled = scaled
        if scaled:
            self.scale1, self.scale2 = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(width))

    def __call__(
        self,
        x: jax.Array,
        rotate: Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """x (B, N, width) -> the same; `rotate` and `mask` as in `gen.nn.attention.Attention`."""
        first, second = (self.scale1[...], self.scale2[...]) if self.scaled else (1.0, 1.0)
        x = x + first * self.attn(self.norm1(x), rotate=rotate, mask=mask)
        return x + second * self.mlp(self.norm2(x))
