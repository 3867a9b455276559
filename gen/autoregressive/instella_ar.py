"""Instella's autoregressive model: it writes tokens of bits, all bits of a token together (arXiv 2506.21022, 3.3).

The caption's keys and values stand first in the cache of every layer, then those of a start token and of the tokens.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.base import Cache, CachedModel
from gen.autoregressive.binary_diffusion import bit_entropy
from gen.autoregressive.instella import EPS, CaptionedAttention, InstellaNetwork, by_layer, caption_null
from gen.nn.attention import extend_cache, new_cache
from gen.nn.layers import MLP, Embed, linear, run_stack, stack
from gen.nn.network import Cond, Params
from gen.training.sharding import constrain

__all__ = ["InstellaAR", "InstellaARConfig"]


@dataclasses.dataclass(frozen=True)
class InstellaARConfig(InstellaNetwork, CachedModel):
    """The model of an `InstellaNetwork`'s sizes; itself a `gen.autoregressive.base.CachedModel` of bits.

    Its logits (B, N, K) are those of the bits, which are independent within a token.

    Attributes:
      cond_dropout: share of samples that training gives the null condition.
    """

    kind: ClassVar[Literal["tokens", "bits"]] = "bits"

    cond_dropout: float = 0.1

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        """Gives 2: a bit has two values."""
        return 2

    def build(self, rngs: nnx.Rngs) -> "InstellaAR":
        """Gives the module with freshly drawn parameters."""
        return InstellaAR(self, rngs)

    def logits(self, params: Params, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.autoregressive.base.TokenModel.logits` says, of bits (B, N, K)."""
        found: jax.Array = self.net.apply(params, tokens, cond)
        return found

    def surprise(self, logits: jax.Array, tokens: jax.Array) -> jax.Array:
        """Gives -log p in nats of each bit, (B, N, K)."""
        return bit_entropy(logits, tokens.astype(jnp.float32))


class _Block(nnx.Module):
    """x += attention([caption, RMSNorm(x) + positions]); x += MLP(RMSNorm(x))."""

    def __init__(self, config: InstellaARConfig, rngs: nnx.Rngs) -> None:
        width = config.width
        self.norm1, self.norm2 = (nnx.RMSNorm(width, epsilon=EPS, rngs=rngs) for _ in range(2))
        self.positions = nnx.Param(jnp.zeros((config.length + 1, width)))
        self.attn = CaptionedAttention(config, rngs)
        self.mlp = MLP(width, 4 * width, dtype=config.dtype, rngs=rngs)

    def project(self, x: jax.Array, at: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Queries, keys and values of the tokens from place `at` on."""
        places = jax.lax.dynamic_slice_in_dim(self.positions[...], at, x.shape[1])
        return self.attn.project(self.norm1(x) + places)

    def finish(self, x: jax.Array, q: jax.Array, found: Any, mask: jax.Array | None) -> jax.Array:
        """Adds both branches to x."""
        x = constrain(x + self.attn.attend(q, found, mask).astype(x.dtype))
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


class InstellaAR(nnx.Module):
    """The network of an `InstellaARConfig`."""

    def __init__(self, config: InstellaARConfig, rngs: nnx.Rngs) -> None:
        self.config, width, bits = config, config.width, config.shape[1]
        self.start = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.enter = linear(bits, width, rngs=rngs)
        if config.num_classes:
            self.label = Embed(config.num_classes + 1, width, rngs=rngs)
        self.blocks = stack(lambda rngs: _Block(config, rngs), config.depth, rngs)
        self.norm = nnx.RMSNorm(width, epsilon=EPS, rngs=rngs)
        self.head = linear(width, bits, rngs=rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the null class, or what `gen.autoregressive.instella.caption_null` says."""
        if self.config.text is not None:
            return caption_null(cond)
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def first(self, cond: Cond, batch: int) -> jax.Array:
        """Gives the start token (B, 1, width), to which a class is added where there is one."""
        start = jnp.broadcast_to(self.start[...], (batch, 1, self.config.width))
        return start + self.label(cond["label"])[:, None] if self.config.num_classes else start

    def __call__(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives logits (B, N, K) float32 of bits (B, N, K), each token's from those before it."""
        bits = tokens.astype(jnp.float32)
        x = jnp.concatenate([self.first(cond, len(bits)), self.enter(bits[:, :-1])], axis=1)
        mask = jnp.tri(x.shape[1], dtype=bool)[None]
        if self.config.text is not None:
            real = jnp.broadcast_to(cond["text_mask"].astype(bool)[:, None], (*x.shape[:2], self.config.text[0]))
            mask = jnp.concatenate([real, jnp.broadcast_to(mask, (len(x), *mask.shape[1:]))], axis=2)

        def layer(block: _Block, x: jax.Array, text: Any) -> tuple[jax.Array, None]:
            q, found = block.project(x, 0)
            if text is not None:
                before = block.attn.caption(text)
                found = {name: jnp.concatenate([before[name], a], axis=1) for name, a in found.items()}
            return block.finish(x, q, found, mask[:, None]), None

        extra = by_layer(cond)
        return self._read(run_stack(self.blocks, x, layer, per_layer=extra, **self._options()).x)

    def prefill(self, cond: Cond, batch: int) -> tuple[Cache, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.prefill` says."""
        config = self.config
        length = self._prefix + config.length
        cache = new_cache(config.depth, batch, length, config.heads, config.width // config.heads, config.dtype)
        return self._extend(cache, self.first(cond, batch), 0, cond, by_layer(cond))

    def step(self, cache: Cache, ids: jax.Array, at: jax.Array, cond: Cond) -> tuple[Cache, jax.Array]:
        """Does what `gen.autoregressive.base.CachedModel.step` says, of bits (B, 1, K)."""
        return self._extend(cache, self.enter(ids.astype(jnp.float32)), at + 1, cond, None)

    @property
    def _prefix(self) -> int:
        return 0 if self.config.text is None else self.config.text[0]

    def _options(self) -> dict[str, Any]:
        return {"remat": self.config.remat, "scan": self.config.scan}

    def _read(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x)).astype(jnp.float32)

    def _extend(self, cache: Cache, x: jax.Array, place: Any, cond: Cond, text: Any) -> tuple[Cache, jax.Array]:
        """Reads the token at `place` (0 is the start token), after a caption's features where they are given."""
        real = cond["text_mask"].astype(bool) if self._prefix else None

        def layer(block: _Block, carry: Any, extra: Any) -> tuple[Any, None]:
            x, cache = carry
            index, text = extra
            if text is not None:
                before = block.attn.caption(text)
                cache, *_ = extend_cache(cache, index, before["k"], before["v"], 0)
            q, new = block.project(x, place)
            cache, k, v, mask = extend_cache(cache, index, new["k"], new["v"], self._prefix + place)
            mask = mask[None, None]
            if real is not None:
                there = jnp.pad(real, ((0, 0), (0, k.shape[1] - real.shape[1])), constant_values=True)
                mask = mask & there[:, None, None]
            return (block.finish(x, q, {"k": k, "v": v}, mask), cache), None

        extra = (jnp.arange(self.config.depth), text)
        carry: Any = (x, cache)
        x, cache = run_stack(self.blocks, carry, layer, per_layer=extra, scan=self.config.scan).x
        return cache, self._read(x)
