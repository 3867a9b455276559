"""3x3 convolutions that cost 16 multiplications for every four outputs where a CPU calculates them, instead of 36.

Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, CVPR 2016, section 4.1): the image falls into tiles of 4 x 4
pixels that overlap by two; tiles and kernel are taken to 16 points each by additions, at every point a matrix product
over channels is all that is left, and additions bring 2 x 2 outputs back. In float32 its rounding is that of the plain
sum (about 1e-6 of the largest output). Elsewhere, and for shapes where it does not pay, the convolution is XLA's.

The convolution and its two transposes are maps of one trilinear form: derivatives of any order, forward or reverse, are
made of the same three.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from gen.nn.mesh import gathered

__all__ = ["CONVOLUTIONS", "convolution", "general_convolution"]

CONVOLUTIONS = ("forward_3x3", "backward_3x3", "correlate_3x3")  # the primitives' names in a jaxpr

Rows = tuple[jax.Array, ...]
_CHANNELS = 128  # fewer in or out: little is saved, or nothing, and compiling takes longer
_KERNEL = 1024  # pairs of channels for each tile; with more the kernel's transformation costs what the tiles save
_BYTES = 1 << 24  # of transformed tiles at a time: what stays in a cache between the three passes


def convolution(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int | None = None) -> jax.Array:
    """Gives the convolution (cross-correlation, as in all of the field) of x (B, H, W, C) with kernel (h, w, C, K).

    Args:
      x, kernel: of one floating type.
      stride: of both axes.
      padding: zeros on every side; by default half the kernel's size, which keeps the image's size at stride 1.

    Returns:
      (B, H', W', K) of the same type.
    """
    kernel = gathered(kernel)
    b, height, width, inputs = x.shape
    plain = kernel.shape[:2] == (3, 3) and stride == 1 and padding in (None, 1) and x.dtype == jnp.float32
    tiles = b * math.ceil(height / 2) * math.ceil(width / 2)
    outputs = kernel.shape[3]
    if plain and min(inputs, outputs) >= _CHANNELS and inputs * outputs <= _KERNEL * tiles:
        return _forward.bind(x, kernel)
    pads = [(size // 2 if padding is None else padding,) * 2 for size in kernel.shape[:2]]
    return _xla(x, kernel, pads, stride)


def general_convolution(x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Gives `jax.lax.conv_general_dilated` with a kernel that each device holds whole (`gen.nn.mesh.gathered`).

    It is what `nnx.Conv` calls for strides, paddings and kernels that `convolution` does not take.
    """
    return jax.lax.conv_general_dilated(x, gathered(kernel), *args, **options)


def _xla(x: jax.Array, kernel: jax.Array, pads: Any = ((1, 1), (1, 1)), stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=numbers)


def _backward_xla(y: jax.Array, kernel: jax.Array) -> jax.Array:
    return _xla(y, kernel[::-1, ::-1].swapaxes(2, 3))


def _correlate_xla(x: jax.Array, y: jax.Array) -> jax.Array:
    numbers = ("CHWN", "IHWO", "HWNC")
    return jax.lax.conv_general_dilated(x, y, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)


def _both(move: Callable[..., Rows], grid: list[Rows]) -> list[Rows]:
    """A transformation of both axes of a grid of arrays: of every column, then of every row of what that gives."""
    return [move(*row) for row in zip(*(move(*column) for column in zip(*grid, strict=True)), strict=True)]


# G of Lavin & Gray on both axes: from 3 x 3 taps to 4 x 4 points, (16, 9).
_TAPS_TO_POINTS = np.kron(*[np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float32) / 2] * 2)


# One axis of B^T (tiles), A^T (outputs) and A.
def _of_tiles(d0: jax.Array, d1: jax.Array, d2: jax.Array, d3: jax.Array) -> Rows:
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


def _to_outputs(m0: jax.Array, m1: jax.Array, m2: jax.Array, m3: jax.Array) -> Rows:
    return m0 + m1 + m2, m1 - m2 - m3


def _from_outputs(y0: jax.Array, y1: jax.Array) -> Rows:
    return y0, y0 + y1, y0 - y1, -y1


def _strided(x: jax.Array, size: int, count: int) -> list[Rows]:
    """Arrays (B, h, w, C) of the pixels at each place of a tile of `size` squared, tiles two apart."""
    h, w = count, (x.shape[2] - size) // 2 + 1
    return [tuple(x[:, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] for j in range(size)) for i in range(size)]


