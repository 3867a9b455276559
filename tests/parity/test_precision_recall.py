"""`gen.metrics.neighbours` against prdc, torch-fidelity, the ADM evaluator and dgm-eval."""

import re

import numpy as np
import pytest

from gen.metrics.neighbours import authenticity, manifold, neighbours, radii_sq
from tests.parity.conftest import fixtures


def _ks(fx):
    ks = sorted({int(m[1]) for name in fx.io if (m := re.match(r"prdc_k(\d+)_", name))})
    assert ks
    return ks


@pytest.mark.parametrize("fx", fixtures("precision-recall"), ids=str)
def test_ratios(fx):
    real, fake = np.asarray(fx.io["feats_real"]), np.asarray(fx.io["feats_fake"])
    for k in _ks(fx):
        open_balls, closed_balls = manifold(real, fake, k, strict=True), manifold(real, fake, k)
        for name in ("precision", "recall", "density", "coverage"):
            assert getattr(open_balls, name) == pytest.approx(float(fx.io[f"prdc_k{k}_{name}"]), abs=1e-12), (k, name)
        for name in ("precision", "recall"):
            for code in ("torch_fidelity", "adm"):
                expected = float(fx.io[f"{code}_k{k}_{name}"])
                assert getattr(closed_balls, name) == pytest.approx(expected, abs=1e-12), (k, code, name)


@pytest.mark.parametrize("fx", fixtures("precision-recall"), ids=str)
def test_radii_nearest_and_realism(fx):
    real, fake = np.asarray(fx.io["feats_real"]), np.asarray(fx.io["feats_fake"])
    copies = (fake[:, None] == real[None]).all(-1).any(1)  # realism divides by their rounded zero distance
    for k in _ks(fx):
        for name, points in (("real", real), ("fake", fake)):
            expected = np.asarray(fx.io[f"adm_k{k}_radii_sq_{name}"])
            np.testing.assert_allclose(radii_sq(points, k), expected, rtol=1e-4, atol=1e-4)
        found = neighbours(fake, real, radii_sq(real, k))
        np.testing.assert_array_equal(found.index, fx.io[f"adm_k{k}_nearest_real_of_fake"])
        expected = np.asarray(fx.io[f"adm_k{k}_max_realism_sq_fake"])
        np.testing.assert_allclose(np.asarray(found.realism_sq)[~copies], expected[~copies], rtol=1e-4)
        assert (np.asarray(found.realism_sq)[copies] > 1e5).all()


@pytest.mark.parametrize("fx", fixtures("precision-recall"), ids=str)
def test_authenticity(fx):
    actual = authenticity(np.asarray(fx.io["feats_real"]), np.asarray(fx.io["feats_fake"]))
    assert 100 * actual == pytest.approx(float(fx.io["authpct"]), abs=1e-9)
