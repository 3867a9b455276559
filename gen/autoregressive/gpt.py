"""LlamaGen: a plain Llama decoder over tokens in raster order (Sun et al. 2024, arXiv 2406.06525).

A prefix, one class token or the features of a caption, then the tokens of an image row by row; next-token
cross-entropy. RMS norms before attention and SwiGLU, no biases, rotary positions over rows and columns. Nothing else
knows that tokens are an image's.

Queries and keys of the prefix are turned by (0, 0) in place of a rotation, hence zero, as in the published networks: a
token's score with the prefix is 0, and the prefix looks at itself evenly.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.autoregressive.base import CachedModel
from gen.autoregressive.blocks import CausalAttention, KeyValues, Reading, added, run_causal
from gen.config import suggest
from gen.errors import GenError
from gen.nn.attention import new_cache
from gen.nn.conditions import Condition, Conditions, label
from gen.nn.layers import Embed, Remat, dropout, linear, stack
from gen.nn.network import Buffer, Cond, Params
from gen.nn.rotary import axial_rotation, rotate_pairs
from gen.nn.vit import Gated
from gen.training.sharding import constrain

__all__ = ["GPT", "SIZES", "Block", "GPTConfig", "gpt", "rotation", "swiglu_hidden"]

# name -> (depth, heads, width), section 3.1 of the paper and its code
SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
    "XXXL": (48, 40, 2560),
    "1B": (22, 32, 2048),
    "7B": (32, 32, 4096),
}

_INIT = nnx.initializers.normal(0.02)


def swiglu_hidden(width: int, multiple: int = 256, factor: float | None = None) -> int:
    """Gives Llama's hidden size: 2/3 of 4 `width`, times `factor`, rounded up to a multiple of `multiple`."""
    hidden = int(2 * 4 * width / 3)
    hidden = hidden if factor is None else int(factor * hidden)
    return multiple * -(-hidden // multiple)


@dataclasses.dataclass(frozen=True)
class GPTConfig(CachedModel):
    """A LlamaGen decoder; itself a `gen.autoregressive.base.CachedModel`. The defaults are GPT-B for 256 px images.

    Attributes:
      shape: sides (h, w) of the grid of tokens, or (N,) of a row of them.
      vocabulary: number of token ids.
      width, depth, heads: hidden size, number of blocks, attention heads.
      hidden: inner size of SwiGLU (`swiglu_hidden`).
      kv_heads: heads of keys and values; None for as many as `heads`.
      num_classes: number of labels; 0 for none.
      null_class: the label table has one more row, the null label of classifier-free guidance.
      text: (T, D) of the caption's features that take the class token's place, or None. Captions shorter than T are
        padded, in the published networks on the left; their mask is the condition "text_mask".
      cond_dropout: share of samples that training gives the null condition.
      dropout: share dropped of the embedded sequence and of both branches of a block. (The published code can drop
        attention weights too, and never does.)
      theta: base of the rotary frequencies.
      eps: of the norms.
      dtype: compute type of the matrix products, the residual stream and the cache; parameters, the statistics of norms
        and the logits are float32.
      remat: what the backward pass recomputes.
      scan: depth as one scan (constant compile time), or a Python loop.

    Raises GenError where the numbers do not fit together.
    """

    shape: tuple[int, ...] = (16, 16)
    vocabulary: int = 16384
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 2048
    kv_heads: int | None = None
    num_classes: int = 1000
    null_class: bool = True
    text: tuple[int, int] | None = None
    cond_dropout: float = 0.1
    dropout: float = 0.1
    theta: float = 10000.0
    eps: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        pairs = 2 * len(self.shape)
        if self.width % self.heads or (self.width // self.heads) % pairs:
            raise GenError(
                f"GPT width {self.width} over {self.heads} heads; expected heads of a multiple of {pairs} channels, "
                "which rotary positions need: change one of them"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise GenError(f"GPT has {self.heads} heads and {self.kv_heads} of keys; give a divisor of the heads")
        if self.text is not None and self.num_classes:
            raise GenError("GPT reads a class or a caption; set num_classes to 0 for captions")

    @property
    def prefix(self) -> int:
        """Tells how many positions stand before the tokens."""
        return 1 if self.text is None else self.text[0]

    @property
    def conditions(self) -> Conditions:
        """Gives the label, or the caption's features with their mask."""
        return label(self.num_classes) if self.text is None else {"text": Condition(self.text, mask="text_mask")}

    def build(self, rngs: nnx.Rngs) -> "GPT":
        """Gives the module with freshly drawn parameters."""
        return GPT(self, rngs)

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.autoregressive.base.TokenModel.logits` says."""
        found: jax.Array = self.net.apply(params, tokens, cond)
        return found

    def before(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the blocks say of each token, (B, N, width), from those before it; arguments as of `logits`."""
        found: jax.Array = self.net.apply(params, tokens, cond, method="before")
        return found


def gpt(name: str, **changes: Any) -> GPTConfig:
    """Gives a published size by name, "B" to "XXXL", "1B" or "7B"; class-conditional, 256 tokens of 16384.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown GPT size '{name}'; {suggest(name, SIZES)}")
    depth, heads, width = SIZES[name]
    config = GPTConfig(width=width, depth=depth, heads=heads, hidden=swiglu_hidden(width))
    return dataclasses.replace(config, **changes)


class Block(nnx.Module):
    """x += attention(RMSNorm(x)); x += SwiGLU(RMSNorm(x))."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs) -> None:
        dtype, self.rate = jnp.dtype(config.dtype), config.dropout
        self.norm1, self.norm2 = (nnx.RMSNorm(config.width, epsilon=config.eps, rngs=rngs) for _ in range(2))
        self.attn = CausalAttention(
            config.width, config.heads, kv_heads=config.kv_heads, bias=False, init=_INIT, dtype=dtype, rngs=rngs
        )
        self.mlp = Gated(config.width, config.hidden, jax.nn.silu, bias=False, init=_INIT, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, reading: Reading) -> tuple[jax.Array, KeyValues | None]:
        branch, cache = self.attn(self.norm1(x), reading)
        x = added(x, reading.dropped(branch, self.rate, 0))
        return added(x, reading.dropped(self.mlp(self.norm2(x)), self.rate, 1)), cache


class Caption(nnx.Module):
    """fc2(gelu(fc1(features))) without biases, and the features that stand for no caption, which are not trained."""

    def __init__(self, text: tuple[int, int], width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(text[1], width, bias=False, init=_INIT, dtype=dtype, rngs=rngs)
        self.fc2 = linear(width, width, bias=False, init=_INIT, dtype=dtype, rngs=rngs)
        self.null = Buffer(jax.random.normal(rngs.params(), text) / math.sqrt(text[1]))

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(features), approximate=True))


class GPT(nnx.Module):
    """The network of a `GPTConfig`. Logits are exactly 0 at initialisation: the last layer starts at zero."""

    def __init__(self, config: GPTConfig, rngs: nnx.Rngs) -> None:
        self.config, dtype = config, jnp.dtype(config.dtype)
        self.tokens = Embed(config.vocabulary, config.width, init=_INIT, rngs=rngs)
        if config.text is None:
            rows = config.num_classes + config.null_class
            self.label = Embed(max(rows, 1), config.width, init=_INIT, rngs=rngs)
        else:
            self.text = Caption(config.text, config.width, dtype, rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs), config.depth, rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.eps, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.head = linear(config.width, config.vocabulary, bias=False, init=zeros, dtype=dtype, rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the same condition with the null label num_classes, or without a caption; its mask stays.

        Raises GenError for a network without a null class or captions.
        """
        config = self.config
        if config.text is not None:
            return {**cond, "text": jnp.broadcast_to(self.text.null[...], cond["text"].shape)}
        if not (config.num_classes and config.null_class):
            raise GenError(
                "this GPT has no null class; sample with guidance 1, or train it with classes and null_class"
            )
        return {**cond, "label": jnp.full_like(cond["label"], config.num_classes)}

    def start(self, cond: Cond, batch: int) -> jax.Array:
        """Gives the prefix (B, `GPTConfig.prefix`, width) float32."""
        if self.config.text is not None:
            return self.text(cond["text"]).astype(jnp.float32)
        return self.label(cond["label"] if self.config.num_classes else jnp.zeros((batch,), jnp.int32))[:, None]

    def __call__(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives logits (B, N, vocabulary) float32 of tokens (B, N), each from those before it."""
        return self.read(self.before(tokens, cond))

    def before(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the blocks say of each token (B, N, width) from those before it."""
        config, keys = self.config, cond.get("dropout")
        x = jnp.concatenate([self.start(cond, len(tokens)), self.tokens(tokens[:, :-1])], axis=1)
        reading = self.reading(cond, 0, x.shape[1])
        if keys is not None and config.dropout:
            x = dropout(x, config.dropout, jax.vmap(lambda key: jax.random.fold_in(key, config.depth))(keys))
            reading = dataclasses.replace(reading, keys=keys)
        x, _ = self.run(x, reading)
        return x[:, config.prefix - 1 :]

    def prefill(self, cond: Cond, batch: int) -> tuple[KeyValues, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.prefill` says."""
        config = self.config
        x, length = self.start(cond, batch), config.prefix + config.length - 1
        size = config.width // config.heads
        cache = new_cache(config.depth, batch, length, config.kv_heads or config.heads, size, jnp.dtype(config.dtype))
        x, kept = self.run(x, self.reading(cond, 0, config.prefix, cache))
        return kept, self.read(x[:, -1:])

    def step(self, cache: KeyValues, ids: jax.Array, at: jax.Array, cond: Cond) -> tuple[KeyValues, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.step` says."""
        place = self.config.prefix + at
        x, cache = self.run(self.tokens(ids), self.reading(cond, place, ids.shape[1], cache))
        return cache, self.read(x)

    def reading(self, cond: Cond, at: jax.Array | int, count: int, cache: KeyValues | None = None) -> Reading:
        """Says where `count` positions from `at` on stand, and where of the prefix they may look."""
        config = self.config
        cos, sin = (jax.lax.dynamic_slice_in_dim(jnp.asarray(a), at, count) for a in rotation(config))
        mask = None
        if config.text is not None:
            length = count if cache is None else cache["k"].shape[3]
            rows, columns = at + jnp.arange(count)[:, None], jnp.arange(length)
            real = cond["text_mask"].astype(bool)
            real = jnp.pad(real, ((0, 0), (0, length - real.shape[1])), constant_values=True)
            mask = (real[:, None] | (rows == columns))[:, None]
        return Reading(jnp.int32(0), lambda x: rotate_pairs(x, cos, sin), mask, cache, at)

    def run(self, x: jax.Array, reading: Reading) -> tuple[jax.Array, Any]:
        """Runs embedded positions (B, n, width) through the blocks."""
        config = self.config
        x = constrain(x.astype(config.dtype))
        x, cache, _ = run_causal(
            self.blocks,
            x,
            reading,
            config.depth,
            lambda block, x, reading: block(x, reading),
            remat=config.remat,
            scan=config.scan,
        )
        return x, cache

    def read(self, x: jax.Array) -> jax.Array:
        """Gives logits (B, n, vocabulary) float32 of what the blocks gave."""
        return self.head(self.norm(x)).astype(jnp.float32)


def rotation(config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Gives cos and sin (prefix + N, head_dim) of every position: zeros for the prefix, then rows and columns."""
    table = axial_rotation(config.shape, config.width // config.heads, config.theta)
    cos, sin = (np.concatenate([np.zeros((config.prefix, a.shape[1]), a.dtype), a]) for a in table)
    return cos, sin
