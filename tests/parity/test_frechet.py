"""`gen.metrics.frechet` against 60-digit values of the Frechet distance."""

import numpy as np
import pytest

from gen.metrics.frechet import frechet_distance
from gen.metrics.statistics import Moments
from tests.parity.conftest import fixtures

RTOL, ATOL = 1e-7, 1e-6  # against the 60-digit value


@pytest.mark.parametrize("fx", fixtures("frechet-distance"), ids=str)
def test_cases(fx):
    assert fx.config["cases"]
    for name, case in fx.config["cases"].items():
        arrays = [np.asarray(fx.io[f"{name}_{part}"]) for part in ("mu1", "sigma1", "mu2", "sigma2")]
        actual = frechet_distance(*arrays)
        exact = float(fx.io[f"{name}_exact"])
        assert actual == pytest.approx(exact, rel=RTOL, abs=ATOL), name
        assert actual == pytest.approx(float(fx.io[f"{name}_cleanfid"]), rel=1e-4, abs=1e-3), name
        assert exact == pytest.approx(case["exact"], rel=1e-12, abs=1e-12)
        assert frechet_distance(*arrays[2:], *arrays[:2]) == pytest.approx(actual, rel=RTOL, abs=ATOL), name
        if "analytic" in case:
            assert actual == pytest.approx(case["analytic"], rel=RTOL, abs=ATOL), name


@pytest.mark.parametrize("fx", fixtures("frechet-distance"), ids=str)
def test_features(fx):
    moments = []
    for side in "ab":
        features = np.asarray(fx.io[f"feats_{side}"])
        result = Moments().finalise(Moments.of(features.astype(np.float64)))
        np.testing.assert_allclose(result["mean"], fx.io[f"feats_mu_{side}_f64"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(result["covariance"], fx.io[f"feats_sigma_{side}"], rtol=1e-6, atol=1e-8)
        moments += [result["mean"], result["covariance"]]
    actual = frechet_distance(*moments)
    assert actual == pytest.approx(float(fx.io["feats_exact_f64"]), rel=RTOL, abs=ATOL)
    assert actual == pytest.approx(float(fx.io["feats_cleanfid"]), rel=1e-4, abs=1e-3)
