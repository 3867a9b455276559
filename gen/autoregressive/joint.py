"""The two-stream transformer of MaskGen: image tokens and a caption's features, each with weights of its own, attend as
one sequence (Esser et al. 2024, arXiv 2403.03206; Kim et al. 2025, arXiv 2501.07730).
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.conditions import Condition, Conditions
from gen.nn.layers import MLP, Remat, add_gated, layer_norm, linear, modulate, run_stack, stack
from gen.nn.network import Cond
from gen.training.sharding import constrain

__all__ = ["CAPTION", "JointTrunk", "TextConfig", "TrunkConfig", "truncated"]

truncated = nnx.initializers.truncated_normal(0.02)

CAPTION = ("prompt", "pooled")  # the conditions that a dropped caption loses, and what the role "empty" holds


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """What a caption is given by; the defaults are CLIP ViT-L/14's.

    Attributes:
      length, width: of the features of its words, and the width of the one vector of the whole.
      score: width of the embedding of an aesthetic score; 0 for a model that knows none.
      period: greatest period of that embedding.
      interleaved: whether its sines and cosines alternate; else all sines come first.
    """

    length: int = 77
    width: int = 768
    score: int = 256
    period: float = 1000.0
    interleaved: bool = False

    @property
    def conditions(self) -> Conditions:
        """Gives ``prompt`` (length, width), CLIP's features before its last block, all positions, padding too; the
        projected vector ``pooled`` (width,), and ``aesthetic`` (), by default 6.5.
        """
        words = {"prompt": Condition((self.length, self.width)), "pooled": Condition((self.width,))}
        return words | ({"aesthetic": Condition(default=6.5)} if self.score else {})

    def vector(self, cond: Cond) -> jax.Array:
        """Gives the pooled feature, followed by the embedded score: (B, width + score) float32."""
        pooled = cond["pooled"].astype(jnp.float32)
        if not self.score:
            return pooled
        half = self.score // 2
        frequencies = np.exp(-math.log(self.period) * np.arange(half) / half).astype(np.float32)
        angles = 100.0 * cond["aesthetic"].astype(jnp.float32)[:, None] * frequencies
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1 if self.interleaved else 1)
        return jnp.concatenate([pooled, waves.reshape(len(pooled), -1)], axis=-1)


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """The size of the transformer; the defaults are MaskGen-L's.

    Attributes:
      width, depth, heads: as everywhere.
      dtype: compute type of the matrix products.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError for heads that do not divide the width, and for fewer than two blocks.
    """

    width: int = 1024
    depth: int = 16
    heads: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads or self.depth < 2:
            raise GenError(
                f"a joint transformer of width {self.width}, depth {self.depth} and {self.heads} heads; expected a "
                "width that the heads divide, and at least two blocks"
            )


class _Stream(nnx.Module):
    """One stream's half of a block; the text's in the last block, which nobody reads, gives keys and values alone."""

    def __init__(self, config: TrunkConfig, last: bool, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.heads, self.last = config.heads, last
        self.ada = linear(width, (2 if last else 6) * width, init=truncated, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width, init=truncated, dtype=dtype, rngs=rngs)
        if not last:
            self.proj = linear(width, width, init=truncated, dtype=dtype, rngs=rngs)
            self.mlp = MLP(width, 4 * width, init=truncated, dtype=dtype, rngs=rngs)

    def enter(self, x: jax.Array, c: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Gives q, k and v (B, N, H, D), and the factors that `leave` needs."""
        parts = jnp.split(self.ada(c).astype(jnp.float32), 2 if self.last else 6, axis=-1)
        scale, shift = parts if self.last else (parts[1], parts[0])
        qkv = self.qkv(modulate(layer_norm(x), shift, scale))
        return [part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(qkv, 3, axis=-1)], parts[2:]

    def leave(self, x: jax.Array, attended: jax.Array, factors: list[jax.Array]) -> jax.Array:
        """Gives the stream after the block."""
        if self.last:
            return x
        gate1, shift, scale, gate2 = factors
        x = add_gated(x, gate1, self.proj(attended.reshape(*x.shape[:2], -1)))
        return constrain(add_gated(x, gate2, self.mlp(modulate(layer_norm(x), shift, scale))))


class _Joint(nnx.Module):
    """Both streams of a block; called with (image, text) and silu of the conditioning vector."""

    def __init__(self, config: TrunkConfig, last: bool, rngs: nnx.Rngs) -> None:
        self.image, self.text = _Stream(config, False, rngs), _Stream(config, last, rngs)

    def __call__(self, streams: tuple[jax.Array, jax.Array], c: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, text = streams
        (own, factors), (other, text_factors) = self.image.enter(image, c), self.text.enter(text, c)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, other, strict=True))
        out, count = attention(q, k, v), image.shape[1]
        return (
            self.image.leave(image, out[:, :count], factors),
            self.text.leave(text, out[:, count:], text_factors),
        )


class JointTrunk(nnx.Module):
    """Embedded image tokens and a caption -> features of the tokens."""

    def __init__(self, config: TrunkConfig, text: TextConfig, tokens: int, rngs: nnx.Rngs) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.config, self.text = config, text
        self.positions = nnx.Param(truncated(rngs.params(), (tokens, width)))
        self.words = linear(text.width, width, init=truncated, dtype=dtype, rngs=rngs)
        self.vector = linear(text.width + text.score, width, init=truncated, rngs=rngs)
        self.blocks = stack(lambda r: _Joint(config, False, r), config.depth - 1, rngs)
        self.last = _Joint(config, True, rngs)
        self.ada = linear(width, 2 * width, init=truncated, dtype=dtype, rngs=rngs)

    def start(self, x: jax.Array, cond: Cond) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Gives both streams before the first block, and what conditions every block."""
        c = jax.nn.silu(self.vector(self.text.vector(cond)))
        return (x + self.positions[...], self.words(cond["prompt"]).astype(jnp.float32)), c

    def run(self, streams: Any, c: jax.Array, keep: tuple[int, ...] = ()) -> Any:
        """Runs all blocks but the last; `keep` as in `gen.nn.layers.run_stack`."""
        options: dict[str, Any] = {"remat": self.config.remat, "scan": self.config.scan, "keep": keep}
        return run_stack(self.blocks, streams, lambda block, pair, _: (block(pair, c), None), **options)

    def __call__(self, x: jax.Array, cond: Cond) -> jax.Array:
        """x (B, N, width) float32 and the caption's conditions -> (B, N, width) float32."""
        streams, c = self.start(x, cond)
        image, _ = self.last(self.run(streams, c).x, c)
        scale, shift = jnp.split(self.ada(c).astype(jnp.float32), 2, axis=-1)
        return modulate(layer_norm(image), shift, scale)


def caption_of(frozen: Any, rows: int) -> dict[str, jax.Array]:
    """Gives the features of the empty caption, frozen role ``empty``, for each of `rows` samples; none without it."""
    empty = frozen.get("empty", {})
    return {f"empty_{name}": jnp.broadcast_to(value, (rows, *value.shape)) for name, value in empty.items()}


def without_caption(cond: Cond) -> Cond:
    """Gives the same conditions with the empty caption. Raises GenError where its features are not known."""
    lacking = [name for name in CAPTION if f"empty_{name}" not in cond]
    if lacking:
        raise GenError(
            f"training with cond_dropout, and guidance, need the features {' and '.join(CAPTION)} of the empty caption "
            "as the frozen role 'empty'; encode '' with the same text encoder, or sample without guidance"
        )
    return {**cond, **{name: cond[f"empty_{name}"] for name in CAPTION}}
