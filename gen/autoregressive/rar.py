"""RAR: a causal decoder trained on permuted orders, annealed to raster order (Yu et al. 2024, arXiv 2411.00776).

A sequence is [start, class, x_1 .. x_N], the tokens in an order that training draws for each image: at random at
first, in raster order at last, so that the network learns context from both sides and still writes row by row. Which
token comes next is no longer plain, so every position also carries the position of the token that it predicts
(target-aware positions, section 3.2).

A block is DiT's with a condition for each position, the class embedding plus an embedding of the place in the sequence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.autoregressive.base import CachedModel, Draws, cross_entropy
from gen.autoregressive.blocks import CausalAttention, KeyValues, Reading, run_causal
from gen.config import suggest
from gen.errors import GenError
from gen.nn.attention import new_cache
from gen.nn.layers import MLP, Embed, Remat, layer_norm, linear, stack
from gen.nn.network import Cond, Params
from gen.training.sharding import constrain
from gen.training.task import Schedule

__all__ = ["RAR", "SIZES", "RARConfig", "rar"]

# name -> (width, depth, heads, hidden), table 1 of the paper
SIZES: dict[str, tuple[int, int, int, int]] = {
    "B": (768, 24, 16, 3072),
    "L": (1024, 24, 16, 4096),
    "XL": (1280, 32, 16, 5120),
    "XXL": (1408, 40, 16, 6144),
}

_INIT, _ZEROS = nnx.initializers.truncated_normal(0.02), nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class RARConfig(CachedModel):
    """A RAR decoder; itself a `gen.autoregressive.base.CachedModel`. The defaults are RAR-B.

    Attributes:
      shape: sides (h, w) of the grid of tokens, or (N,) of a row of them.
      vocabulary: number of token ids.
      width, depth, heads, hidden: hidden size, number of blocks, attention heads, inner size of the MLPs.
      num_classes: number of labels.
      cond_dropout: share of samples that training gives the null class.
      dropout: share dropped of both branches of a block. (The published recipe drops attention weights too.)
      anneal: training steps between which the share of randomly ordered samples falls from 1 to 0, linearly.
      rows: lengths of the published tables of positions and of places, of which a sequence reads the first N + 2; None
        for that many.
      dtype: compute type of the matrix products, the residual stream and the cache.
      remat: what the backward pass recomputes.
      scan: depth as one scan (constant compile time), or a Python loop.

    Raises GenError where the numbers do not fit together.
    """

    shape: tuple[int, ...] = (16, 16)
    vocabulary: int = 1024
    width: int = 768
    depth: int = 24
    heads: int = 16
    hidden: int = 3072
    num_classes: int = 1000
    cond_dropout: float = 0.1
    dropout: float = 0.1
    anneal: tuple[int, int] = (125_000, 187_500)
    rows: tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise GenError(f"RAR width {self.width} is not divisible by heads {self.heads}; change one of them")
        if not 0 <= self.anneal[0] <= self.anneal[1]:
            raise GenError(f"orders are annealed between the steps {self.anneal}; expected two that do not fall")
        if self.rows is not None and min(self.rows) < self.length + 2:
            raise GenError(f"tables of {self.rows} rows for {self.length} tokens and 2; give none, or longer ones")

    @property
    def table_rows(self) -> tuple[int, int]:
        """Gives the lengths of the tables of positions and of places."""
        return self.rows or (self.length + 2, self.length + 2)

    def build(self, rngs: nnx.Rngs) -> "RAR":
        """Gives the module with freshly drawn parameters."""
        return RAR(self, rngs)

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.autoregressive.base.TokenModel.logits` says, in raster order."""
        order = jnp.broadcast_to(jnp.arange(self.length), tokens.shape)
        found: jax.Array = self.net.apply(params, tokens, cond, order)
        return found

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives ``random_ratio``, the share of samples in random order: 1, then falling to 0 over `anneal`."""
        del steps
        first, last = self.anneal
        return {"random_ratio": np.float32(1.0 - np.clip((step - first) / max(last - first, 1), 0.0, 1.0))}

    def draw(self, key: jax.Array, tokens: jax.Array, schedule: Schedule) -> Draws:
        """Draws each sample's ``order`` (B, N) beside what `gen.autoregressive.base.TokenModel.draw` does."""
        base_key, ratio_key, order_key = jax.random.split(key, 3)
        mixed = jax.random.bernoulli(ratio_key, schedule["random_ratio"], (len(tokens), 1))
        keys = jax.random.split(order_key, len(tokens))
        orders = jax.vmap(lambda key: jax.random.permutation(key, self.length))(keys)
        order = jnp.where(mixed, orders, jnp.arange(self.length))
        return {**super().draw(base_key, tokens, schedule), "order": order}

    def loss(
        self, params: Params, tokens: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives -log p per token in nats (B,), each predicted from those before it in the sample's order (eq. 2)."""
        cond, order = self.trained_on(params, cond, draws), draws["order"]
        logits = self.net.apply(params, tokens, cond, order)
        return cross_entropy(logits, jnp.take_along_axis(tokens, order, axis=1)).mean(axis=-1), {}


def rar(name: str, **changes: Any) -> RARConfig:
    """Gives a published size by name, "B" to "XXL", with the published lengths of tables.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown RAR size '{name}'; {suggest(name, SIZES)}")
    width, depth, heads, hidden = SIZES[name]
    config = RARConfig(width=width, depth=depth, heads=heads, hidden=hidden, rows=(256 + 1024, 256 + 100))
    return dataclasses.replace(config, **changes)


class Block(nnx.Module):
    """x += gate Attention(LN(x) (1 + scale) + shift); x += gate MLP(LN(x) (1 + scale) + shift).

    The norms have gains and biases, q and k are normed over each head, and every position has gates, scales and shifts
    of its own, from c (B, n, width).
    """

    def __init__(self, config: RARConfig, rngs: nnx.Rngs) -> None:
        dtype, width, self.rate = jnp.dtype(config.dtype), config.width, config.dropout
        self.norm1, self.norm2 = (_norm(width, rngs) for _ in range(2))
        self.attn = CausalAttention(width, config.heads, norm=_norm, init=_INIT, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, config.hidden, approximate=False, init=_INIT, dtype=dtype, rngs=rngs)
        self.ada = linear(width, 6 * width, init=_ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, reading: Reading) -> tuple[jax.Array, KeyValues | None]:
        m = self.ada(jax.nn.silu(c)).astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(m, 6, axis=-1)
        branch, cache = self.attn(self.norm1(x) * (1.0 + scale1) + shift1, reading)
        x = _gated(x, gate1, reading.dropped(branch, self.rate, 0))
        branch = self.mlp(self.norm2(x) * (1.0 + scale2) + shift2)
        return _gated(x, gate2, reading.dropped(branch, self.rate, 1)), cache


class RAR(nnx.Module):
    """The network of a `RARConfig`. Blocks are the identity at initialisation.

    One table embeds codes (rows 0 to V - 1), a mask that nothing uses (V), classes (from V + 1 on) and the null class.
    """

    def __init__(self, config: RARConfig, rngs: nnx.Rngs) -> None:
        self.config, dtype, width = config, jnp.dtype(config.dtype), config.width
        positions, places = config.table_rows
        rows = config.vocabulary + 1 + config.num_classes + 1
        self.embed = Embed(rows, width, init=_INIT, rngs=rngs)
        self.start = nnx.Param(jnp.zeros((1, width)))
        self.positions = nnx.Param(_INIT(rngs.params(), (positions, width)))
        self.targets = nnx.Param(_INIT(rngs.params(), (positions, width)))
        self.places = nnx.Param(_INIT(rngs.params(), (places, width)))
        self.blocks = stack(lambda rngs: Block(config, rngs), config.depth, rngs)
        self.final_ada = linear(width, 2 * width, init=_ZEROS, dtype=dtype, rngs=rngs)
        self.head = linear(width, config.vocabulary, init=_INIT, dtype=dtype, rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the same condition with the null label num_classes. Raises GenError for a network without classes."""
        if not self.config.num_classes:
            raise GenError("this RAR has no classes; sample with guidance 1 and train with cond_dropout 0")
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def label(self, cond: Cond, batch: int) -> jax.Array:
        """Gives the embedded class (B, 1, width)."""
        label = cond["label"] if self.config.num_classes else jnp.zeros((batch,), jnp.int32)
        return self.embed(label + self.config.vocabulary + 1)[:, None]

    def __call__(self, tokens: jax.Array, cond: Cond, order: jax.Array) -> jax.Array:
        """Gives logits (B, N, vocabulary) float32: row j predicts token order[:, j] from tokens order[:, :j]."""
        count = len(tokens)
        label = self.label(cond, count)
        given = self.embed(jnp.take_along_axis(tokens, order[:, :-1], axis=1))
        x = jnp.concatenate([jnp.broadcast_to(self.start[...], label.shape), label, given], axis=1)
        positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(2), (count, 2)), 2 + order[:, :-1]], axis=1)
        targets = self.targets[...][2 + order]  # of the class and the given tokens; the start has none
        x = x + self.positions[...][positions] + jnp.pad(targets, ((0, 0), (1, 0), (0, 0)))
        c = label + self.places[: x.shape[1]]
        x, _ = self.run(x, c, Reading(jnp.int32(0), keys=cond.get("dropout")))
        return self.read(x[:, 1:], c[:, 1:])

    def prefill(self, cond: Cond, batch: int) -> tuple[KeyValues, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.prefill` says."""
        config, label = self.config, self.label(cond, batch)
        size, dtype = config.width // config.heads, jnp.dtype(config.dtype)
        x = jnp.concatenate([jnp.broadcast_to(self.start[...], label.shape), label + self.targets[2]], axis=1)
        c = label + self.places[:2]
        cache = new_cache(config.depth, batch, config.length + 1, config.heads, size, dtype)
        x, kept = self.run(x + self.positions[:2], c, Reading(jnp.int32(0), cache=cache))
        return kept, self.read(x[:, 1:], c[:, 1:])

    def step(self, cache: KeyValues, ids: jax.Array, at: jax.Array, cond: Cond) -> tuple[KeyValues, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.step` says; in raster order."""
        place = at + 2
        own, target = (
            jnp.take(table[...], i, axis=0) for table, i in ((self.positions, place), (self.targets, place + 1))
        )
        c = self.label(cond, len(ids)) + jnp.take(self.places[...], place, axis=0)
        x, cache = self.run(self.embed(ids) + own + target, c, Reading(jnp.int32(0), cache=cache, at=place))
        return cache, self.read(x, c)

    def run(self, x: jax.Array, c: jax.Array, reading: Reading) -> tuple[jax.Array, Any]:
        """Runs embedded positions (B, n, width) with their conditions c through the blocks."""
        config = self.config
        x = constrain(x.astype(config.dtype))
        x, cache, _ = run_causal(
            self.blocks,
            x,
            reading,
            config.depth,
            lambda block, x, reading: block(x, c, reading),
            remat=config.remat,
            scan=config.scan,
        )
        return x, cache

    def read(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Gives logits (B, n, vocabulary) float32 of what the blocks gave."""
        scale, shift = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        return self.head(layer_norm(x) * (1.0 + scale) + shift).astype(jnp.float32)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


def _gated(x: jax.Array, gate: jax.Array, branch: jax.Array) -> jax.Array:
    """x + gate branch, summed in float32, in the type of the residual stream."""
    return (x.astype(jnp.float32) + gate * branch.astype(jnp.float32)).astype(x.dtype)
