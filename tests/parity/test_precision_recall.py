"""`gen.metrics.neighbours` against prdc, torch-fidelity, the ADM evaluator and dgm-eval."""

import re

import numpy as np
import pytest

from gen.metrics.neighbours import authenticity, manifold, neighbours, radii_sq
from tests.parity.conftest import fixtures
from tests.parity.tolerances import tolerance


def _ks(fx):
    ks = sorted({int(m[1]) for name in fx.io if (m := re.match(r"prdc_k(\d+)_", name))})
    assert ks
    return ks


@pytest.mark.parametrize("fx", fixtures("precision-recall*"), ids=str)
def test_counts(fx):
    real, fake = np.asarray(fx.io["feats_real"]), np.asarray(fx.io["feats_fake"])
    over = {"precision": len(fake), "recall": len(real), "density": len(fake), "coverage": len(real)}
    for k in _ks(fx):
        balls = {"prdc": manifold(real, fake, k, strict=True)}
        balls["torch_fidelity"] = balls["adm"] = manifold(real, fake, k)
        for code, actual in balls.items():
            for name in over if code == "prdc" else ("precision", "recall"):
                unit = over[name] * (
                    k if name == "density" else 1
                )  # the ratios are counts over N, some kept in float32
                count, expected = getattr(actual, name) * unit, float(fx.io[f"{code}_k{k}_{name}"]) * unit
                assert round(count) == round(expected), (code, k, name)
                assert expected == pytest.approx(round(expected), rel=1e-6)


@pytest.mark.parametrize("fx", fixtures("precision-recall*"), ids=str)
def test_radii_nearest_and_realism(fx):
    real, fake = np.asarray(fx.io["feats_real"]), np.asarray(fx.io["feats_fake"])
    copies = (fake[:, None] == real[None]).all(-1).any(1)  # realism divides by their rounded zero distance
    for k in _ks(fx):
        for name, points in (("real", real), ("fake", fake)):
            expected = f"adm_k{k}_radii_sq_{name}"
            rtol, atol = tolerance(fx.name, expected)
            np.testing.assert_allclose(radii_sq(points, k), fx.io[expected], rtol=rtol, atol=atol)
        found = neighbours(fake, real, radii_sq(real, k))
        np.testing.assert_array_equal(found.closest, fx.io[f"adm_k{k}_nearest_real_of_fake"])
        expected = f"adm_k{k}_max_realism_sq_fake"
        rtol, atol = tolerance(fx.name, expected)
        actual = np.asarray(found.realism_sq)[~copies]
        np.testing.assert_allclose(actual, fx.io[expected][~copies], rtol=rtol, atol=atol)
        assert (np.asarray(found.realism_sq)[copies] > 1e5).all()


@pytest.mark.parametrize("fx", fixtures("precision-recall*"), ids=str)
def test_authenticity(fx):
    real, fake = np.asarray(fx.io["feats_real"]), np.asarray(fx.io["feats_fake"])
    count, expected = authenticity(real, fake) * len(fake), float(fx.io["authpct"]) / 100 * len(fake)
    assert round(count) == round(expected)
    assert expected == pytest.approx(round(expected), rel=1e-6)  # kept in float32
