"""The Vendi score: how many different samples a set amounts to (Friedman & Dieng 2023)."""

from typing import NamedTuple

import numpy as np

from gen.errors import GenError

__all__ = ["Vendi", "vendi"]


class Vendi(NamedTuple):
    """A Vendi score, from 1 (all samples alike) to the number of samples (all orthogonal), and its standard error."""

    score: float
    error: float


def vendi(features: np.ndarray) -> Vendi:
    """Gives exp of the entropy of the eigenvalues of K / N, K the cosine similarities of the samples (equation 1, order
    1).

    The eigenvalues other than 0 are those of the D x D matrix rho = X^T X / N of unit rows, so no N x N matrix is
    made. The standard error is the score times that of the entropy, the mean of -x^T (log rho) x to first order. The
    score grows with the number of samples: compare equal N.

    Args:
      features: (N, D), any scale; in dgm-eval's use those of DINOv2.

    Raises:
      GenError: fewer than two samples, another shape, or a row of zeros, which has no direction.
    """
    if features.ndim != 2 or len(features) < 2:
        raise GenError(f"a Vendi score of features {features.shape}; expected (N, D) with N > 1; evaluate more samples")
    rows = np.asarray(features, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise GenError(f"sample {int(np.argmin(lengths))} has only zero features; a Vendi score needs directions")
    rows = rows / lengths
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    real = values > 1e-12  # the rest is rounding of eigenvalues 0, which add nothing
    minus_log = -np.log(values[real])
    surprise = np.square(rows @ vectors[:, real]) @ minus_log
    score = float(np.exp(values[real] @ minus_log))
    return Vendi(score, score * float(surprise.std(ddof=1)) / float(np.sqrt(len(rows))))
