"""Measures between images and their reconstructions, on 8-bit values."""

import numpy as np

from gen.errors import GenError

__all__ = ["psnr"]


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of every image in dB: 10 log10(255^2 / MSE); the score of a set is their mean.

    Args:
      images, references: (B, H, W, C) uint8.

    Returns:
      (B,) float64; inf for an exact copy.

    Raises:
      GenError: shapes that differ, or images that are not 8-bit.
    """
    if images.shape != references.shape or images.ndim != 4:
        raise GenError(
            f"PSNR of images {images.shape} against {references.shape}; expected two equal (B, H, W, C) sets"
        )
    if images.dtype != np.uint8 or references.dtype != np.uint8:
        raise GenError(
            f"PSNR of {images.dtype} against {references.dtype} images; expected uint8, as stored; quantise first"
        )
    mse = np.square(images.astype(np.float64) - references).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / mse))
