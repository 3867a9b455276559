"""Distances between two sets of features that need the features themselves: KID, CMMD, MIND; in float64 on the host."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gen.errors import GenError
from gen.metrics.intervals import mean_error

__all__ = [
    "CMMD_SCALE",
    "CMMD_SIGMA",
    "KID_SIZE",
    "Spread",
    "cmmd",
    "cubic",
    "kid",
    "kid_subsets",
    "mind",
    "mmd2",
    "rbf",
    "sliced_wasserstein",
]

Array = np.ndarray
Kernel = Callable[[Array, Array], Array]
_BLOCK = 2048  # rows of a kernel matrix held at a time
_SEED = 2020  # torch-fidelity's
KID_SIZE = 1000  # samples in a subset; torch-fidelity's
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4


class Spread(NamedTuple):
    """A mean over random subsets and the standard deviation (over N) between them."""

    mean: float
    std: float


def cubic(x: Array, y: Array) -> Array:
    """Gives (x.y / D + 1)^3, (N, M) of features (N, D) and (M, D): the kernel of KID (Binkowski et al. 2018)."""
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def rbf(sigma: float) -> Kernel:
    """Gives exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(x: Array, y: Array) -> Array:
        squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * (x @ y.T)
        return np.asarray(np.exp(-np.maximum(squared, 0) / (2 * sigma**2)))

    return kernel


def mmd2(x: Array, y: Array, kernel: Kernel = cubic, *, unbiased: bool = True) -> float:
    """Gives the squared maximum mean discrepancy (Gretton et al. 2012).

    Args:
      x, y: (N, D) and (M, D) features.
      unbiased: leaves the diagonal out of the terms within a set (equation 3), else keeps it (equation 5).

    Raises:
      GenError: sets of another width, or of fewer than two rows when unbiased.
    """
    x, y = _pair(x, y)
    if unbiased and min(len(x), len(y)) < 2:
        raise GenError(f"{len(x)} and {len(y)} samples; an unbiased distance needs 2 of each; evaluate more")
    return _within(x, kernel, unbiased) + _within(y, kernel, unbiased) - 2 * _total(x, y, kernel) / (len(x) * len(y))


def kid_subsets(real: Array, fake: Array, real_rows: Array, fake_rows: Array, kernel: Kernel = cubic) -> Spread:
    """Gives the KID of given subsets.

    Args:
      real, fake: (N, D) and (M, D) features.
      real_rows, fake_rows: (S, m) row numbers of each subset.
    """
    real, fake = _pair(real, fake)
    values = [mmd2(real[r], fake[f], kernel) for r, f in zip(real_rows, fake_rows, strict=True)]
    return Spread(float(np.mean(values)), float(np.std(values)))


def kid(real: Array, fake: Array, *, subsets: int = 100, size: int = KID_SIZE, seed: int = _SEED) -> Spread:
    """Gives the kernel Inception distance: the unbiased MMD^2 of random subsets, each without replacement.

    Smaller sets take part whole: subsets of min(N, M, size). Usually printed times 1000; slightly negative values are
    valid.
    """
    size = min(len(real), len(fake), size)
    rng = np.random.RandomState(seed)
    rows = [
        (rng.choice(len(real), size, replace=False), rng.choice(len(fake), size, replace=False)) for _ in range(subsets)
    ]
    return kid_subsets(real, fake, np.stack([r for r, _ in rows]), np.stack([f for _, f in rows]))


def cmmd(real: Array, fake: Array, *, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE) -> float:
    """Gives the CLIP maximum mean discrepancy (Jayasumana et al. 2024) of unit-norm embeddings: biased, Gaussian
    kernel.
    """
    return scale * mmd2(real, fake, rbf(sigma), unbiased=False)


def sliced_wasserstein(x: Array, y: Array, directions: Array) -> Array:
    """Gives the squared 2-Wasserstein distance of the projections onto every direction, (P,) float64.

    Args:
      x, y: (N, D) features of equally many samples.
      directions: (P, D) unit vectors.

    Raises GenError for sets of different sizes.
    """
    x, y = _pair(x, y)
    if len(x) != len(y):
        raise GenError(f"{len(x)} and {len(y)} samples; a sliced distance needs equally many; leave some out")
    blocks = np.array_split(np.asarray(directions, np.float64), max(1, len(directions) // 64))
    return np.concatenate([((np.sort(x @ b.T, axis=0) - np.sort(y @ b.T, axis=0)) ** 2).mean(0) for b in blocks])


def mind(real: Array, fake: Array, *, directions: int = 1000, seed: int = _SEED) -> tuple[float, float]:
    """Gives the sliced distance of torch-fidelity (arXiv 2605.06797), and its standard error over the directions drawn.

    3 D times the mean of `sliced_wasserstein` over random directions. The larger set is cut to a random subset of the
    smaller one's size.
    """
    rng = np.random.RandomState(seed)
    size = min(len(real), len(fake))
    real, fake = (
        rows if len(rows) == size else rows[rng.choice(len(rows), size, replace=False)] for rows in (real, fake)
    )
    drawn = rng.standard_normal((directions, real.shape[1]))
    found = 3 * real.shape[1] * sliced_wasserstein(real, fake, drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    return float(found.mean()), mean_error(found)


def _pair(x: Array, y: Array) -> Sequence[Array]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (len(x) and len(y)):
        raise GenError(
            f"features of shapes {x.shape} and {y.shape}; expected (N, D) and (M, D) of one feature network; recompute "
            "one of them"
        )
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def _total(x: Array, y: Array, kernel: Kernel) -> float:
    return float(sum(kernel(x[i : i + _BLOCK], y).sum() for i in range(0, len(x), _BLOCK)))


def _within(x: Array, kernel: Kernel, unbiased: bool) -> float:
    if not unbiased:
        return _total(x, x, kernel) / len(x) ** 2
    diagonal = sum(np.trace(kernel(x[i : i + 1], x[i : i + 1])) for i in range(len(x)))
    return (_total(x, x, kernel) - float(diagonal)) / (len(x) * (len(x) - 1))