def _blocks(x: jax.Array, channels: int) -> tuple[int, int]:
    """How many blocks of how many rows of tiles: of all images together, since batches are cut over devices."""
    b, height, width, _ = x.shape
    rows = math.ceil(height / 2)
    row = 16 * 4 * b * math.ceil(width / 2) * channels
    count = math.ceil(rows / max(1, _BYTES // row))
    each = math.ceil(rows / count)
    return math.ceil(rows / each), each


def _after(x: jax.Array, constant: Any) -> jax.Array:
    """The constant, such that XLA cannot calculate anything of it before x is there.

    Its scheduler for CPUs would transform the kernels of a whole network first, and pad its activations for the
    backward pass in the forward pass already, and keep them all.
    """
    bits = jax.lax.bitcast_convert_type(x[(0,) * x.ndim], jnp.uint32)
    return jnp.where(bits == 0x7FC0_AB5E, jnp.nan, constant)  # one NaN among millions


def _padded(x: jax.Array, rows: int, border: int, zero: Any = 0.0) -> jax.Array:
    """x (B, H, W, C) with `border` zeros before, and as many after as make `rows` and W / 2 (upwards) tiles."""
    _, height, width, _ = x.shape
    after = (2 * rows - height + border, 2 * math.ceil(width / 2) - width + border)
    zero = jnp.asarray(zero, x.dtype)
    return jax.lax.pad(x, zero, ((0, 0, 0), (border, after[0], 0), (border, after[1], 0), (0, 0, 0)))


def _filtered(x: jax.Array, kernel: jax.Array, product: Callable[..., jax.Array], outputs: int) -> jax.Array:
    """x (B, H, W, C) under kernel (3, 3, ., .), by `product` (N, C), matrix (., .) -> (N, outputs)."""
    b, height, width, inputs = x.shape
    count, rows = _blocks(x, inputs + outputs)
    padded = _padded(x, count * rows, 1)
    at_points = jnp.dot(_after(x, _TAPS_TO_POINTS), kernel.reshape(9, -1)).reshape(4, 4, *kernel.shape[2:])

    def block(first: Any) -> jax.Array:
        tiles = _strided(jax.lax.dynamic_slice_in_dim(padded, first, 2 * rows + 2, 1), 4, rows)
        shape = (*tiles[0][0].shape[:-1], outputs)
        points = zip(_both(_of_tiles, tiles), at_points, strict=True)
        products = [
            tuple(product(v.reshape(-1, inputs), u).reshape(shape) for v, u in zip(*p, strict=True)) for p in points
        ]
        y = jnp.stack([jnp.stack(row, 3) for row in _both(_to_outputs, products)], 2)  # (B, h, 2, w, 2, outputs)
        return y.reshape(b, 2 * rows, -1, outputs)

    def write(index: Any, out: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, block(2 * rows * index), 2 * rows * index, 1)

    if count == 1:
        return block(0)[:, :height, :width]
    out = jnp.zeros((b, 2 * rows * count, padded.shape[2] - 2, outputs), x.dtype)
    return jax.lax.fori_loop(0, count, write, out)[:, :height, :width]


def _forward_tiles(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _filtered(x, kernel, jnp.dot, kernel.shape[3])


def _backward_tiles(y: jax.Array, kernel: jax.Array) -> jax.Array:
    def product(v: jax.Array, u: jax.Array) -> jax.Array:
        return jax.lax.dot_general(v, u, (((1,), (1,)), ((), ())))

    return _filtered(y, kernel[::-1, ::-1], product, kernel.shape[2])


def _correlate_tiles(x: jax.Array, y: jax.Array) -> jax.Array:
    inputs, outputs = x.shape[3], y.shape[3]
    count, rows = _blocks(x, inputs + outputs)
    padded, targets = _padded(x, count * rows, 1, _after(y, 0.0)), _padded(y, count * rows, 0)

    def block(index: Any) -> list[Rows]:
        tiles = _strided(jax.lax.dynamic_slice_in_dim(padded, 2 * rows * index, 2 * rows + 2, 1), 4, rows)
        cells = _strided(jax.lax.dynamic_slice_in_dim(targets, 2 * rows * index, 2 * rows, 1), 2, rows)
        pairs = zip(_both(_of_tiles, tiles), _both(_from_outputs, cells), strict=True)
        return [
            tuple(jnp.dot(v.reshape(-1, inputs).T, m.reshape(-1, outputs)) for v, m in zip(vs, ms, strict=True))
            for vs, ms in pairs
        ]

    total = block(0)
    if count > 1:
        total = jax.lax.fori_loop(1, count, lambda i, sums: jax.tree.map(jnp.add, sums, block(i)), total)
    points = jnp.stack([matrix.ravel() for row in total for matrix in row])
    return jnp.dot(_TAPS_TO_POINTS.T, points).reshape(3, 3, inputs, outputs)


def _over_batches(
    primitive: Primitive, xla: Callable[..., jax.Array], arguments: Any, axes: Any
) -> tuple[jax.Array, int]:
    """vmap: a batch of images joins that of each entry; where kernels differ as well the convolution is XLA's."""
    if primitive is not _correlate and axes[1] is None:
        x = jnp.moveaxis(arguments[0], axes[0], 0)
        y = primitive.bind(x.reshape(-1, *x.shape[2:]), arguments[1])
        return y.reshape(*x.shape[:4], -1), 0
    return jax.vmap(xla, axes)(*arguments), 0


def _primitive(name: str, tiles: Callable[..., jax.Array], xla: Callable[..., jax.Array]) -> Primitive:
    """A map of two arrays with one lowering for CPUs and another elsewhere."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(lambda x, y: jax.typeof(jax.eval_shape(xla, x, y)))
    mlir.register_lowering(primitive, mlir.lower_fun(tiles, multiple_results=False), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(xla, multiple_results=False))
    batching.primitive_batchers[primitive] = functools.partial(_over_batches, primitive, xla)
    return primitive


# Three maps of one trilinear form, the sum over images, pixels p, taps, channels of x[p + tap] kernel[tap] y[p].
_forward = _primitive("forward_3x3", _forward_tiles, _xla)  # x, kernel -> y
_backward = _primitive("backward_3x3", _backward_tiles, _backward_xla)  # y, kernel -> x
_correlate = _primitive("correlate_3x3", _correlate_tiles, _correlate_xla)  # x, y -> kernel
ad.defbilinear(
    _forward,
    lambda ct, x, kernel: _backward.bind(ct, kernel),
    lambda ct, x, kernel: _correlate.bind(x, ct),
)
ad.defbilinear(
    _backward,
    lambda ct, y, kernel: _forward.bind(ct, kernel),
    lambda ct, y, kernel: _correlate.bind(ct, y),
)
ad.defbilinear(
    _correlate,
    lambda ct, x, y: _backward.bind(y, ct),
    lambda ct, x, y: _forward.bind(x, ct),
)
