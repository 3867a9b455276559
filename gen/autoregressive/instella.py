"""What Instella's two generators share, and its diffusion model: transformers over 1D tokens of bits with a caption.

Instella-T2I, arXiv 2506.21022, section 3.3. A frozen language model reads the caption, and block i of the generator
looks at the states after its layer i: they stand before the image's tokens as further keys and values, and are never
changed by the image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.conditions import Condition, Conditions, label
from gen.nn.layers import MLP, Embed, Remat, add_gated, layer_norm, linear, matrix_product, modulate, run_stack, stack
from gen.nn.network import Cond
from gen.training.sharding import constrain

__all__ = ["CaptionedAttention", "InstellaDiffusionConfig", "InstellaNetwork", "by_layer", "caption_null"]

EPS = 1e-6  # of the norms


@dataclasses.dataclass(frozen=True)
class InstellaNetwork:
    """Sizes of both generators; the defaults are published.

    Attributes:
      shape: (tokens, K): a row of tokens with K bits.
      width, depth, heads: of the transformer.
      text: (T, D) of one layer's states of the language model; the condition "text" is (T, depth, D). None for a model
        without captions.
      num_classes: number of classes of a model without captions, which it hears with the time or, writing token by
        token, in its first token; 0 for none.
      dtype: compute type of the matrix products; parameters, norms and the residual stream are float32.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError for heads that do not divide the width, and for classes beside captions.
    """

    shape: tuple[int, int] = (128, 64)
    width: int = 2048
    depth: int = 16
    heads: int = 16
    text: tuple[int, int] | None = (128, 2048)
    num_classes: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise GenError(f"{self.heads} heads do not divide the width {self.width}; change one of them")
        if self.num_classes and self.text is not None:
            raise GenError("Instella reads a caption or a class; set text to null for classes")

    @property
    def conditions(self) -> Conditions:
        """Gives the caption's features with their mask, or the label."""
        if self.text is None:
            return label(self.num_classes)
        return {"text": Condition((self.text[0], self.depth, self.text[1]), mask="text_mask")}


