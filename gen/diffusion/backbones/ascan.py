"""An AsCAN-style backbone: convolutions where maps are large, more and more attention where they are small.

Kag et al. 2024, "AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and Generation", mix both
kinds of block inside the stages of a U-Net on latents: mostly convolution early, progressively attention later, the
decoder mirroring the encoder. The paper's tables of layers are not published: this is an assembly of ours from standard
blocks in its style, with the letters of each stage in the configuration, not a reproduction.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.diffusion.backbones.backbone import BackboneConfig, Factors, scaled
from gen.diffusion.backbones.dit import Block as AttentionBlock
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.staged import Staged
from gen.errors import GenError
from gen.nn.convolution import general_convolution
from gen.nn.layers import (
    Remat,
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
from gen.nn.mamba import Scan2D
from gen.training.sharding import constrain

__all__ = ["SIZES", "AsCAN", "AsCANConfig", "ConvBlock", "ascan"]

SIZES: dict[str, int] = {"S": 96, "B": 160, "L": 256}  # base widths, ours

_zeros = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class AsCANConfig(BackboneConfig):
    """An AsCAN-style U-Net. The defaults are its B for 256 px latents.

    Attributes:
      size: (H, W) of the input.
      channels: channels of the input.
      patch: side of a patch.
      width: of the first stage; each further stage halves the map and doubles the width.
      stages: the encoder's blocks, a string per stage: C convolution, T attention, M selective scan along four snakes.
        The decoder has them in reverse.
      middle: blocks between encoder and decoder.
      head_width: width of an attention head.
      expansion: hidden width of the convolution blocks over width.
      groups: of their norms.
      mlp_ratio: hidden size of the other blocks' MLP over width.
      num_classes: number of labels, with one more row for the null label; 0 for an unconditional network.
      learned_variance: twice the output channels; the second half is the raw variance.
      times: 1, or 2 for flow maps: each time has its own embedder and the embeddings are added.
      dtype: compute type of the products and of the residual stream; parameters, the statistics of norms and the sums
        into the stream are float32.
      remat: what the backward pass recomputes.
      scan: equal neighbours in a stage as one scan, or a Python loop.

    Raises GenError where the numbers do not fit together.
    """

    size: tuple[int, int] = (32, 32)
    channels: int = 4
    patch: int = 1
    width: int = 160
    stages: tuple[str, ...] = ("CCC", "CCT", "CTT")
    middle: str = "TT"
    head_width: int = 32
    expansion: int = 4
    groups: int = 32
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learned_variance: bool = False
    times: Literal[1, 2] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"
    scan: bool = True

    def __post_init__(self) -> None:
        factor = self.patch * 2 ** max(len(self.stages) - 1, 0)
        if not self.stages or any(n <= 0 or n % factor for n in self.size):
            raise GenError(f"AsCAN size {self.size} must be a multiple of {factor} for {len(self.stages)} stages")
        for string in (*self.stages, self.middle):
            if not string or set(string) - set("CTM"):
                raise GenError(f"AsCAN stage '{string}' must be letters C, T and M, at least one")
        if self.width % self.head_width or self.width % 4 or self.expansion * self.width % self.groups:
            raise GenError(
                f"AsCAN width {self.width} must be a multiple of 4 and of head_width {self.head_width}, and "
                f"{self.expansion} times it of groups {self.groups}"
            )

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Gives (H, W) of each stage's map."""
        h, w = (n // self.patch for n in self.size)
        return tuple((h >> i, w >> i) for i in range(len(self.stages)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width << i for i in range(len(self.stages)))

    def build(self, rngs: nnx.Rngs) -> "AsCAN":
        """Gives the module with freshly drawn parameters."""
        return AsCAN(self, rngs)


def ascan(name: str, *, size: tuple[int, int] = (32, 32), **changes: Any) -> AsCANConfig:
    """Gives a size of ours by name, "S", "B" or "L". Raises GenError for an unknown name."""
    if name not in SIZES:
        raise GenError(f"unknown AsCAN size '{name}'; {suggest(name, SIZES)}")
    return dataclasses.replace(AsCANConfig(size, width=SIZES[name]), **changes)


def _conv(width: int, features: int, dtype: Any, rngs: nnx.Rngs, stride: int = 1, bias: bool = False) -> nnx.Conv:
    return nnx.Conv(
        width,
        features,
        (3, 3),
        stride,
        padding=((1, 1), (1, 1)),
        use_bias=bias,
        dtype=dtype,
        conv_general_dilated=general_convolution,
        rngs=rngs,
    )


class ConvBlock(nnx.Module):
    """EfficientNetV2's fused inverted bottleneck, the time and label entering after its first norm as in ADM.

    x += gate * project(silu(norm(conv3x3(x)) (1 + scale) + shift)), the gate zero at first.
    """

    def __init__(self, config: AsCANConfig, grid: tuple[int, int], width: int, rngs: nnx.Rngs) -> None:
        dtype, hidden = jnp.dtype(config.dtype), config.expansion * width
        self.grid, self.hidden = grid, hidden
        self.expand = _conv(width, hidden, dtype, rngs)
        self.norm = nnx.GroupNorm(
            hidden, config.groups, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs
        )
        self.project = linear(hidden, width, bias=False, dtype=dtype, rngs=rngs)
        self.ada = linear(width, 2 * hidden + width, dtype=dtype, rngs=rngs, init=_zeros)

    def __call__(self, x: jax.Array, c: jax.Array, factors: Factors = None) -> jax.Array:
        """Takes x (B, H W, width) in the stream's type, c (B, width); of the `factors` its own is the first."""
        m = self.ada(jax.nn.silu(c)).astype(jnp.float32)
        shift, scale, gate = jnp.split(m, [self.hidden, 2 * self.hidden], axis=-1)
        (gate,) = scaled((gate,), factors and factors[:1])
        maps = self.norm(self.expand(x.reshape(x.shape[0], *self.grid, -1)))
        hidden = jax.nn.silu(modulate(maps.reshape(*x.shape[:2], -1), shift, scale))
        return add_gated(x, gate, self.project(hidden))


class TokenScan(nnx.Module):
    """`Scan2D` on a map's tokens, in the place of attention."""

    def __init__(self, width: int, grid: tuple[int, int], dtype: Any, rngs: nnx.Rngs) -> None:
        self.grid = grid
        self.scan = Scan2D(width, "snake", dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scan(x.reshape(x.shape[0], *self.grid, -1)).reshape(x.shape)


def _block(config: AsCANConfig, letter: str, stage: int, rngs: nnx.Rngs) -> Any:
    """A block, called as ``block(x, c, factors)`` with c of the stage's width."""
    grid, width = config.grids[stage], config.widths[stage]
    if letter == "C":
        return ConvBlock(config, grid, width, rngs)
    heads = width // config.head_width
    options = DiTConfig(grid, patch=1, width=width, heads=heads, mlp_ratio=config.mlp_ratio, dtype=config.dtype)
    block: Any = AttentionBlock(options, rngs)
    if letter == "M":
        block.attn = TokenScan(width, grid, jnp.dtype(config.dtype), rngs)
    return block


class AsCAN(Staged):
    """The network of an `AsCANConfig`; at initialisation the output is exactly 0.

    Features: ``down_i``, ``middle``, ``up_i``, with i the stage.
    """

    title = "AsCAN"
    branches = ("mixing", "mlp")  # of attention and scan blocks; a convolution block has the first alone

    def __init__(self, config: AsCANConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        dtype, widths, condition = jnp.dtype(config.dtype), config.widths, 4 * config.width
        self.patch = linear(config.patch**2 * config.channels, config.width, dtype=dtype, rngs=rngs)
        for name, stage, string in self._plan():
            setattr(self, f"{name}_cond", linear(condition, widths[stage], dtype=dtype, rngs=rngs))
            for i, (letter, depth) in enumerate(_runs(string)):
                blocks = stack(functools.partial(_block, config, letter, stage), depth, rngs)
                setattr(self, f"{name}_{i}", blocks)
        for i in range(len(widths) - 1):
            setattr(self, f"shrink_{i}", _conv(widths[i], widths[i + 1], dtype, rngs, 2, True))
            setattr(self, f"grow_{i}", _conv(widths[i + 1], widths[i], dtype, rngs, 1, True))
        for i, width in enumerate(widths):
            setattr(self, f"join_{i}", linear(2 * width, width, dtype=dtype, rngs=rngs))
        self.final_ada = linear(condition, 2 * config.width, dtype=dtype, rngs=rngs, init=_zeros)
        outputs = config.patch**2 * config.channels * (2 if config.learned_variance else 1)
        self.final = linear(config.width, outputs, dtype=dtype, rngs=rngs, init=_zeros)

    def _plan(self) -> list[tuple[str, int, str]]:
        """(name, stage, letters) in the order of computation."""
        stages = list(enumerate(self.config.stages))
        down = [(f"down_{i}", i, string) for i, string in stages]
        up = [(f"up_{i}", i, string[::-1]) for i, string in reversed(stages)]
        return [*down, ("middle", len(stages) - 1, self.config.middle), *up]

    def features(self) -> list[str]:
        """Names the features: those of the stages down, of the middle and of the stages up."""
        return [name for name, _, _ in self._plan()]

    def controls(self) -> dict[str, tuple[int, ...]]:
        """Gives the factors on the residual branches of each block, as ``blocks``."""
        return {"blocks": (sum(self.depths().values()),)}

    def depths(self) -> dict[str, int]:
        """Gives the numbers of blocks down, in the middle and up."""
        return {name: len(string) for name, _, string in self._plan()}

    def head(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        """Turns tokens back into pixels."""
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        out = self.final(modulate(layer_norm(tokens), shift, scale)).astype(jnp.float32)
        return unpatchify(out, self.config.size, self.config.patch)

    def walk(self, x: jax.Array, c: jax.Array, factors: Mapping[str, Factors]) -> Iterator[tuple[str, jax.Array]]:
        """Gives the features in order, each computed when asked for."""
        config, grids = self.config, self.config.grids
        last = len(grids) - 1
        tokens = self.patch(patchify(x, config.patch)).astype(jnp.float32)
        tokens = constrain((tokens + sincos_positions(grids[0], config.width)).astype(config.dtype))
        skips: list[jax.Array] = []
        for name, stage, string in self._plan():
            if name.startswith("up"):
                if stage < last:
                    maps = tokens.reshape(x.shape[0], *grids[stage + 1], -1).repeat(2, axis=1).repeat(2, axis=2)
                    tokens = _tokens(getattr(self, f"grow_{stage}")(maps))
                joined = jnp.concatenate([tokens, skips.pop()], axis=-1)
                tokens = getattr(self, f"join_{stage}")(joined)
            tokens = self._run(name, string, tokens, c, factors[name])
            yield name, tokens
            if name.startswith("down"):
                skips.append(tokens)
                if stage < last:
                    maps = tokens.reshape(x.shape[0], *grids[stage], -1)
                    tokens = _tokens(getattr(self, f"shrink_{stage}")(maps))

    def _run(self, name: str, string: str, tokens: jax.Array, c: jax.Array, factors: Factors) -> jax.Array:
        own, start = getattr(self, f"{name}_cond")(jax.nn.silu(c)).astype(jnp.float32), 0
        for i, (_, depth) in enumerate(_runs(string)):
            tokens = run_stack(
                getattr(self, f"{name}_{i}"),
                tokens,
                lambda block, tokens, factors: (constrain(block(tokens, own, factors)), None),
                per_layer=None if factors is None else tuple(branch[start : start + depth] for branch in factors),
                remat=self.config.remat,
                scan=self.config.scan,
            ).x
            start += depth
        return tokens


def _runs(string: str) -> list[tuple[str, int]]:
    """ "CCT" -> [("C", 2), ("T", 1)]: equal neighbours are stacked."""
    return [(letter, len(list(group))) for letter, group in itertools.groupby(string)]


def _tokens(maps: jax.Array) -> jax.Array:
    return maps.reshape(maps.shape[0], -1, maps.shape[-1])
