"""A decoder over FlexTok's ordered tokens, any prefix of which is an image (arXiv 2502.13967, section 4).

Tokens, start and class are embedded as in the authors' release (search-over-tokens); what the blocks of the trunk are
is only said inside their checkpoints, so here they are those of `gen.autoregressive.gpt` without rotary positions.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.autoregressive.base import Cache, CachedModel
from gen.autoregressive.blocks import Reading, run_causal
from gen.autoregressive.gpt import Block
from gen.errors import GenError
from gen.nn.attention import new_cache
from gen.nn.layers import Embed, Remat, dropout, linear, stack
from gen.nn.network import Buffer, Cond, Params
from gen.training.sharding import constrain

__all__ = ["FlexTokAR", "FlexTokARConfig", "FlexTokEmbedding", "line_positions"]


def line_positions(count: int, width: int) -> np.ndarray:
    """Gives the fixed position table (count, width) float32 of a row of tokens after a start token.

    It is MAE's table of a grid of one column with a row of zeros in front: row 0 is zero, and row i + 1 is [0, 1, sin(i
    w_k), cos(i w_k)], w_k = 10000^(-k / (width / 4)), a quarter of the channels each.
    """
    quarter = width // 4
    angles = np.arange(count - 1)[:, None] * 10000.0 ** (-np.arange(quarter) / quarter)
    column = np.concatenate([np.zeros_like(angles), np.ones_like(angles), np.sin(angles), np.cos(angles)], axis=1)
    return np.concatenate([np.zeros((1, width)), column]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class FlexTokARConfig(CachedModel):
    """A decoder over ordered tokens; itself a `gen.autoregressive.base.CachedModel`.

    The defaults are of about the size of the largest published class-conditional model, 1.15 billion parameters.

    Attributes:
      shape: (N,), number of tokens.
      vocabulary: number of token ids.
      width, depth, heads, hidden: of the transformer; hidden is the inner size of SwiGLU.
      num_classes: number of labels, whose vectors are added to the start token; 0 for none. The null label of guidance
        adds nothing.
      positions: "learned", or the fixed table `line_positions`.
      cond_dropout: share of samples that training gives no class.
      dropout: share dropped of the embedded sequence and of both branches of a block.
      eps: of the norms.
      dtype: compute type of the matrix products, the residual stream and the cache.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    kv_heads: ClassVar[None] = None

    shape: tuple[int] = (256,)
    vocabulary: int = 64000
    width: int = 1664
    depth: int = 26
    heads: int = 26
    hidden: int = 4608
    num_classes: int = 1000
    positions: Literal["learned", "sincos"] = "learned"
    cond_dropout: float = 0.1
    dropout: float = 0.0
    eps: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise GenError(f"width {self.width} divides not into {self.heads} heads and 4 parts; change one of them")
        if len(self.shape) != 1:
            raise GenError(f"tokens {tuple(self.shape)} are no row; give those of a tokenizer of ordered tokens")

    def build(self, rngs: nnx.Rngs) -> "FlexTokAR":
        """Gives the module with freshly drawn parameters."""
        return FlexTokAR(self, rngs)

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.autoregressive.base.TokenModel.logits` says."""
        found: jax.Array = self.net.apply(params, tokens, cond)
        return found


class FlexTokEmbedding(nnx.Module):
    """Tokens, start token, class and positions."""

    def __init__(self, config: FlexTokARConfig, rngs: nnx.Rngs) -> None:
        width, count = config.width, config.shape[0]
        small, self.classes = nnx.initializers.normal(0.02), config.num_classes

        def even(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -0.1, 0.1)

        self.tokens = Embed(config.vocabulary, width, init=even, rngs=rngs)
        self.start = nnx.Param(small(rngs.params(), (width,), jnp.float32))
        if config.num_classes:
            self.label = Embed(config.num_classes, width, init=small, rngs=rngs)
        learned = config.positions == "learned"
        self.positions: Any = (
            nnx.Param(small(rngs.params(), (count, width), jnp.float32))
            if learned
            else Buffer(jnp.asarray(line_positions(count, width)))
        )

    def first(self, cond: Cond, batch: int) -> jax.Array:
        """Gives the start token (B, 1, width), with the class."""
        start = jnp.broadcast_to(self.start[...] + self.positions[0], (batch, 1, self.start.shape[0]))
        if not self.classes:
            return start
        known = (cond["label"] >= 0) & (cond["label"] < self.classes)
        vectors = self.label(jnp.clip(cond["label"], 0, self.classes - 1))
        return start + jnp.where(known[:, None], vectors, 0.0)[:, None]

    def later(self, tokens: jax.Array, at: Any) -> jax.Array:
        """Embeds tokens (B, n), the first of which is read at place `at` (the start token is at 0)."""
        return self.tokens(tokens) + jax.lax.dynamic_slice_in_dim(self.positions[...], at, tokens.shape[1])

    def __call__(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives what the trunk reads, (B, n + 1, width), of the start token and n given tokens (B, n)."""
        return jnp.concatenate([self.first(cond, len(tokens)), self.later(tokens, 1)], axis=1)


class FlexTokAR(nnx.Module):
    """The network of a `FlexTokARConfig`."""

    def __init__(self, config: FlexTokARConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = FlexTokEmbedding(config, rngs)
        blocks: Any = config
        self.blocks = stack(lambda rngs: Block(blocks, rngs), config.depth, rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.eps, rngs=rngs)
        self.head = linear(config.width, config.vocabulary, bias=False, dtype=config.dtype, rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the label that adds nothing. Raises GenError for a model without classes."""
        if not self.config.num_classes:
            raise GenError("this model has no classes; sample it with guidance 1")
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def __call__(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives logits (B, N, vocabulary) float32 of tokens (B, N), each from those before it."""
        x, keys, rate = self.embed(tokens[:, :-1], cond), cond.get("dropout"), self.config.dropout
        if keys is not None and rate:
            x = dropout(x, rate, jax.vmap(lambda key: jax.random.fold_in(key, self.config.depth))(keys))
        return self._run(x, Reading(jnp.int32(0), keys=keys))[1]

    def prefill(self, cond: Cond, batch: int) -> tuple[Cache, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.prefill` says."""
        config = self.config
        size = config.width // config.heads
        cache = new_cache(config.depth, batch, config.length, config.heads, size, jnp.dtype(config.dtype))
        return self._run(self.embed.first(cond, batch), Reading(jnp.int32(0), cache=cache))

    def step(self, cache: Cache, ids: jax.Array, at: jax.Array, cond: Cond) -> tuple[Cache, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.step` says."""
        del cond
        return self._run(self.embed.later(ids, at + 1), Reading(jnp.int32(0), cache=cache, at=at + 1))

    def _run(self, x: jax.Array, reading: Reading) -> tuple[Cache, jax.Array]:
        """Runs embedded tokens through the trunk: the cache and logits."""
        config = self.config
        x, cache, _ = run_causal(
            self.blocks,
            constrain(x.astype(config.dtype)),
            reading,
            config.depth,
            lambda block, x, reading: block(x, reading),
            remat=config.remat,
            scan=config.scan,
        )
        return cache, self.head(self.norm(x)).astype(jnp.float32)
