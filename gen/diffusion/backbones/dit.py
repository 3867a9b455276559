"""DiT: a transformer over patches, conditioned through adaptive layer norm whose gates start at zero.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers". Works on images or latents (H, W, C) and on
one-dimensional latent sequences (K, C). Two-time methods (flow maps) embed a second time beside the first.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.diffusion.backbones.backbone import Backbone, BackboneConfig, Call, Factors, Output, branch_factors, scaled
from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.layers import (
    MLP,
    Remat,
    TimeEmbedder,
    add_gated,
    layer_norm,
    linear,
    modulate,
    patchify,
    run_stack,
    sincos_positions,
    stack,
    unpatchify,
)
from gen.nn.network import Cond
from gen.training.sharding import constrain

__all__ = ["SIZES", "DiT", "DiTConfig", "dit"]

# name -> (depth, width, heads), table 1 of the paper
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

BRANCHES = ("attention", "mlp")  # of a block, in this order

_zeros = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class DiTConfig(BackboneConfig):
    """A DiT. The defaults are DiT-XL/2 for 256 px latents.

    Attributes:
      size: (H, W) of the input, or (K,) for a latent sequence.
      channels: channels of the input.
      patch: side of a patch; divides every entry of size.
      width, depth, heads: hidden size, number of blocks, attention heads.
      mlp_ratio: hidden size of the MLP over width.
      num_classes: number of labels; 0 for an unconditional network.
      null_class: the label table has one more row, the null label of classifier-free guidance.
      learned_variance: twice the output channels; the second half is the raw variance.
      times: 1, or 2 for flow maps: each time has its own embedder and the embeddings are added. The second one's last
        layer starts at zero, so that a network started from one with a single time gives the same outputs.
      dtype: compute type of the matrix products and of the residual stream; parameters, the statistics of norms and the
        sums into the stream are float32.
      remat: what the backward pass recomputes.
      scan: depth as one scan (constant compile time), or a Python loop.
      spacing: distance of neighbouring tokens in the position tables: a network that is brought from 256 to 512 px
        with 1/2 sees the coordinates that it knows (DiffFit, arXiv 2304.06648).

    Raises GenError where the numbers do not fit together.
    """

    size: tuple[int, ...] = (32, 32)
    channels: int = 4
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learned_variance: bool = False
    times: Literal[1, 2] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"
    scan: bool = True
    spacing: float = 1.0

    def __post_init__(self) -> None:
        if len(self.size) not in (1, 2) or any(n <= 0 or n % self.patch for n in self.size):
            raise GenError(f"DiT size {self.size} is not cut evenly by patch {self.patch}; use sizes it divides")
        if self.width % self.heads:
            raise GenError(f"DiT width {self.width} is not divisible by heads {self.heads}; change one of them")
        if self.width % (2 * len(self.size)):
            raise GenError(f"DiT width {self.width} must be a multiple of {2 * len(self.size)} for its position table")

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return tuple(n // self.patch for n in self.size)

    def build(self, rngs: nnx.Rngs) -> "DiT":
        """Gives the module with freshly drawn parameters."""
        return DiT(self, rngs)


def dit(name: str, *, size: tuple[int, ...] = (32, 32), learned_variance: bool = True, **changes: Any) -> DiTConfig:
    """Gives a published size by name, "S/2" to "XL/8"; 32 x 32 x 4 latents, 1000 classes, learned variance.

    Raises GenError for an unknown name.
    """
    family, _, patch = name.partition("/")
    known = [f"{family}/{patch}" for family in SIZES for patch in (2, 4, 8)]
    if name not in known:
        raise GenError(f"unknown DiT size '{name}'; {suggest(name, known)}")
    depth, width, heads = SIZES[family]
    config = DiTConfig(size, 4, int(patch), width, depth, heads, learned_variance=learned_variance)
    return dataclasses.replace(config, **changes)


class Block(nnx.Module):
    """x += gate1 Attention(LN(x) (1 + scale1) + shift1); x += gate2 MLP(LN(x) (1 + scale2) + shift2).

    A call takes x (B, N, width) in the type of the stream, c (B, width) float32 and, where branches are scaled, the
    `factors` on the two gates.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        self.attn = Attention(config.width, config.heads, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio), dtype=dtype, rngs=rngs)
        self.ada = linear(config.width, 6 * config.width, dtype=dtype, rngs=rngs, init=_zeros)

    def __call__(self, x: jax.Array, c: jax.Array, factors: Factors = None) -> jax.Array:
        m = self.ada(jax.nn.silu(c)).astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(m, 6, axis=-1)
        gate1, gate2 = scaled((gate1, gate2), factors)
        x = add_gated(x, gate1, self.attn(modulate(layer_norm(x), shift1, scale1)))
        return add_gated(x, gate2, self.mlp(modulate(layer_norm(x), shift2, scale2)))