class CaptionedAttention(nnx.Module):
    """Attention of image tokens to themselves and to a caption; q and k are RMS-normed over each head; no biases."""

    def __init__(self, network: Any, rngs: nnx.Rngs) -> None:
        width, dtype = network.width, network.dtype
        self.heads, size = network.heads, width // network.heads
        self.qkv = linear(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (nnx.RMSNorm(size, epsilon=EPS, rngs=rngs) for _ in range(2))
        if network.text is not None:
            self.text = linear(network.text[1], width, dtype=dtype, rngs=rngs)

    def project(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Gives q (B, N, H, D), and "k" and "v", of image tokens x (B, N, width)."""
        q, k, v = (self._split(part) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.q_norm(q).astype(v.dtype), {"k": self.k_norm(k).astype(v.dtype), "v": v}

    def caption(self, features: jax.Array) -> dict[str, jax.Array]:
        """Gives "k" and "v" (B, T, H, D) of a layer's features (B, T, D)."""
        x = self.text(features)
        kernel = self.qkv.kernel[...][:, x.shape[-1] :].astype(x.dtype)
        k, v = (self._split(part) for part in jnp.split(matrix_product(x, kernel), 2, axis=-1))
        return {"k": self.k_norm(k).astype(v.dtype), "v": v}

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def attend(self, q: jax.Array, found: Mapping[str, jax.Array], mask: jax.Array | None) -> jax.Array:
        """Gives (B, N, width) of queries and of all keys and values; `mask` broadcasts to (B, H, N, S)."""
        out = attention(q, found["k"], found["v"], mask=mask)
        return self.proj(out.reshape(*out.shape[:-2], -1))


def by_layer(cond: Cond) -> Any:
    """Gives the caption's features with the layer first, (depth, B, T, D); None without captions."""
    return jnp.moveaxis(cond["text"], 2, 0) if "text" in cond else None


def caption_null(cond: Cond) -> Cond:
    """Gives the conditions of guidance's other half.

    That is the caption "empty" with its mask "empty_mask", where the caller gives one: the published models were
    trained on the features of an empty caption. Without it the tokens see no caption at all, as the models trained
    here do for dropped captions.
    """
    if "empty" in cond:
        return {**cond, "text": cond["empty"], "text_mask": cond["empty_mask"]}
    return {**cond, "text_mask": jnp.zeros_like(cond["text_mask"])}


@dataclasses.dataclass(frozen=True)
class InstellaDiffusionConfig(InstellaNetwork):
    """The network of `gen.autoregressive.binary_diffusion.BinaryDiffusion` in Instella: 1.29 billion parameters."""

    def build(self, rngs: nnx.Rngs) -> "InstellaDiffusion":
        """Gives the module with freshly drawn parameters."""
        return InstellaDiffusion(self, rngs)


class _Block(nnx.Module):
    """x + g1 attention([caption, modulated x + positions]), then x + g2 MLP(modulated x)."""

    def __init__(self, network: InstellaDiffusionConfig, rngs: nnx.Rngs) -> None:
        width, dtype = network.width, network.dtype
        self.modulation = linear(width, 6 * width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((network.shape[0], width)))
        self.attn = CaptionedAttention(network, rngs)
        self.mlp = MLP(width, 4 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array, text: Any, mask: jax.Array | None) -> jax.Array:
        parts = jnp.split(self.modulation(jax.nn.silu(time)).astype(jnp.float32), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        q, found = self.attn.project(modulate(layer_norm(x, EPS), shift1, scale1) + self.positions[...])
        if text is not None:
            before = self.attn.caption(text)
            found = {name: jnp.concatenate([before[name], a], axis=1) for name, a in found.items()}
        x = add_gated(x, gate1, self.attn.attend(q, found, mask))
        return add_gated(x, gate2, self.mlp(modulate(layer_norm(x, EPS), shift2, scale2)))


class InstellaDiffusion(nnx.Module):
    """The network of an `InstellaDiffusionConfig`: it hears the time as a plain number."""

    def __init__(self, config: InstellaDiffusionConfig, rngs: nnx.Rngs) -> None:
        self.config, width, bits = config, config.width, config.shape[1]
        self.enter = linear(bits, width, rngs=rngs)
        self.time1, self.time2 = linear(1, width, rngs=rngs), linear(width, width, rngs=rngs)
        if config.num_classes:
            self.label = Embed(config.num_classes + 1, width, rngs=rngs)
        self.blocks = stack(lambda rngs: _Block(config, rngs), config.depth, rngs)
        self.head_modulation = linear(width, 2 * width, rngs=rngs)
        self.head = linear(width, bits, rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the null class, or what `caption_null` says."""
        if self.config.text is not None:
            return caption_null(cond)
        if not self.config.num_classes:
            return cond
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def time(self, t: jax.Array, cond: Cond) -> jax.Array:
        """Embeds times (B,), and the class where there is one: (B, width)."""
        found = self.time2(jax.nn.silu(self.time1(t[:, None])))
        return found + self.label(cond["label"]) if self.config.num_classes else found

    def run(self, bits: jax.Array, time: jax.Array, cond: Cond, keep: tuple[int, ...] = ()) -> Any:
        """Runs bits (B, N, K) through the blocks (`gen.nn.layers.StackOutput`)."""
        mask = None
        if self.config.text is not None:
            real = cond["text_mask"].astype(bool)
            mask = jnp.pad(real, ((0, 0), (0, bits.shape[1])), constant_values=True)[:, None, None]
        return run_stack(
            self.blocks,
            self.enter(bits),
            lambda block, x, text: (block(constrain(x), time, text, mask), None),
            per_layer=by_layer(cond),
            remat=self.config.remat,
            scan=self.config.scan,
            keep=keep,
        )

    def __call__(self, bits: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        """Gives (B, N, K) float32, one number a bit, of bits (B, N, K) in 0 and 1 and times t (B,)."""
        time = self.time(t, cond)
        scale, shift = jnp.split(self.head_modulation(jax.nn.silu(time)), 2, axis=-1)
        return self.head(modulate(layer_norm(self.run(bits, time, cond).x, EPS), shift, scale))
