from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gen.errors import GenError
from gen.metrics import frechet
from gen.metrics.frechet import frechet_distance


def _gaussian(seed, dim, samples):
    x = np.random.default_rng(seed).normal(size=(samples, dim)) * np.linspace(0.1, 3, dim)
    return x.mean(0), np.cov(x.T)


def test_closed_form_for_commuting_covariances():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    a, b = 10.0 ** rng.uniform(-8, 2, 30), 10.0 ** rng.uniform(-8, 2, 30)
    mu1, mu2 = rng.normal(size=(2, 30))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    actual = frechet_distance(mu1, (basis * a) @ basis.T, mu2, (basis * b) @ basis.T)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_closed_form_when_rank_deficient(rank):
    """The usual matrix square root is complex or off here."""
    rng = np.random.default_rng(rank)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0][:, :rank]
    a, b = rng.uniform(0.5, 2, (2, rank))
    actual = frechet_distance(np.zeros(40), (basis * a) @ basis.T, np.zeros(40), (basis * b) @ basis.T)
    assert actual == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-7, abs=1e-12)


def test_eigenvalues_are_left_where_their_rounding_matters(monkeypatch):
    """Singular values take over: at rank deficiency, and for an ill-conditioned covariance that Cholesky accepts."""
    rng = np.random.default_rng(0)
    used = []
    monkeypatch.setattr(frechet.np.linalg, "eigvalsh", lambda a, eig=np.linalg.eigvalsh: used.append("eig") or eig(a))
    svd = np.linalg.svd
    monkeypatch.setattr(frechet.np.linalg, "svd", lambda a, **more: used.append("svd") or svd(a, **more))
    basis = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    scales = {"well": np.linspace(1, 9, 20), "ill": np.logspace(-12, 2, 20), "deficient": np.eye(20)[0] * 3}
    for name, route in (("well", "eig"), ("ill", "svd"), ("deficient", "svd")):
        used.clear()
        a, b = scales[name], scales["well"]
        actual = frechet_distance(np.zeros(20), (basis * a) @ basis.T, np.ones(20), (basis * b) @ basis.T)
        assert actual == pytest.approx(20 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10), name
        assert used[-1] == route, name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 30), st.integers(2, 30))
def test_properties(seed, dim, n, m):
    a, b = (np.atleast_1d(x) for x in _gaussian(seed, dim, n)), _gaussian(seed + 1, dim, m)
    mu, sigma = a
    sigma = sigma.reshape(dim, dim)
    other = (b[0], np.reshape(b[1], (dim, dim)))
    distance = frechet_distance(mu, sigma, *other)
    assert distance >= 0
    scale = 1 + np.trace(sigma) + np.trace(other[1])
    assert frechet_distance(*other, mu, sigma) == pytest.approx(distance, abs=1e-6 * scale)
    turn = np.linalg.qr(np.random.default_rng(seed + 2).normal(size=(dim, dim)))[0]
    turned = [turn @ mu, turn @ sigma @ turn.T, turn @ other[0], turn @ other[1] @ turn.T]
    assert frechet_distance(*turned) == pytest.approx(distance, abs=1e-6 * scale)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-10 * scale)


_HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # orthogonal, and exact


def _blocks(rng, ranks, decades):
    """2x2 covariances of integers, one of each rank, over up to `decades` powers of 4."""
    factors = [rng.integers(-3, 4, (2, max(rank, 1))) * (rank > 0) for rank in ranks]
    return [(g @ g.T) * 4 ** int(rng.integers(decades + 1)) for g in factors]


def _mixed(blocks, turns):
    """A covariance with these blocks, turned by exact rotations: every entry is what float64 holds."""
    sigma = np.zeros((2 * len(blocks),) * 2)
    for i, block in enumerate(blocks):
        sigma[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    for order in turns:
        turn = np.kron(np.eye(len(sigma) // 4), _HADAMARD)[order]
        sigma = turn @ sigma @ turn.T
    return sigma


@settings(max_examples=60, deadline=None)
@example(9448, 8, 8, False, False)  # elimination leaves more rounding than LAPACK's own limit of the rank takes for 0
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.sampled_from([0, 4, 8]), st.booleans(), st.booleans())
def test_against_sixty_digits(seed, count, decades, whole1, whole2):
    """Of 2x2 blocks tr (A B)^(1/2) = (tr A B + 2 (det A det B)^(1/2))^(1/2): covariances that need not commute, of full
    rank or less, with the truth in decimal arithmetic."""
    rng = np.random.default_rng(seed)
    ranks = [np.full(count, 2) if whole else rng.integers(0, 3, count) for whole in (whole1, whole2)]
    first, second = (_blocks(rng, r, decades) for r in ranks)
    with localcontext(prec=60):
        traces = Decimal(sum(int(np.trace(block)) for block in (*first, *second)))
        roots = Decimal(0)
        for a, b in zip(first, second, strict=True):
            determinants = [int(m[0, 0]) * int(m[1, 1]) - int(m[0, 1]) ** 2 for m in (a, b)]
            roots += (int(np.trace(a @ b)) + 2 * Decimal(determinants[0] * determinants[1]).sqrt()).sqrt()
        expected = float(traces - 2 * roots)
    turns = [rng.permutation(2 * count) for _ in range(2)]
    mean = np.zeros(2 * count)
    actual = frechet_distance(mean, _mixed(first, turns), mean, _mixed(second, turns))
    assert abs(actual - expected) <= 1e-10 * float(traces)


def test_refuses():
    mu, sigma = _gaussian(0, 4, 10)
    nan = sigma.copy()
    nan[0, 1] = np.nan
    for bad, message in (
        ((mu, nan), "NaN or infinite"),
        ((mu, sigma[:3]), "expected \\(D,\\) and \\(D, D\\)"),
        ((mu, sigma + np.triu(np.ones((4, 4)))), "not symmetric"),
        ((mu, -sigma), "non-negative diagonal"),
        (_gaussian(0, 5, 10), "same feature network"),
    ):
        with pytest.raises(GenError, match=message):
            frechet_distance(*bad, mu, sigma)
