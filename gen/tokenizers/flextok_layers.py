"""What the two transformers of FlexTok are made of (Bachmann et al. 2025, arXiv 2502.13967).

No norm has parameters, no layer of a block has biases, and all norms use eps 1e-5. The patches of the latents and the
registers, the learned tokens that become ids, run through the blocks side by side.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.nn.attention import Attention
from gen.nn.layers import layer_norm, linear
from gen.nn.network import Buffer
from gen.nn.vit import Gated

__all__ = ["EPS", "Block", "GridPositions", "ModulatedBlock", "Positions", "learned", "sincos_table", "stretch_weights"]

Positions = Literal["sum", "product", "sincos"]

EPS = 1e-5


def learned(rngs: nnx.Rngs, *shape: int) -> nnx.Param[jax.Array]:
    """Learned vectors, drawn from a normal of deviation 0.02 that is cut at two deviations."""
    return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), shape))


def sincos_table(grid: Sequence[int], width: int) -> np.ndarray:
    """Gives the fixed positions (*grid, width) float32 of the official code.

    Channels are sin(q w), cos(q w), sin(p w), cos(p w), a quarter each, w_k = 10000^(-k / (width / 4)). On a square
    grid q is the row and p the column. On another one they are those of the transposed grid in row-major order: the
    official table is written column by column and read row by row, and published weights were trained with it.
    """
    rows, columns = grid
    first, second = np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [place.reshape(-1, 1) * frequencies for place in (first, second)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return table.reshape(rows, columns, width).astype(np.float32)


def stretch_weights(length: int, count: int) -> np.ndarray:
    """Interpolates linearly from end to end of a table of `length`: the matrix (count, length) float32."""
    place = np.linspace(0.0, length - 1.0, count)
    return np.maximum(1.0 - np.abs(place[:, None] - np.arange(length)), 0.0).astype(np.float32)


class GridPositions(nnx.Module):
    """The positions of patches: a learned vector of the row plus (or times) one of the column, or a fixed table.

    Args of the constructor:
      kind: sum, product, or sincos for `sincos_table`, which is a buffer.
      length: rows and columns that are learned.
      grid: (rows, columns) of the fixed table.
    """

    def __init__(self, kind: Positions, width: int, length: int, grid: tuple[int, int], rngs: nnx.Rngs) -> None:
        self.kind = kind
        if kind == "sincos":
            self.table = Buffer(jnp.asarray(sincos_table(grid, width)))
        else:
            self.axes = learned(rngs, 2, length, width)

    def __call__(self, grid: tuple[int, int], *, stretch: bool = False) -> jax.Array:
        """Gives the positions (rows * columns, width) of a grid.

        Args:
          stretch: whether all learned positions are spread over the grid, as bilinear interpolation of their map with
            aligned corners does; otherwise the first ones are taken.
        """
        if self.kind == "sincos":
            return self.table[...].reshape(-1, self.table.shape[-1])
        axes = [self.axes[axis] for axis in (0, 1)]
        if stretch:
            axes = [jnp.asarray(stretch_weights(len(t), n)) @ t for t, n in zip(axes, grid, strict=True)]
        rows, columns = axes[0][: grid[0], None], axes[1][None, : grid[1]]
        return (rows + columns if self.kind == "sum" else rows * columns).reshape(grid[0] * grid[1], -1)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=EPS, use_bias=False, use_scale=False, use_fast_variance=False, rngs=rngs)


def _parts(width: int, heads: int, dtype: Any, rngs: nnx.Rngs) -> tuple[Attention, Gated]:
    """The two branches of a block.

    q and k are normed, and their products scaled by 8 / head size: 1 / sqrt(head size) at the published size of 64.
    """
    options: dict[str, Any] = {"bias": False, "dtype": dtype, "rngs": rngs}
    attention = Attention(width, heads, proj_bias=False, norm=_norm, scale=8.0 * heads / width, **options)
    return attention, Gated(width, int(2 * int(4 * width) / 3), jax.nn.silu, **options)


class Block(nnx.Module):
    """x += Attention(LN(x)); x += SwiGLU(LN(x))."""

    def __init__(self, width: int, heads: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attn, self.mlp = _parts(width, heads, dtype, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x (B, N, width) float32; `mask` (N, N) bool says which tokens (second axis) a token (first axis) sees."""
        x = x + self.attn(layer_norm(x, EPS), mask=mask).astype(jnp.float32)
        return x + self.mlp(layer_norm(x, EPS)).astype(jnp.float32)


class ModulatedBlock(nnx.Module):
    """x += gate1 Attention(LN(x) (1 + scale1) + shift1); x += gate2 SwiGLU(LN(x) (1 + scale2) + shift2).

    One layer, zero at first, makes the twelve vectors of a sample: gate1, gate2, shift1, scale1, shift2, scale2 for its
    patches, then for its registers.
    """

    def __init__(self, width: int, heads: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attn, self.mlp = _parts(width, heads, dtype, rngs)
        self.ada = linear(width, 12 * width, dtype=dtype, rngs=rngs, init=nnx.initializers.zeros_init())

    def __call__(self, x: jax.Array, c: jax.Array, patches: int) -> jax.Array:
        """x (B, N, width) float32 whose first `patches` tokens are patches; c (B, width) float32."""
        vectors = jnp.split(self.ada(jax.nn.silu(c)).astype(jnp.float32)[:, None], 12, axis=-1)
        patch = (jnp.arange(x.shape[1]) < patches)[:, None]
        pairs = zip(vectors[:6], vectors[6:], strict=True)
        gate1, gate2, shift1, scale1, shift2, scale2 = (jnp.where(patch, p, r) for p, r in pairs)
        x = x + gate1 * self.attn(layer_norm(x, EPS) * (1.0 + scale1) + shift1).astype(jnp.float32)
        return x + gate2 * self.mlp(layer_norm(x, EPS) * (1.0 + scale2) + shift2).astype(jnp.float32)
