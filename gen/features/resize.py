"""Resizing as Pillow, torch and TensorFlow 1 do it: two products with small matrices, on any device.

The weights of an axis are worked out on the host in float64, so one jitted function serves every filter and agrees
with the libraries to about 1e-4 of a grey level. Scores depend on which of these is used (Parmar et al. 2022).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gen.errors import GenError

__all__ = [
    "METHODS",
    "axis_weights",
    "cubic",
    "middle_square",
    "middle_square_host",
    "resize",
    "resize_host",
    "resize_uint8",
]

_FIXED_BITS = 22  # of Pillow's weights for 8-bit images


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Gives the cubic convolution kernel (Keys 1981, equation 4 with free parameter a)."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, a * (((x - 5) * x + 8) * x - 4)
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    return kernel


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)


def _box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _stretched(kernel: Callable[[np.ndarray], np.ndarray], support: float, size: int, out: int) -> np.ndarray:
    """Pillow: the kernel widens when shrinking (antialiasing), and is cut off and renormalised at the border."""
    scale = size / out
    width = max(scale, 1.0)
    centre = (np.arange(out)[:, None] + 0.5) * scale
    first = np.maximum((centre - support * width + 0.5).astype(int), 0)
    last = np.minimum((centre + support * width + 0.5).astype(int), size)
    index = np.arange(size)[None]
    weights = np.where((index >= first) & (index < last), kernel((index - centre + 0.5) / width), 0)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _taps(
    kernel: Callable[[np.ndarray], np.ndarray], support: int, half_pixel: bool, size: int, out: int
) -> np.ndarray:
    """torch and TensorFlow: a fixed number of neighbours, those outside replaced by the border pixel."""
    shift = 0.5 if half_pixel else 0.0
    source = (np.arange(out) + shift) * (size / out) - shift
    weights = np.zeros((out, size))
    for offset in range(1 - support, support + 1):
        neighbour = np.floor(source).astype(int) + offset
        np.add.at(weights, (np.arange(out), np.clip(neighbour, 0, size - 1)), kernel(source - neighbour))
    return weights


def _corners(size: int, out: int) -> np.ndarray:
    """torch's bilinear with align_corners: the first and the last pixel stay where they are."""
    source = np.linspace(0.0, size - 1.0, out)
    return np.maximum(1.0 - np.abs(source[:, None] - np.arange(size)[None]), 0.0)


