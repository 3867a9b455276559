import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.diversity import vendi


def test_identical_and_orthogonal_samples():
    same = np.tile([[3.0, 4.0, 0.0]], (7, 1)) * np.arange(1, 8)[:, None]  # the length does not count
    assert vendi(same) == pytest.approx((1.0, 0.0), abs=1e-9)
    assert vendi(np.eye(6)[:5] * 2).score == pytest.approx(5)
    # two groups of p and 1 - p: the exponential of their entropy
    groups = np.repeat(np.eye(3)[:2], [6, 2], axis=0)
    assert vendi(groups).score == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_is_the_entropy_of_the_similarity_matrix():
    x = np.random.default_rng(0).normal(size=(9, 20))  # fewer samples than features
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 9)
    assert vendi(x).score == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_error_is_the_deviation_over_fresh_samples():
    rng = np.random.default_rng(1)
    scale = np.array([2.0, 1.0, 0.5, 0.5])
    found = [vendi(rng.normal(size=(500, 4)) * scale + 0.5) for _ in range(200)]
    assert np.mean([f.error for f in found]) == pytest.approx(np.std([f.score for f in found]), rel=0.2)


def test_refuses():
    for features, message in ((np.ones((1, 3)), "more samples"), (np.diag([1.0, 0, 1]), "sample 1 has only zero")):
        with pytest.raises(GenError, match=message):
            vendi(features)
