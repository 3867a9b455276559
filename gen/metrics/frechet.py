"""The Frechet distance between Gaussian statistics, in float64 on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from scipy.linalg import lapack

from gen.errors import GenError

__all__ = ["frechet_by_size", "frechet_distance", "frechet_infinity", "frechet_of_features"]

Array = np.ndarray
_PRECISION = 1e-11  # rounding that the square roots of eigenvalues may add, relative to the covariances' traces


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Gives |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) (Heusel et al. 2017, equation 6; Dowson & Landau 1982).

    With factors S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B, which are the
    square roots of the eigenvalues of A^T S2 A. These take half the time, and are used where A is square and the
    root of no rounded one could matter (`_PRECISION`). So the result is real, needs no regularisation, and stays
    accurate to about 1e-7 when the covariances are singular (fewer samples than dimensions), where the usual matrix
    square root becomes complex.

    Args:
      mu1, mu2: (D,) means.
      sigma1, sigma2: (D, D) symmetric positive semidefinite covariances (N - 1 in the denominator by convention).

    Returns:
      The squared distance, at least 0.

    Raises:
      GenError: shapes that do not agree, non-finite entries, or a matrix that is not a covariance.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    for name, mu, sigma in (("first", mu1, sigma1), ("second", mu2, sigma2)):
        _check(name, mu, sigma)
    if mu1.shape != mu2.shape:
        raise GenError(
            f"Frechet distance between {mu1.size} and {mu2.size} features; expected the same feature network on both "
            "sides; recompute one of them"
        )
    traces = np.trace(sigma1) + np.trace(sigma2)
    distance = np.sum((mu1 - mu2) ** 2) + traces - 2 * _root_trace(sigma1, sigma2, _PRECISION * traces)
    return max(float(distance), 0.0)  # rounding alone can make it negative, by about 1e-16 of the traces


def frechet_of_features(x: Array, y: Array) -> float:
    """Gives the distance of two sets of features (N, D) and (M, D); cheap and exact for fewer samples than dimensions.

    Raises GenError for another width, fewer than two rows, or non-finite entries.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise GenError(f"covariances of {len(x)} and {len(y)} samples; expected at least 2 of each; evaluate more")
    if min(len(x), len(y)) > x.shape[1]:
        return frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    if x.shape[1] != y.shape[1] or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise GenError(f"features of shapes {x.shape} and {y.shape}; expected finite ones of one feature network")
    # the centred rows are themselves factors of the covariances
    a, b = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * cross), 0.0)


def frechet_by_size(features: Array, mu: Array, sigma: Array, sizes: Sequence[int], *, seed: int = 0) -> list[float]:
    """Gives distances of random subsets of the features (N, D), one of each size, from a reference (mu, sigma)."""
    rng = np.random.default_rng(seed)
    subsets = (np.asarray(features[rng.choice(len(features), size, replace=False)], np.float64) for size in sizes)
    return [frechet_distance(rows.mean(0), np.cov(rows.T), mu, sigma) for rows in subsets]


def frechet_infinity(
    features: Array, mu: Array, sigma: Array, *, points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """Gives the distance extrapolated to infinitely many samples (Chong & Forsyth 2020, section 4).

    Distances of random subsets of `points` sizes between min(5000, N / 10) and N are fitted by a line in 1 / size.

    Args:
      features: (N, D) of the samples.
      mu, sigma: statistics of the reference.

    Returns:
      The line's value at 0, and its standard error.

    Raises:
      GenError: too few samples for so many sizes.
    """
    count = len(features)
    sizes = np.linspace(min(5000, max(count // 10, 2)), count, points).astype(int)
    if len(set(sizes)) < max(points, 3):
        raise GenError(f"{count} samples for {points} subset sizes; expected many more; evaluate more samples")
    distances = frechet_by_size(features, mu, sigma, sizes.tolist(), seed=seed)
    design = np.stack([np.ones(points), 1 / sizes], 1)
    solution, *_ = np.linalg.lstsq(design, np.asarray(distances), rcond=None)
    residual = np.sum((design @ solution - distances) ** 2) / (points - 2)
    return float(solution[0]), float(np.sqrt(residual * np.linalg.inv(design.T @ design)[0, 0]))


def _check(name: str, mu: Array, sigma: Array) -> None:
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise GenError(
            f"the {name} statistics have a mean of shape {mu.shape} and a covariance of shape {sigma.shape}; "
            "expected (D,) and (D, D); check the file's mu and sigma"
        )
    scale = np.abs(sigma).max(initial=0.0)  # NaN when one of them is
    if not (np.isfinite(mu).all() and np.isfinite(scale)):
        raise GenError(
            f"the {name} statistics hold NaN or infinite values; expected finite ones; look for bad images among the "
            "samples, or for fewer than two of them"
        )
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-6 * scale or np.diag(sigma).min(initial=0.0) < -1e-6 * scale:
        raise GenError(
            f"the {name} covariance is not symmetric with a non-negative diagonal; expected a covariance matrix; "
            "check the file's sigma"
        )


def _root_trace(sigma1: Float64[Array, "d d"], sigma2: Float64[Array, "d d"], tolerance: float) -> float:
    """tr (S1 S2)^(1/2) by way of eigenvalues, or of singular values where the former might be off by `tolerance`."""
    lower, failed = lapack.dpotrf(sigma1, lower=1)
    if not failed:
        reduced, _ = lapack.dsygst(sigma2, lower, itype=2, lower=1)  # lower^T S2 lower
        roots = np.sqrt(np.maximum(np.linalg.eigvalsh(reduced), 0))
        error = np.finfo(np.float64).eps * np.linalg.norm(sigma1) * np.linalg.norm(sigma2)  # of an eigenvalue
        if np.sum(error / np.maximum(roots, np.sqrt(error) or 1)) <= tolerance:
            return float(roots.sum())
    return float(np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum())


def _factor(sigma: Float64[Array, "d d"]) -> Float64[Array, "d r"]:
    """Gives A with A A^T = sigma and r = its numerical rank, by Cholesky with complete pivoting (LAPACK dpstrf).

    A pivot is what remains of a diagonal entry s_jj when sum_k l_jk^2 <= s_jj is taken from it, in at most n roundings
    of each: where nothing remains, up to 2 (n + 1) u max s of rounding does, with u = 2^-53. LAPACK's own limit, half
    of it, lets such a remainder pass as a further column, whose norm is its root: 1e-10 of the traces and more.
    """
    limit = (len(sigma) + 1) * np.finfo(np.float64).eps * np.diag(sigma).max(initial=0.0)  # eps = 2 u
    lower, pivots, rank, _ = lapack.dpstrf(sigma, tol=limit, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
