"""The Frechet distance between Gaussian statistics, in float64 on the host."""

import numpy as np
from jaxtyping import Float64
from scipy.linalg import lapack

from gen.errors import GenError

__all__ = ["frechet_distance"]

Array = np.ndarray


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) (Heusel et al. 2017, equation 6; Dowson & Landau 1982).

    With factors S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B. No square
    root of a rounded eigenvalue is taken, so the result is real, needs no regularisation, and stays accurate to
    about 1e-7 when the covariances are singular (fewer samples than dimensions), where the usual
    matrix square root becomes complex.

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
    cross = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)  # rounding alone can make it negative, by about 1e-16 of the traces


def _check(name: str, mu: Array, sigma: Array) -> None:
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise GenError(
            f"the {name} statistics have a mean of shape {mu.shape} and a covariance of shape {sigma.shape}; "
            "expected (D,) and (D, D); check the file's mu and sigma"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise GenError(
            f"the {name} statistics hold NaN or infinite values; expected finite ones; look for bad images among the "
            "samples, or for fewer than two of them"
        )
    scale = np.abs(sigma).max(initial=0.0)
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * scale) or np.diag(sigma).min(initial=0.0) < -1e-6 * scale:
        raise GenError(
            f"the {name} covariance is not symmetric with a non-negative diagonal; expected a covariance matrix; "
            "check the file's sigma"
        )


def _factor(sigma: Float64[Array, "d d"]) -> Float64[Array, "d r"]:
    """A with A A^T = sigma and r = its numerical rank, by Cholesky with complete pivoting (LAPACK dpstrf)."""
    lower, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
