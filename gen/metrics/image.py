"""Scores of one image against another: PSNR, SSIM in its three dialects, MS-SSIM. All per image.

Images are (B, H, W, C) in [0, `peak`]; published numbers differ by the window, the border and the range, so that each
dialect has its name.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError

__all__ = ["ORIGINAL", "SKIMAGE", "TORCHMETRICS", "Window", "luma", "ms_ssim", "mse", "psnr", "ssim"]

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2


@dataclasses.dataclass(frozen=True)
class Window:
    """How local statistics are taken.

    Attributes:
      size: side in pixels; odd.
      sigma: of the Gaussian; None for equal weights.
      sample: whether covariances are divided by n - 1 instead of n.
      border: "crop" keeps the pixels whose window lies inside; "mirror" keeps all, reflecting at the edge pixel.

    Raises GenError for an even window, or one below 3.
    """

    size: int = 11
    sigma: float | None = 1.5
    sample: bool = False
    border: Literal["crop", "mirror"] = "crop"

    def __post_init__(self) -> None:
        if self.size < 3 or self.size % 2 == 0:
            raise GenError(f"the window of SSIM is {self.size} pixels wide; expected an odd number from 3")

    def weights(self) -> np.ndarray:
        """Gives (size,) float32, summing to 1; the window is their outer product."""
        at = np.arange(self.size) - self.size // 2
        values = np.ones(self.size) if self.sigma is None else np.exp(-(at**2) / (2 * self.sigma**2))
        return (values / values.sum()).astype(np.float32)


ORIGINAL = Window()  # Wang et al. 2004, and scikit-image with gaussian_weights, population covariance
SKIMAGE = Window(7, None, sample=True)  # scikit-image as it comes
TORCHMETRICS = Window(border="mirror")


def _pair(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    if a.shape != b.shape or a.ndim != 4:
        raise GenError(f"images of shapes {a.shape} and {b.shape} cannot be compared; expected (B, H, W, C) twice")
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """Gives the mean squared difference of each image, (B,) float32. Raises GenError for shapes that differ."""
    a, b = _pair(a, b)
    return jnp.square(a - b).mean((1, 2, 3))


def psnr(a: jax.Array, b: jax.Array, peak: float = 255.0) -> jax.Array:
    """Gives the peak signal-to-noise ratio of each image in dB, (B,) float32; infinite for equal images.

    A ratio of a whole batch (torchmetrics' default) comes from the mean of `mse` and is not the mean of these.
    """
    return 10 * jnp.log10(peak**2 / mse(a, b))


def luma(images: jax.Array) -> jax.Array:
    """Maps (B, H, W, 3) RGB in [0, 255] -> (B, H, W, 1) luma of ITU-R BT.601 in [16, 235]."""
    weights = jnp.asarray([65.481, 128.553, 24.966], jnp.float32) / 255
    return 16 + (jnp.asarray(images, jnp.float32) * weights).sum(-1, keepdims=True)


def _blur(x: jax.Array, window: Window) -> jax.Array:
    """The window's weighted mean around every pixel that has a whole window."""
    weights = window.weights()
    for axis in (1, 2):
        length = x.shape[axis] - window.size + 1
        x = sum(
            (w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(weights)),
            jnp.zeros((), jnp.float32),
        )
    return x


def _maps(a: jax.Array, b: jax.Array, peak: float, window: Window) -> tuple[jax.Array, jax.Array]:
    """SSIM and its contrast-structure factor at every pixel."""
    if min(a.shape[1:3]) < window.size:
        raise GenError(f"images of {a.shape[1]}x{a.shape[2]} are smaller than the {window.size} pixel window of SSIM")
    middle = peak / 2  # around which the differences of squares lose fewer digits
    a, b = a - middle, b - middle
    if window.border == "mirror":
        r = window.size // 2
        a, b = (jnp.pad(x, ((0, 0), (r, r), (r, r), (0, 0)), mode="reflect") for x in (a, b))
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    scale = window.size**2 / (window.size**2 - 1) if window.sample else 1.0
    variances = scale * (_blur(a * a + b * b, window) - mean_a**2 - mean_b**2)
    covariance = scale * (_blur(a * b, window) - mean_a * mean_b)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b = mean_a + middle, mean_b + middle
    contrast = (2 * covariance + c2) / (variances + c2)
    return contrast * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1), contrast


def ssim(a: jax.Array, b: jax.Array, peak: float = 255.0, window: Window = ORIGINAL) -> jax.Array:
    """Gives the structural similarity of each image, averaged over pixels and channels, (B,) float32 (Wang et al.
    2004).

    Raises GenError for shapes that differ and for images smaller than the window.
    """
    return _maps(*_pair(a, b), peak, window)[0].mean((1, 2, 3))


def ms_ssim(a: jax.Array, b: jax.Array, peak: float = 255.0, window: Window = TORCHMETRICS) -> jax.Array:
    """Gives the multi-scale structural similarity of each image over five scales, (B,) float32 (Wang et al. 2003).

    As torchmetrics: the contrast of the four finer scales is averaged where the window lies inside, the similarity of
    the coarsest with the window's border. Negative contrast counts as 0. Raises GenError for images with a side below
    16 windows: the coarsest scale would lack one.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < 16 * window.size:
        raise GenError(f"MS-SSIM takes images of {16 * window.size} pixels or more, got {a.shape[1]}x{a.shape[2]}")
    inside = dataclasses.replace(window, border="crop")
    score = jnp.ones(len(a))
    for power in _SCALES[:-1]:
        score *= jax.nn.relu(_maps(a, b, peak, inside)[1].mean((1, 2, 3))) ** power
        a, b = _halved(a), _halved(b)
    return score * jax.nn.relu(ssim(a, b, peak, window)) ** _SCALES[-1]


def _halved(x: jax.Array) -> jax.Array:
    height, width = (n // 2 for n in x.shape[1:3])
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(len(x), height, 2, width, 2, x.shape[-1]).mean((2, 4))
