"""The transformer of binary latent diffusion, over a grid of positions with a vector of bits each.

Wang et al. 2023, "Binary Latent Diffusion", arXiv 2304.04820, section 4. Time and class are tokens of their own; a
caption is looked at by cross-attention.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.conditions import Condition, Conditions, label
from gen.nn.layers import Embed, Remat, linear, run_stack, sincos_positions, stack
from gen.nn.network import Cond
from gen.nn.vit import ViTBlock, normed
from gen.training.sharding import constrain

__all__ = ["BinaryTransformer", "BinaryTransformerConfig"]

_EPS = 1e-5  # of the layer norms
_INIT = nnx.initializers.normal(0.02)
_TIME_SCALE = 4000.0  # on times in [0, 1) before their sinusoid


@dataclasses.dataclass(frozen=True)
class BinaryTransformerConfig:
    """The network of binary latent diffusion; the defaults are published.

    Attributes:
      shape: (h, w, K): a grid of positions with K bits.
      width, depth, heads: of the transformer.
      num_classes: number of classes; 0 for none.
      text: (T, D) of a caption's features that every block attends to; None for none.
      dtype: compute type of the matrix products; parameters and norms are float32.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError for a width that the heads, or 4, do not divide, and for classes beside captions.
    """

    shape: tuple[int, int, int] = (16, 16, 64)
    width: int = 768
    depth: int = 24
    heads: int = 12
    num_classes: int = 0
    text: tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise GenError(f"width {self.width} divides not into {self.heads} heads and 4 parts; change one of them")
        if self.num_classes and self.text is not None:
            raise GenError("this network reads a class or a caption; set num_classes to 0 for captions")

    @property
    def conditions(self) -> Conditions:
        """Gives the label, or the caption's features ``text`` with their mask."""
        return label(self.num_classes) if self.text is None else {"text": Condition(self.text, mask="text_mask")}

    def build(self, rngs: nnx.Rngs) -> "BinaryTransformer":
        """Gives the module with freshly drawn parameters."""
        return BinaryTransformer(self, rngs)


class _Block(ViTBlock):
    """A `ViTBlock` with the exact GELU and LayerScale, and attention to a caption between its branches where asked."""

    def __init__(self, config: BinaryTransformerConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, config.dtype
        super().__init__(width, config.heads, 4 * width, eps=_EPS, scaled=True, dtype=dtype, rngs=rngs)
        self.heads, self.crossed = config.heads, config.text is not None
        if config.text is not None:
            self.cross_norm = normed("layer", width, _EPS, rngs)
            self.query = linear(width, width, dtype=dtype, rngs=rngs)
            self.kv = linear(config.text[1], 2 * width, dtype=dtype, rngs=rngs)
            self.cross_proj = linear(width, width, dtype=dtype, rngs=rngs)
            self.cross_scale = nnx.Param(jnp.ones(width))
            self.null_text = nnx.Param(0.01 * jax.random.normal(rngs.params(), (config.text[1],)))

    def __call__(self, x: jax.Array, mask: jax.Array | None, cond: Cond) -> jax.Array:  # type: ignore[override]
        """x (B, N, width) -> the same; `mask` broadcasts to (B, heads, N, N)."""
        x = x + self.scale1[...] * self.attn(self.norm1(x), mask=mask)
        if self.crossed:
            x = x + self.cross_scale[...] * self._cross(self.cross_norm(x), cond["text"], cond["text_mask"])
        return x + self.scale2[...] * self.mlp(self.norm2(x))

    def _cross(self, x: jax.Array, text: jax.Array, real: jax.Array) -> jax.Array:
        """Attends to a caption; one without any real token is the learned null feature."""
        absent = ~real.any(axis=1, keepdims=True)
        text = jnp.where(absent[..., None], self.null_text[...], text)
        q, (k, v) = self.query(x), jnp.split(self.kv(text), 2, axis=-1)
        q, k, v = (a.reshape(*a.shape[:-1], self.heads, -1) for a in (q, k, v))
        out = attention(q, k, v, mask=(real | absent)[:, None, None])
        return self.cross_proj(out.reshape(x.shape))


class BinaryTransformer(nnx.Module):
    """The network of a `BinaryTransformerConfig`."""

    def __init__(self, config: BinaryTransformerConfig, rngs: nnx.Rngs) -> None:
        self.config, width, bits = config, config.width, config.shape[-1]
        self.bits = nnx.Param(_INIT(rngs.params(), (bits, width), jnp.float32))
        self.positions = nnx.Param(jnp.asarray(sincos_positions(config.shape[:2], width)))
        self.time1, self.time2 = (linear(width, width, rngs=rngs) for _ in range(2))
        if config.num_classes:
            normal = nnx.initializers.normal(1.0)
            self.label = Embed(config.num_classes, width, init=normal, rngs=rngs)
        self.blocks = stack(lambda rngs: _Block(config, rngs), config.depth, rngs)
        self.norm = normed("layer", width, _EPS, rngs)
        self.head = linear(width, bits, rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the label num_classes, whose token is not looked at; or a caption without real tokens, in whose place
        a learned feature of each block stands.
        """
        if self.config.text is not None:
            return {**cond, "text_mask": jnp.zeros_like(cond["text_mask"])}
        if not self.config.num_classes:
            return cond
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def __call__(self, bits: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        """Gives (B, N, K) float32, one number a bit, of bits (B, N, K) in 0 and 1 and times t (B,) in [0, 1)."""
        config, count = self.config, bits.shape[1]
        x = (2.0 * bits - 1.0) @ self.bits[...] + self.positions[...]
        time = self.time2(jax.nn.silu(self.time1(_angles(t, config.width))))
        parts, mask = [x, time[:, None]], None
        if config.num_classes:
            there = cond["label"] < config.num_classes
            parts.append(self.label(jnp.minimum(cond["label"], config.num_classes - 1))[:, None])
            mask = ((jnp.arange(count + 2) <= count) | there[:, None])[:, None, None]
        x = run_stack(
            self.blocks,
            jnp.concatenate(parts, axis=1),
            lambda block, x, _: (block(constrain(x), mask, cond), None),
            remat=config.remat,
            scan=config.scan,
        ).x
        return self.head(self.norm(x[:, :count])).astype(jnp.float32)


def _angles(t: jax.Array, width: int) -> jax.Array:
    """[sin, cos] of 4000 t 10000^(-j / (width / 2 - 1)): (B,) -> (B, width)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half))
    angles: Any = (t * _TIME_SCALE)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
