"""Distilled Decoding's student of a LlamaGen: the teacher's blocks read noise and write all tokens at once.

The sequence is the class token and N code vectors, of which the first t are data and the rest noise. What a position
gives is said of itself: a token's answer depends on its own noise and on everything before it (Liu et al. 2024, arXiv
2412.17153; names and order of the published networks). Two heads answer: logits over the codes, and a code vector.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.blocks import Reading, run_causal
from gen.autoregressive.gpt import Block, GPTConfig, rotation
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.layers import Embed, linear, stack
from gen.nn.network import Cond, Params
from gen.nn.rotary import rotate_pairs
from gen.training.sharding import constrain

__all__ = ["CodeHead", "GPTStudent", "GPTStudentConfig"]

_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class GPTStudentConfig:
    """The student's network. It takes (vectors (B, N, channels), known (B,) int32, conditions) and gives (logits (B, N,
    vocabulary), vectors (B, N, channels)), both float32.

    Attributes:
      of: the teacher, class-conditional; its vocabulary, depth and width are the student's.
      channels: of a code vector.

    Raises GenError for a teacher that reads captions.
    """

    of: GPTConfig
    channels: int = 8

    def __post_init__(self) -> None:
        if self.of.text is not None:
            raise GenError("a student of a caption's LlamaGen has no published form; give a teacher of classes")

    @property
    def shape(self) -> tuple[int, int]:
        """Gives the shape (N, channels) of what it reads and writes."""
        return self.of.length, self.channels

    @property
    def conditions(self) -> Conditions:
        """Gives the teacher's conditions."""
        return self.of.conditions

    def begun(self, teacher: Params) -> Params:
        """Gives a teacher's parameters in the student's places, which are the same."""
        return teacher

    def build(self, rngs: nnx.Rngs) -> "GPTStudent":
        """Gives the module with freshly drawn parameters."""
        return GPTStudent(self, rngs)


class CodeHead(nnx.Module):
    """LayerNorm without affine, shift and scale of a table and the condition's embedding, and a linear layer."""

    def __init__(self, width: int, channels: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, use_bias=False, use_scale=False, rngs=rngs)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (2, width)) * width**-0.5)
        self.linear = linear(width, channels, init=_INIT, rngs=rngs)

    def __call__(self, x: jax.Array, embedded: jax.Array) -> jax.Array:
        """x (B, N, width), embedded (B, width) -> (B, N, channels) float32."""
        shift, scale = (row + embedded[:, None] for row in self.table[...])
        return self.linear(self.norm(x.astype(jnp.float32)) * (1.0 + scale) + shift)


class GPTStudent(nnx.Module):
    """The network of a `GPTStudentConfig`."""

    def __init__(self, config: GPTStudentConfig, rngs: nnx.Rngs) -> None:
        self.config, of = config, config.of
        dtype = jnp.dtype(of.dtype)
        self.tokens = linear(config.channels, of.width, init=_INIT, dtype=dtype, rngs=rngs)
        self.label = Embed(max(of.num_classes + of.null_class, 1), of.width, init=_INIT, rngs=rngs)
        self.known = Embed(2, of.width, init=_INIT, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(of, rngs), of.depth, rngs)
        self.norm = nnx.RMSNorm(of.width, epsilon=of.eps, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.head = linear(of.width, of.vocabulary, bias=False, init=zeros, dtype=dtype, rngs=rngs)
        self.codes = CodeHead(of.width, config.channels, rngs)

    def __call__(self, x: jax.Array, known: jax.Array, cond: Cond) -> tuple[jax.Array, jax.Array]:
        """Gives logits and vectors; see `GPTStudentConfig`."""
        of, (batch, length, _) = self.config.of, x.shape
        label = cond["label"] if of.num_classes else jnp.zeros((batch,), jnp.int32)
        embedded = self.label(label)
        cos, sin = rotation(of)
        places = jnp.arange(length + 1) <= known[:, None]  # the class token is data
        h = jnp.concatenate([embedded[:, None], self.tokens(x)], axis=1) + self.known(places.astype(jnp.int32))
        h, _, _ = run_causal(
            self.blocks,
            constrain(h.astype(of.dtype)),
            Reading(jnp.int32(0), lambda q: rotate_pairs(q, cos, sin)),
            of.depth,
            lambda block, x, reading: block(x, reading),
            remat=of.remat,
            scan=of.scan,
        )
        h = h[:, 1:]
        return self.head(self.norm(h)).astype(jnp.float32), self.codes(h, embedded)
