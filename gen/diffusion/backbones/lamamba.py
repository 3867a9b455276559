"""LaMamba-Diff: a U-shaped backbone whose blocks scan the whole map, attend within windows, and mix channels.

Fu, Chen & Yu 2024, "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba". Every
branch is gated by adaptive layer norm as in DiT; cost is linear in the number of pixels. Widths are d, 2d, 4d, 4d at
full, half, quarter and quarter resolution; the decoder mirrors the encoder and adds its outputs.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.config import suggest
from gen.diffusion.backbones.backbone import BackboneConfig, Factors, scaled
from gen.diffusion.backbones.staged import Staged
from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.convolution import general_convolution
from gen.nn.layers import (
    MLP,
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
from gen.nn.mamba import Order, Scan2D
from gen.training.sharding import constrain

__all__ = ["SIZES", "Block", "LaMamba", "LaMambaConfig", "WindowAttention", "lamamba", "relative_index", "window_mask"]

# name -> (base width, heads). XL is the published configuration; the others are of our own, near DiT's parameter
# counts, since the published widths are not known.
SIZES: dict[str, tuple[int, int]] = {"S": (72, 8), "B": (144, 16), "L": (272, 16), "XL": (320, 16)}
STAGES = 4

_zeros = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class LaMambaConfig(BackboneConfig):
    """A LaMamba-Diff. The defaults are XL for 256 px latents.

    Attributes:
      size: (H, W) of the input.
      channels: channels of the input.
      patch: side of a patch; the token grid H / patch, W / patch must be divisible by 4.
      width: base width d, a multiple of 4.
      depths: blocks of each encoder stage; the decoder has the same in reverse.
      middle: blocks between encoder and decoder.
      extra: whether every decoder stage has one block more.
      heads: attention heads of each encoder stage.
      window: side of the attention windows; stages that are no larger attend to everything.
      order: directions of the scans (`gen.nn.mamba.scan_orders`).
      state, expand, rank, conv, conv_bias: of the scan layer (`gen.nn.mamba.Scan2D`).
      mlp_ratio: hidden size of the MLP over width.
      merging: how the encoder halves its maps: ``neighbours`` (four pixels on the channels, normalised, then
        projected), or a ``conv2`` (2 x 2) or ``conv3`` (3 x 3) convolution with stride 2, then normalised.
      num_classes: number of labels; 0 for an unconditional network. The label table has one more row, the null label.
      learned_variance: twice the output channels; the second half is the raw variance.
      times: 1, or 2 for flow maps: each time has its own embedder and the embeddings are added.
      dtype: compute type of the matrix products and of the residual stream; parameters, the statistics of norms, the
        recurrences and the sums into the stream are float32.
      remat: what the backward pass recomputes.
      scan: each stage as one scan over its blocks, or a Python loop.

    Raises GenError where the numbers do not fit together.
    """

    size: tuple[int, int] = (32, 32)
    channels: int = 4
    patch: int = 1
    width: int = 320
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    middle: int = 2
    extra: bool = True
    heads: tuple[int, int, int, int] = (16, 16, 16, 16)
    window: int = 8
    order: Order = "snake"
    state: int = 1
    expand: float = 2.0
    rank: int | None = None
    conv: int = 3
    conv_bias: bool = False
    mlp_ratio: float = 4.0
    merging: Literal["neighbours", "conv2", "conv3"] = "neighbours"
    num_classes: int = 1000
    learned_variance: bool = False
    times: Literal[1, 2] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"
    scan: bool = True

    def __post_init__(self) -> None:
        if any(n <= 0 or n % (4 * self.patch) for n in self.size):
            raise GenError(f"LaMamba size {self.size} must be a multiple of {4 * self.patch}, four patches")
        if self.width % 4:
            raise GenError(f"LaMamba width {self.width} must be a multiple of 4 for its position table")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise GenError(f"LaMamba stage width {width} is not divisible by heads {heads}; change one of them")
        for grid in self.grids:
            if any(n > self.window and n % self.window for n in grid):
                raise GenError(f"LaMamba map {grid} is not cut evenly by window {self.window}; use sizes it divides")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of each encoder stage."""
        return (self.width, 2 * self.width, 4 * self.width, 4 * self.width)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Gives (H, W) of each encoder stage's map."""
        h, w = (n // self.patch for n in self.size)
        return ((h, w), (h // 2, w // 2), (h // 4, w // 4), (h // 4, w // 4))

    def build(self, rngs: nnx.Rngs) -> "LaMamba":
        """Gives the module with freshly drawn parameters."""
        return LaMamba(self, rngs)


def lamamba(
    name: str, *, size: tuple[int, int] = (32, 32), learned_variance: bool = True, **changes: Any
) -> LaMambaConfig:
    """Gives a size by name, "S" to "XL"; latents of 4 channels, 1000 classes, learned variance.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown LaMamba size '{name}'; {suggest(name, SIZES)}")
    width, heads = SIZES[name]
    config = LaMambaConfig(size, width=width, heads=(heads,) * 4, learned_variance=learned_variance)
    return dataclasses.replace(config, **changes)


def affine_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Applies LayerNorm with affine, eps 1e-5, in float32."""
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def relative_index(window: tuple[int, int]) -> np.ndarray:
    """Gives the row of the bias table for each pair (query, key) of a window's pixels: (n, n) int64."""
    rows, columns = (axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, window), indexing="ij"))
    dy = rows[:, None] - rows[None] + window[0] - 1
    dx = columns[:, None] - columns[None] + window[1] - 1
    return dy * (2 * window[1] - 1) + dx


def window_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Gives (windows, n, n) float32: 0 between pixels that were neighbours before the roll, else -100."""

    def regions(n: int, side: int, shift: int) -> np.ndarray:
        position = np.arange(n)
        return (position >= n - side).astype(int) + (position >= n - shift) if shift else np.zeros(n, int)

    rows, columns = (regions(*axis) for axis in zip(grid, window, shift, strict=True))
    region = rows[:, None] * 3 + columns
    tiles = region.reshape(grid[0] // window[0], window[0], grid[1] // window[1], window[1])
    tiles = tiles.transpose(0, 2, 1, 3).reshape(-1, window[0] * window[1])
    return np.where(tiles[:, :, None] == tiles[:, None], 0.0, -100.0).astype(np.float32)


class WindowAttention(nnx.Module):
    """Swin's attention within windows, with a learned bias by relative position, and windows shifted on request.

    Args:
      grid: (H, W) of the map.
      window: side of a window, cut to the map; a map of one window is never shifted.
      shift: by how many pixels the windows of shifted blocks move.
    """

    def __init__(
        self, width: int, heads: int, grid: tuple[int, int], window: int, shift: int, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.heads, self.grid = heads, grid
        self.window = (min(window, grid[0]), min(window, grid[1]))
        self.shift = (shift if grid[0] > window else 0, shift if grid[1] > window else 0)
        self.qkv = linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)
        rows = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        self.bias = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (rows, heads)))

    def __call__(self, x: jax.Array, shifted: bool | jax.Array = False) -> jax.Array:
        """Maps (B, H W, width) -> the same; `shifted` is a scalar, so that it may differ between scanned blocks."""
        b, n, width = x.shape
        x = x.reshape(b, *self.grid, width)
        rolls = any(self.shift)
        if rolls:
            x = jnp.where(shifted, jnp.roll(x, [-s for s in self.shift], axis=(1, 2)), x)
        qkv = self._windows(self.qkv(x))
        q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:3], 3, self.heads, width // self.heads), 3, 0)
        bias = self.bias[...][relative_index(self.window)].transpose(2, 0, 1)
        if rolls:
            bias = bias + jnp.where(shifted, window_mask(self.grid, self.window, self.shift)[:, None], 0.0)
        out = self._merge(attention(q, k, v, bias=bias).reshape(b, -1, width))
        if rolls:
            out = jnp.where(shifted, jnp.roll(out, self.shift, axis=(1, 2)), out)
        return self.proj(out).reshape(b, n, width)

    def _windows(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, windows, n, C)."""
        (h, w), (wh, ww) = self.grid, self.window
        x = x.reshape(x.shape[0], h // wh, wh, w // ww, ww, -1).swapaxes(2, 3)
        return x.reshape(x.shape[0], -1, wh * ww, x.shape[-1])

    def _merge(self, x: jax.Array) -> jax.Array:
        """The inverse of `_windows`; (B, windows n, C) -> (B, H, W, C)."""
        (h, w), (wh, ww) = self.grid, self.window
        return x.reshape(x.shape[0], h // wh, w // ww, wh, ww, -1).swapaxes(2, 3).reshape(x.shape[0], h, w, -1)


class Block(nnx.Module):
    """x += g1 Scan(N(x)); x += g2 WindowAttention(N(x)); x += g3 MLP(N(x)), each norm affine and modulated.

    Args:
      config: of the network.
      grid, width, heads: of the block's stage.
      condition: width of the condition.
      projected: whether it is first projected to the block's width.
      shift: see `WindowAttention`; half a window when None.
    """

    def __init__(
        self,
        config: LaMambaConfig,
        grid: tuple[int, int],
        width: int,
        heads: int,
        *,
        condition: int,
        projected: bool,
        shift: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.grid = grid
        self.cond = linear(condition, width, dtype=dtype, rngs=rngs) if projected else None
        self.ada = linear(width, 9 * width, dtype=dtype, rngs=rngs, init=_zeros)
        self.norm1, self.norm2, self.norm3 = (affine_norm(width, rngs) for _ in range(3))
        self.scan = Scan2D(
            width,
            config.order,
            state=config.state,
            expand=config.expand,
            rank=config.rank,
            conv=config.conv,
            conv_bias=config.conv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        shift = config.window // 2 if shift is None else shift
        self.attn = WindowAttention(width, heads, grid, config.window, shift, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, int(width * config.mlp_ratio), approximate=False, dtype=dtype, rngs=rngs)

    def modulation(self, c: jax.Array) -> jax.Array:
        """Gives (B, 9 width) float32: shift, scale and gate of the scan, the attention and the MLP."""
        return self.ada(jax.nn.silu(c if self.cond is None else self.cond(c))).astype(jnp.float32)

    def __call__(
        self, x: jax.Array, c: jax.Array, shifted: bool | jax.Array = False, factors: Factors = None
    ) -> jax.Array:
        """Maps x (B, H W, width), c (B, condition) and `factors` on the gates -> as x, in the stream's type."""
        m = jnp.split(self.modulation(c), 9, axis=-1)
        m[2::3] = scaled(tuple(m[2::3]), factors)
        x = add_gated(x, m[2], self.scan(self._maps(modulate(self.norm1(x), *m[:2]))).reshape(x.shape))
        x = add_gated(x, m[5], self.attn(modulate(self.norm2(x), *m[3:5]), shifted))
        return add_gated(x, m[8], self.mlp(modulate(self.norm3(x), *m[6:8])))

    def _maps(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], *self.grid, -1)


class Merging(nnx.Module):
    """Halves a map and changes its channels; see `LaMambaConfig.merging`."""

    def __init__(self, kind: str, width: int, features: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.kind = kind
        self.reduce: Any
        if kind == "neighbours":
            self.norm = affine_norm(4 * width, rngs)
            self.reduce = linear(4 * width, features, bias=False, dtype=dtype, rngs=rngs)
        elif kind == "conv2":
            self.reduce = linear(4 * width, features, dtype=dtype, rngs=rngs)
            self.norm = affine_norm(features, rngs)
        else:
            self.reduce = nnx.Conv(
                width,
                features,
                (3, 3),
                2,
                padding=((1, 1), (1, 1)),
                dtype=dtype,
                conv_general_dilated=general_convolution,
                rngs=rngs,
            )
            self.norm = affine_norm(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, width) -> (B, H W / 4, features), in the compute type or, normalised last, float32."""
        b, h, w, _ = x.shape
        if self.kind == "neighbours":  # column by column, not in `patchify`'s order
            parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            out = self.reduce(self.norm(jnp.concatenate(parts, axis=-1)))
        else:
            out = self.norm(self.reduce(patchify(x, 2) if self.kind == "conv2" else x))
        return out.reshape(b, h * w // 4, -1)


class Expanding(nnx.Module):
    """Every pixel becomes factor x factor pixels of `features` channels, normalised."""

    def __init__(self, width: int, features: int, factor: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.factor = factor
        self.expand = linear(width, factor**2 * features, bias=False, dtype=dtype, rngs=rngs)
        self.norm = affine_norm(features, rngs)

    def __call__(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Maps (B, H W, width) of a map `grid` -> (B, H W factor^2, features) float32."""
        size = (grid[0] * self.factor, grid[1] * self.factor)
        out = self.norm(unpatchify(self.expand(x), size, self.factor))
        return out.reshape(x.shape[0], size[0] * size[1], -1)


class LaMamba(Staged):
    """The network of a `LaMambaConfig`.

    At initialisation the output is exactly 0 and each block is the identity (gates and last layer are zero; the
    published code means to zero the last layer too, but does not). Features: ``tokens`` (patches with positions),
    ``down_0`` to ``down_3`` (encoder stages before they are halved), ``middle``, ``up_0`` to ``up_3``.
    """

    title = "LaMamba"
    branches = ("scan", "attention", "mlp")

    def __init__(self, config: LaMambaConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        dtype, widths, width, condition = jnp.dtype(config.dtype), config.widths, config.width, 4 * config.width
        self.patch = linear(config.patch**2 * config.channels, width, dtype=dtype, rngs=rngs)
        self.patch_norm = affine_norm(width, rngs)
        grid = config.grids[0]
        self.positions = nnx.Param(jnp.asarray(sincos_positions(grid, width)).reshape(*grid, width))

        def blocks(stage: int, depth: int, projected: bool) -> nnx.Module:
            def make(rngs: nnx.Rngs) -> Block:
                return Block(
                    config,
                    config.grids[stage],
                    widths[stage],
                    config.heads[stage],
                    condition=condition,
                    projected=projected,
                    rngs=rngs,
                )

            return stack(make, depth, rngs)

        for i in range(STAGES):
            setattr(self, f"down_{i}", blocks(i, config.depths[i], widths[i] != condition))
        for i in (0, 1):
            setattr(self, f"merge_{i}", Merging(config.merging, widths[i], widths[i + 1], dtype=dtype, rngs=rngs))
        self.middle = blocks(STAGES - 1, config.middle, False)
        for i in range(STAGES):
            stage = STAGES - 1 - i
            setattr(self, f"up_{i}", blocks(stage, config.depths[stage] + config.extra, True))
        for i in (2, 3):
            setattr(self, f"expand_{i}", Expanding(widths[4 - i], widths[3 - i], 2, dtype=dtype, rngs=rngs))
        self.final_expand = Expanding(width, width, config.patch, dtype=dtype, rngs=rngs)
        self.final_cond = linear(condition, width, dtype=dtype, rngs=rngs)
        self.final_ada = linear(width, 2 * width, dtype=dtype, rngs=rngs, init=_zeros)
        outputs = config.channels * (2 if config.learned_variance else 1)
        self.final = linear(width, outputs, dtype=dtype, rngs=rngs, init=_zeros)

    def features(self) -> list[str]:
        """Names the features: tokens, then those of the stages down, of the middle and of the stages up."""
        return ["tokens", *(f"down_{i}" for i in range(STAGES)), "middle", *(f"up_{i}" for i in range(STAGES))]

    def depths(self) -> dict[str, int]:
        """Gives the numbers of blocks down, in the middle and up."""
        config = self.config
        down = {f"down_{i}": depth for i, depth in enumerate(config.depths)}
        up = {f"up_{i}": depth + config.extra for i, depth in enumerate(reversed(config.depths))}
        return {**down, "middle": config.middle, **up}

    def head(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        """Turns patches back into pixels, normalised twice."""
        tokens = self.final_expand(tokens, self.config.grids[0])
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(self.final_cond(c))).astype(jnp.float32), 2, axis=-1)
        out = self.final(modulate(layer_norm(tokens), shift, scale)).astype(jnp.float32)
        return out.reshape(out.shape[0], *self.config.size, -1)

    def walk(self, x: jax.Array, c: jax.Array, factors: Mapping[str, Factors]) -> Iterator[tuple[str, jax.Array]]:
        """Gives the features in order, each computed when asked for."""
        config = self.config
        grids = config.grids
        tokens = self.patch_norm(self.patch(patchify(x, config.patch)))
        tokens = constrain((tokens + self.positions[...].reshape(-1, config.width)).astype(config.dtype))
        yield "tokens", tokens
        skips = []
        for i in range(STAGES):
            tokens = self._run(f"down_{i}", tokens, c, factors)
            yield f"down_{i}", tokens
            skips.append(tokens)
            if i < 2:
                tokens = getattr(self, f"merge_{i}")(tokens.reshape(x.shape[0], *grids[i], -1)).astype(config.dtype)
        tokens = tokens + self._run("middle", tokens, c, factors)
        yield "middle", tokens
        for i in range(STAGES):
            if i >= 2:
                tokens = getattr(self, f"expand_{i}")(tokens, grids[4 - i]).astype(config.dtype)
            tokens = self._run(f"up_{i}", tokens + skips.pop(), c, factors)
            yield f"up_{i}", tokens

    def _run(self, name: str, tokens: jax.Array, c: jax.Array, factors: Mapping[str, Factors]) -> jax.Array:
        """The blocks of a stage; every second one shifts its windows."""
        return run_stack(
            getattr(self, name),
            tokens,
            lambda block, tokens, extra: (constrain(block(tokens, c, *extra)), None),
            per_layer=(jnp.arange(self.depths()[name]) % 2 == 1, factors[name]),
            remat=self.config.remat,
            scan=self.config.scan,
        ).x
