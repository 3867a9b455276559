"""`gen.metrics.image` against scikit-image and torchmetrics."""

import jax.numpy as jnp
import pytest

from gen.metrics.image import ORIGINAL, SKIMAGE, TORCHMETRICS, luma, ms_ssim, mse, psnr, ssim
from tests.parity.conftest import fixtures

FIXTURES = fixtures("psnr-ssim*")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_psnr(fx):
    a, b = (jnp.asarray(fx.io[name]) for name in ("img_a", "img_b"))
    fx.close(mse(a, b), "mse_u8")
    fx.close(psnr(a, b), "psnr_u8")
    fx.close(psnr(a / 255, b / 255, 1.0), "psnr_torchmetrics_per_image")
    fx.close(10 * jnp.log10(255**2 / mse(a, b).mean()), "psnr_torchmetrics_batch")
    fx.close(psnr(luma(a), luma(b)), "psnr_bt601_y")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_ssim(fx):
    a, b = (jnp.asarray(fx.io[name]) for name in ("img_a", "img_b"))
    fx.close(ssim(a, b, window=SKIMAGE), "ssim_skimage_uniform7_u8")
    fx.close(ssim(a, b, window=ORIGINAL), "ssim_skimage_gauss11_u8")
    found = ssim(a / 255, b / 255, 1.0, TORCHMETRICS)
    fx.close(found, "ssim_torchmetrics")
    fx.close(found.mean(), "ssim_torchmetrics_batch")
    if "ms_ssim_torchmetrics" in fx.io:
        fx.close(ms_ssim(a / 255, b / 255, 1.0), "ms_ssim_torchmetrics")
