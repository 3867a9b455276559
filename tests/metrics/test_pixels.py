import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.pixels import psnr


def test_psnr():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 4, 6, 5, 3), dtype=np.uint8)
    b[3] = a[3]
    found = psnr(a, b)
    for i in range(3):
        mse = np.mean((a[i].astype(float) / 255 - b[i].astype(float) / 255) ** 2)
        assert found[i] == pytest.approx(-10 * np.log10(mse))
    assert found[3] == np.inf
    dark, bright = np.zeros((1, 2, 2, 1), np.uint8), np.full((1, 2, 2, 1), 255, np.uint8)
    assert psnr(dark, bright) == pytest.approx([0.0])  # no wrap-around of 8-bit differences


def test_refuses():
    a = np.zeros((2, 4, 4, 1), np.uint8)
    with pytest.raises(GenError, match="two equal"):
        psnr(a, a[:1])
    with pytest.raises(GenError, match="quantise first"):
        psnr(a, a.astype(np.float32))
