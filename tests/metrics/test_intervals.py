import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.frechet import frechet_of_features
from gen.metrics.intervals import frechet_error, kernel_error, mean_error, proportion_error
from gen.metrics.kernels import mmd2, rbf


def _spread(draw, value, error, repeats=200):
    """(deviation of a score over fresh samples, mean of its stated error)."""
    sets = [draw() for _ in range(repeats)]
    return np.std([value(x) for x in sets], ddof=1), np.mean([error(x) for x in sets])


def test_shares_and_means():
    rng = np.random.default_rng(0)
    shares = (rng.random((4000, 50)) < 0.3).mean(1)
    assert proportion_error(0.3, 50) == pytest.approx(shares.std(), rel=0.05)
    values = rng.exponential(size=(4000, 50))
    assert mean_error(values[0]) == pytest.approx(values[0].std(ddof=1) / np.sqrt(50))


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_frechet_error_is_the_deviation_over_fresh_samples(shift):
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(5, 5))
    mu, sigma = np.full(5, shift), np.diag([1.0, 2, 0.5, 1, 3])
    reference = np.linalg.cholesky(sigma) @ rng.normal(size=(5, 100_000)) + mu[:, None]

    def draw():
        return rng.normal(size=(600, 5)) @ mix

    spread, stated = _spread(draw, lambda x: frechet_of_features(x, reference.T), lambda x: frechet_error(x, mu, sigma))
    assert stated == pytest.approx(spread, rel=0.2)


def test_frechet_error_of_fewer_samples_than_dimensions_is_finite():
    rng = np.random.default_rng(2)
    assert 0 < frechet_error(rng.normal(size=(20, 50)), np.zeros(50), np.eye(50)) < 10
    with pytest.raises(GenError, match="features"):
        frechet_error(rng.normal(size=(20, 5)), np.zeros(4), np.eye(4))


def test_kernel_error_is_the_deviation_over_fresh_samples():
    rng = np.random.default_rng(3)
    real, kernel = rng.normal(size=(400, 3)), rbf(1.5)
    spread, stated = _spread(
        lambda: rng.normal(size=(150, 3)) + 0.6,
        lambda x: mmd2(real, x, kernel, unbiased=False),
        lambda x: kernel_error(real, x, kernel),
    )
    assert stated == pytest.approx(spread, rel=0.2)
