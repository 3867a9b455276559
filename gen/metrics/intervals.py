"""Standard errors: how far a score would move if the samples were drawn again.

All are over samples, with the reference fixed; 1.96 of them on either side make a 95 % interval. Scores that come with
a spread of their own (splits of the Inception Score, subsets of KID, directions of MIND) keep that.
"""

from collections.abc import Callable

import numpy as np

from gen.errors import GenError

__all__ = ["frechet_error", "kernel_error", "mean_error", "proportion_error"]

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def mean_error(values: np.ndarray) -> float:
    """Gives the standard error of the mean of values (N,), N > 1."""
    return float(np.std(np.asarray(values, np.float64), ddof=1) / np.sqrt(len(values)))


def proportion_error(share: float, count: int) -> float:
    """Gives the standard error of a share of `count` independent yes-or-no outcomes (accuracy, precision, recall,
    coverage).
    """
    return float(np.sqrt(share * (1 - share) / count))


def frechet_error(features: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
    """Gives the standard error of the Frechet distance of features (N, D) from a reference (mu (D,), sigma (D, D)).

    That of the mean of what each sample x adds, to first order: 2 (m - mu).(x - m) + (x - m)^T (I - T) (x - m), where
    m and S are the samples' mean and covariance, R = sigma^(1/2) and T = R (R S R)^(-1/2) R is the optimal transport
    between the two Gaussians; I - T is the gradient of the distance in S (Bhatia, Jain & Lim 2019). The bias in 1 / N
    is not part of it: see `gen.metrics.frechet.frechet_infinity`.

    Raises:
      GenError: fewer than two samples, or another width.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or len(rows) < 2 or np.shape(sigma) != (rows.shape[1],) * 2:
        raise GenError(
            f"features {rows.shape} against a covariance {np.shape(sigma)}; expected (N, D) with N > 1 and (D, D)"
        )
    shift = rows.mean(0) - mu
    rows = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(sigma)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    moved = rows @ root
    values, vectors = np.linalg.eigh(moved.T @ moved / (len(rows) - 1))
    kept = values > 1e-12 * values[-1]
    transported = np.square(moved @ vectors[:, kept]) @ (1 / np.sqrt(values[kept]))
    return mean_error(2 * rows @ shift + np.square(rows).sum(1) - transported)


def kernel_error(real: np.ndarray, fake: np.ndarray, kernel: Kernel) -> float:
    """Gives the standard error of the squared maximum mean discrepancy of fake (M, D) from real (N, D) features.

    Twice that of the mean of the witness function at the fakes, mean_j k(x, fake_j) - mean_j k(x, real_j): the first
    term of the distance in the draw of one sample (Gretton et al. 2012, section 6).
    """
    blocks = [fake[i : i + 1024] for i in range(0, len(fake), 1024)]
    witness = np.concatenate([kernel(b, fake).mean(1) - kernel(b, real).mean(1) for b in blocks])
    return 2 * mean_error(witness)