class DiT(Backbone):
    """The network of a `DiTConfig`.

    At initialisation the output is exactly 0 and each block is the identity (gates and last layer are zero). The
    sinusoids of the time turn by one radian per unit at their fastest. Features: ``tokens`` (patches with positions)
    and ``block_0`` ... : (B, N, width) float32. Controls, each (depth,) and 1 for no change: ``attention`` and ``mlp``
    scale a branch of each block, ``blocks`` scales both. Relatives of DiT bring their own `block`, called as
    ``block(x, c, factors)``.
    """

    title = "DiT"

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs, block: Callable[[Any, nnx.Rngs], Any] = Block) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        patch_channels = config.patch ** len(config.size)
        self.patch = linear(patch_channels * config.channels, config.width, dtype=dtype, rngs=rngs)
        self.time = TimeEmbedder(config.width, rngs=rngs)
        if config.times == 2:
            self.time2 = TimeEmbedder(config.width, silent=True, rngs=rngs)
        if config.num_classes:
            rows = config.num_classes + config.null_class
            self.label = nnx.Embed(rows, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.blocks = stack(lambda rngs: block(config, rngs), config.depth, rngs)
        outputs = patch_channels * config.channels * (2 if config.learned_variance else 1)
        self.final_ada = linear(config.width, 2 * config.width, dtype=dtype, rngs=rngs, init=_zeros)
        self.final = linear(config.width, outputs, dtype=dtype, rngs=rngs, init=_zeros)

    def features(self) -> list[str]:
        """Names the tokens and the blocks."""
        return ["tokens", *(f"block_{i}" for i in range(self.config.depth))]

    def controls(self) -> dict[str, tuple[int, ...]]:
        """blocks, attention, mlp."""
        return dict.fromkeys(("blocks", *BRANCHES), (self.config.depth,))

    def embed(self, times: tuple[jax.Array, ...], cond: Cond) -> jax.Array:
        """c (B, width) float32: the sum of the time and label embeddings."""
        c = self.time(times[0])
        if self.config.times == 2:
            c = c + self.time2(times[1])
        return c + self.label(cond["label"]) if self.config.num_classes else c

    def norm(self, tokens: jax.Array) -> jax.Array:
        """Gives the norm before the last layer."""
        return layer_norm(tokens)

    def forward(self, call: Call) -> Output:
        """Does what `Backbone` says."""
        layers = tuple(i for i in range(self.config.depth) if f"block_{i}" in call.taps)
        c = constrain(self.embed(call.times, call.cond))
        tokens = self.patch(patchify(call.x, self.config.patch)).astype(jnp.float32)
        tokens = tokens + sincos_positions(self.config.grid, self.config.width, self.config.spacing)
        tokens = constrain(tokens.astype(self.config.dtype))
        features = {"tokens": tokens.astype(jnp.float32)} if "tokens" in call.taps else {}
        tokens, _, kept = run_stack(
            self.blocks,
            tokens,
            lambda block, tokens, factors: (constrain(block(tokens, c, factors)), None),
            per_layer=branch_factors(call.controls, BRANCHES, self.config.depth),
            remat=self.config.remat,
            scan=self.config.scan,
            keep=layers,
            stop=max(layers, default=-1) + 1 if call.stop else None,
        )
        features |= {f"block_{i}": kept[i].astype(jnp.float32) for i in layers}
        if call.stop:
            return tokens.astype(jnp.float32), features
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        out = self.final(modulate(self.norm(tokens), shift, scale)).astype(jnp.float32)
        return unpatchify(out, self.config.size, self.config.patch), features
