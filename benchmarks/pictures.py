"""What the pictures of the method pages share: a row of images for each subject, with its figures beside it."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["SHOWN", "plt", "rows_of_images"]

SHOWN = 20  # images in a row
_GAP = 2  # white pixels between them


def rows_of_images(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Draws a row of the first images of each subject, named at its left.

    Args:
      rows: name, which may have several lines -> grey images (N, H, W, 1) uint8 on [0, 255].
      path: of the picture.
    """
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.42 * len(rows)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        apart = np.pad(images[:SHOWN, ..., 0], ((0, 0), (0, 0), (0, _GAP)), constant_values=255)
        axis.imshow(np.concatenate(list(apart), axis=1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.22, right=0.995, top=0.99, bottom=0.01, hspace=0.12)
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
    plt.close(figure)
