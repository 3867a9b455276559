"""`gen.metrics.frechet` against 60-digit values of the Frechet distance."""

import numpy as np
import pytest

from gen.metrics.frechet import frechet_distance
from gen.metrics.statistics import Moments
from tests.parity.conftest import fixtures


@pytest.mark.parametrize("fx", fixtures("frechet-distance*"), ids=str)
def test_cases(fx):
    assert fx.config["cases"]
    for name, case in fx.config["cases"].items():
        arrays = [np.asarray(fx.io[f"{name}_{part}"]) for part in ("mu1", "sigma1", "mu2", "sigma2")]
        actual = frechet_distance(*arrays)
        fx.close(actual, f"{name}_exact")
        fx.close(frechet_distance(*arrays[2:], *arrays[:2]), f"{name}_exact")
        fx.close(actual, f"{name}_cleanfid")
        assert 0 <= actual == pytest.approx(case["exact"], rel=1e-7, abs=1e-6)
        if "analytic" in case:
            fx.close(actual, f"{name}_analytic")


@pytest.mark.parametrize("fx", fixtures("frechet-distance*"), ids=str)
def test_features(fx):
    moments = []
    for side in "ab":
        features = np.asarray(fx.io[f"feats_{side}"])
        result = Moments().finalise(Moments.of(features.astype(np.float64)))
        fx.close(result["mean"], f"feats_mu_{side}_f64", rtol=1e-12, atol=0)
        fx.close(result["mean"], f"feats_mu_{side}_f32", rtol=1e-6, atol=0)
        fx.close(result["covariance"], f"feats_sigma_{side}", rtol=1e-6, atol=0)  # its mean was taken in float32
        moments += [result["mean"], result["covariance"]]
    actual = frechet_distance(*moments)
    fx.close(actual, "feats_exact_f64")
    fx.close(actual, "feats_cleanfid")
