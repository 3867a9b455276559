"""Whether samples are copies of training images: the closest one of every sample, held against held-out images.

Real images that were not trained on also lie near some training image. A sample counts as a copy when it lies closer
than half of what is usual for those. Looked at twice: in pixels, where exact copies show, and in the features of an
evaluation network, where shifted or recoloured ones do.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from gen.errors import GenError
from gen.metrics.intervals import proportion_error
from gen.metrics.neighbours import nearest
from gen.metrics.report import Report

__all__ = ["Memorisation", "memorisation", "show_memorisation"]


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """Distances to the closest training image in one space.

    Attributes:
      distance: (N,) float32, of every sample.
      index: (N,) int32, which training image that is.
      heldout: (M,) float32, the same distance of real images that were not trained on.
    """

    distance: np.ndarray
    index: np.ndarray
    heldout: np.ndarray

    @property
    def threshold(self) -> float:
        """Half of the median distance of held-out images."""
        return float(np.median(self.heldout)) / 2

    @property
    def share(self) -> float:
        """Gives the fraction of samples below the threshold."""
        return float((self.distance < self.threshold).mean())

    @property
    def heldout_share(self) -> float:
        """Gives the fraction of held-out images below it: what a generator that copies nothing would have."""
        return float((self.heldout < self.threshold).mean())

    @property
    def error(self) -> float:
        """Gives the standard error of `share`."""
        return proportion_error(self.share, len(self.distance))


def memorisation(samples: np.ndarray, training: np.ndarray, heldout: np.ndarray) -> Memorisation:
    """Gives the closest training image of every sample and of every held-out image, by Euclidean distance.

    Args:
      samples, training, heldout: features (N, D), or images (N, H, W, C) of one size.

    Raises:
      GenError: none of one of them, or sizes that differ.
    """
    if not (len(samples) and len(training) and len(heldout)):
        raise GenError(
            f"{len(samples)} samples, {len(training)} training and {len(heldout)} held-out images; expected some of "
            "each; copies are judged by all three"
        )
    flat = [np.asarray(rows, np.float32).reshape(len(rows), -1) for rows in (samples, training, heldout)]
    distance, index = nearest(flat[0], flat[1])
    return Memorisation(distance, index, nearest(flat[2], flat[1])[0])


def show_memorisation(
    report: Report, samples: np.ndarray, training: np.ndarray, found: Mapping[str, Memorisation], *, count: int = 16
) -> Report:
    """Adds to a page: the most suspicious samples over their closest training images, and the distances of all.

    Args:
      report: the page.
      samples, training: (N, H, W, C) uint8 images that `found` is about, in its order.
      found: name of the space ("pixels", "features") -> what was found in it.
      count: how many pairs are shown.
    """
    report.section(
        "Closest training images",
        "The samples that lie nearest to a training image, each over that image. A sample counts as a copy when it is "
        "closer than half of the median distance of held-out images, which were never trained on.",
    )
    rows = [
        (
            space,
            f"{100 * m.share:.2f} % ± {100 * m.error:.2f}",
            f"{100 * m.heldout_share:.2f} %",
            m.threshold,
            float(np.median(m.distance)),
            float(np.median(m.heldout)),
        )
        for space, m in found.items()
    ]
    columns = ["distance in", "copies", "among held-out", "threshold", "median of samples", "median of held-out"]
    report.table(columns, rows)
    for space, m in found.items():
        closest = np.argsort(m.distance, kind="stable")[:count]
        pairs = {"samples": samples[closest], "training": training[m.index[closest]]}
        report.pictures(pairs, f"The {len(closest)} samples nearest in {space}, nearest first.", columns=count)
        report.curves(_histograms(m), f"Distances in {space}.", x="distance to the closest training image", y="share")
    return report


def _histograms(found: Memorisation, bins: int = 40) -> dict[str, tuple[list[float], list[float]]]:
    """Shares of samples and of held-out images by distance, and the threshold as an upright line."""
    edges = np.linspace(0, max(found.distance.max(), found.heldout.max(), 1e-12), bins + 1)
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    shares = {
        name: np.histogram(rows, edges)[0] / len(rows)
        for name, rows in (("samples", found.distance), ("held-out", found.heldout))
    }
    top = float(max(share.max() for share in shares.values()))
    lines = {name: (centres, share.tolist()) for name, share in shares.items()}
    return lines | {"threshold": ([found.threshold] * 2, [0.0, top])}