def _cells(size: int, out: int) -> np.ndarray:
    """torch's adaptive average: means of the pixels that a cell touches; cells overlap where `out` does not divide."""
    index, cell = np.arange(size)[None], np.arange(out)[:, None]
    inside = (index >= cell * size // out) & (index < -(-(cell + 1) * size // out))
    return np.asarray(inside / inside.sum(1, keepdims=True))


def _nearest(size: int, out: int) -> np.ndarray:
    # Pillow adds the step up pixel by pixel, which decides where a centre falls between two pixels
    step = size / out
    centres = np.cumsum(np.append(step * 0.5, np.full(out - 1, step)))
    return np.eye(size)[np.minimum(centres.astype(int), size - 1)]


# method -> (input size, output size) -> weights (out, in)
METHODS: dict[str, Callable[[int, int], np.ndarray]] = {
    "pil-bicubic": functools.partial(_stretched, cubic(-0.5), 2.0),
    "pil-bilinear": functools.partial(_stretched, _triangle, 1.0),
    "pil-lanczos": functools.partial(_stretched, _lanczos, 3.0),
    "pil-box": functools.partial(_stretched, _box, 0.5),
    "pil-nearest": _nearest,
    "torch-bilinear": functools.partial(_taps, _triangle, 1, True),
    "torch-bilinear-corners": _corners,
    "torch-bicubic": functools.partial(_taps, cubic(-0.75), 2, True),
    "torch-area": _cells,
    "tf1-bilinear": functools.partial(_taps, _triangle, 1, False),
}


@functools.lru_cache(maxsize=64)
def axis_weights(size: int, out: int, method: str) -> np.ndarray:
    """Gives the matrix (out, size) float32 that resizes one axis; rows sum to 1.

    Raises GenError for an unknown method or a size below 1.
    """
    if method not in METHODS:
        raise GenError(f"unknown resize method '{method}'; expected one of {', '.join(METHODS)}")
    if size < 1 or out < 1:
        raise GenError(f"cannot resize {size} pixels to {out}; expected at least 1 of each")
    return METHODS[method](size, out).astype(np.float32)


def _along(x: jax.Array, out: int, axis: int, method: str) -> jax.Array:
    if x.shape[axis] == out:
        return x  # every method is the identity here
    weights = axis_weights(x.shape[axis], out, method)
    product = jnp.tensordot(weights, x, (1, axis), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, 0, axis)


def resize(images: jax.Array, size: tuple[int, int], method: str) -> jax.Array:
    """Maps images (B, H, W, C) float32 -> (B, *size, C) float32, neither rounded nor clipped (cubic filters overshoot).

    Args:
      size: (height, width).
      method: a name in `METHODS`: the library whose result is reproduced, and its filter.
    """
    x = jnp.asarray(images, jnp.float32)
    return _along(_along(x, size[0], 1, method), size[1], 2, method)


def resize_host(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes one image (H, W, C) -> (*size, C) float32 by NumPy: for sets in which every image has its own size.

    Compiling a program for each size would take longer than resizing.
    """
    height, width, channels = image.shape
    x = axis_weights(height, size[0], method) @ image.astype(np.float32).reshape(height, width * channels)
    columns = axis_weights(width, size[1], method) @ x.reshape(size[0], width, channels)
    return np.asarray(columns)


def resize_uint8(images: jax.Array, size: tuple[int, int], method: str) -> jax.Array:
    """Maps images (B, H, W, C) uint8 -> (B, *size, C) uint8.

    Pillow works in fixed point, rounds after each of its two passes, and runs the vertical one first where the height
    loses more than twice the rows that the width loses columns (version 13): all of this is reproduced, bit for bit.
    torch's results are computed in float32 and truncated.
    """
    if not method.startswith("pil-"):
        return jnp.clip(resize(images, size, method), 0, 255).astype(jnp.uint8)
    x = jnp.asarray(images, jnp.int32)
    rows, columns = (images.shape[axis] - size[axis - 1] for axis in (1, 2))
    for axis in (1, 2) if rows > max(0, 2 * columns) else (2, 1):
        product = jnp.tensordot(_fixed_point(x.shape[axis], size[axis - 1], method), x, (1, axis))
        rounded = (product + (1 << (_FIXED_BITS - 1))) >> _FIXED_BITS
        x = jnp.moveaxis(jnp.clip(rounded, 0, 255), 0, axis)
    return x.astype(jnp.uint8)


def middle_square(images: jax.Array, shorter: int, side: int, method: str) -> jax.Array:
    """Gives the shorter side brought to `shorter` pixels by `resize_uint8`, and the middle square of `side` cut out.

    images (B, H, W, C) on the 0..255 grid -> (B, side, side, C) float32. The preprocessing of torchvision and CLIP.
    """
    size, (top, left) = _square(images.shape[1], images.shape[2], shorter, side)
    return resize_uint8(images, size, method).astype(jnp.float32)[:, top : top + side, left : left + side]


def middle_square_host(image: np.ndarray, shorter: int, side: int, method: str) -> np.ndarray:
    """Gives what `middle_square` takes as it is, of one image (H, W, C) uint8 -> (shorter, shorter, C) float32.

    Pillow itself resizes it; the square has the middle that will be cut out of it.
    """
    size, corner = _square(image.shape[0], image.shape[1], shorter, side)
    filter_ = Image.Resampling[method.removeprefix("pil-").upper()]
    resized = np.asarray(Image.fromarray(image).resize(size[::-1], filter_), np.float32)
    top, left = (first - _square(shorter, shorter, shorter, side)[1][0] for first in corner)
    return resized[top : top + shorter, left : left + shorter]


def _square(height: int, width: int, shorter: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) with the shorter side brought to `shorter`, and where the middle square of `side` begins."""
    size = (shorter * height // min(height, width), shorter * width // min(height, width))
    return size, (round((size[0] - side) / 2), round((size[1] - side) / 2))


@functools.cache
def _fixed_point(size: int, out: int, method: str) -> np.ndarray:
    """The weights of an axis as Pillow's integers; sums of pixels times weights stay below 2^31."""
    axis_weights(size, out, method)  # for its checks
    weights = METHODS[method](size, out) * (1 << _FIXED_BITS)
    return (np.sign(weights) * np.floor(np.abs(weights) + 0.5)).astype(np.int32)
