"""Why two Frechet distances of the same images differ: one step of the pipeline changed at a time.

A distance depends on how floats became bytes, on the resize, on the feature network, on the real images, on how often
each class occurs, and on how the square root of a matrix is taken. `explained` goes from one pipeline to the other step
by step, in this order, and gives the distance after each; what is left between its ends and two given scores is the
residual, of whatever else differed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from scipy import linalg

from gen.errors import GenError
from gen.metrics.frechet import frechet_distance

__all__ = ["STEPS", "Pipeline", "explained", "shares", "weighted_moments", "with_square_root"]

STEPS = ("rounding", "resize", "network", "reference", "balance", "root")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a distance is measured.

    Attributes:
      rounding: of float images, a name in `gen.metrics.sources.QUANTISERS`; "given" for images that came as bytes.
      resize: mode of the feature network.
      network: its name, and whose weights.
      reference: the real images.
      balance: whether classes count equally, however often they occur.
      root: of the product of covariances: ``exact`` (`gen.metrics.frechet`), or ``sqrtm``, the general square root of
        published codes, which adds 1e-6 to the diagonals where it is not finite and drops the imaginary part.
    """

    rounding: str
    resize: str
    network: str
    reference: str
    balance: bool = False
    root: Literal["exact", "sqrtm"] = "exact"


def explained(distance: Callable[[Pipeline], float], a: Pipeline, b: Pipeline) -> dict[str, float]:
    """Gives the distance after each step from `a` to `b`: ``start``, then those of `STEPS` in which they differ.

    Args:
      distance: measures the same images under a pipeline.

    Raises GenError for pipelines that do not differ.
    """
    if a == b:
        raise GenError("both scores have one pipeline; only their images differ, which nothing here takes apart")
    found, now = {"start": distance(a)}, a
    for step in STEPS:
        if getattr(now, step) != getattr(b, step):
            now = dataclasses.replace(now, **{step: getattr(b, step)})
            found[step] = distance(now)
    return found


def weighted_moments(features: np.ndarray, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Gives mean and covariance of features (N, D); with `labels` (N,) every class that occurs counts equally."""
    rows = np.asarray(features, np.float64)
    if labels is None:
        return rows.mean(0), np.cov(rows.T)
    _, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1.0 / counts[index]
    return np.average(rows, axis=0, weights=weights), np.cov(rows.T, aweights=weights)


def with_square_root(root: str, moments: tuple[np.ndarray, ...], real: tuple[np.ndarray, ...]) -> float:
    """Gives the distance of (mean, covariance) pairs by a `Pipeline.root`."""
    if root == "exact":
        return frechet_distance(*moments, *real)
    (mu1, sigma1), (mu2, sigma2) = moments, real
    product: Any = linalg.sqrtm(sigma1 @ sigma2)
    if not np.isfinite(product).all():
        offset = 1e-6 * np.eye(len(sigma1))
        product = linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    traces = np.trace(sigma1) + np.trace(sigma2) - 2.0 * np.trace(np.real(product))
    return float(np.sum((mu1 - mu2) ** 2) + traces)


def shares(found: Mapping[str, float], first: float, second: float) -> list[tuple[str, float, float]]:
    """Gives (step, distance after it, what it changed), and at last ``residual``: second - first minus all changes."""
    rows, before = [], found["start"]
    for step, value in found.items():
        rows.append((step, value, value - before))
        before = value
    total = before - found["start"]
    return [*rows, ("residual", second, second - first - total)]
