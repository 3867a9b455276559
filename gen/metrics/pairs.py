"""Scores of images against the images they were made from, gathered over a set: PSNR, SSIM, MS-SSIM, LPIPS."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.features.lpips import lpips
from gen.metrics.image import ORIGINAL, SKIMAGE, TORCHMETRICS, ms_ssim, mse, psnr, ssim
from gen.metrics.statistics import Accumulator, Moments, Shapes
from gen.nn.network import Params

__all__ = ["Pairs", "pair_scores"]

_MARK = "pair_"  # of rows that are scores of pairs
_WINDOWS = {"original": ORIGINAL, "skimage": SKIMAGE, "torchmetrics": TORCHMETRICS}
_BEST = 100.0  # dB: what an exact copy counts as, so that a mean stays finite


def pair_scores(images: jax.Array, originals: jax.Array, networks: Mapping[str, Params]) -> dict[str, jax.Array]:
    """Gives the scores (B,) float32 of every pair, by name, that images of this size have.

    Names: ``psnr`` in dB, at most 100, and ``mse`` over 0..255; ``ssim_original`` (Wang et al. 2004), ``ssim_skimage``
    (scikit-image as it comes) and ``ssim_torchmetrics``, whose windows differ; ``ms_ssim`` from 176 pixels a side;
    ``lpips_NET`` (version 0.1). Each with "pair_" before it, as `Pairs` takes them.

    Args:
      images, originals: (B, H, W, 1 or 3) on the 0..255 grid.
      networks: parameters of LPIPS by trunk: vgg, alex, squeeze.
    """
    a, b = (jnp.asarray(x, jnp.float32) for x in (images, originals))
    side = min(a.shape[1:3])
    scores = {"psnr": jnp.minimum(psnr(a, b), _BEST), "mse": mse(a, b)}
    scores |= {f"ssim_{name}": ssim(a, b, window=w) for name, w in _WINDOWS.items() if side >= w.size}
    if side >= 16 * TORCHMETRICS.size:
        scores["ms_ssim"] = ms_ssim(a, b)
    x, y = (jnp.broadcast_to(x, (*x.shape[:3], 3)) / 127.5 - 1 for x in (a, b))
    with jax.default_matmul_precision("highest"):
        scores |= {f"lpips_{net}": lpips(params, x, y, net) for net, params in networks.items()}
    return {_MARK + name: score for name, score in scores.items()}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Mean and standard error over pairs of every row that `pair_scores` gave, whatever their names."""

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `Statistic.init` says."""
        one = {"features": jax.ShapeDtypeStruct((1, 1), jnp.float32)}
        return {
            f"{name}/{part}": array
            for name in shapes
            if name.startswith(_MARK)
            for part, array in Moments().init(one, span).items()
        }

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `Statistic.update` says."""
        return _each(
            lambda name, parts: Moments().update(parts, {"features": batch[name][:, None]}, weight, index), accumulator
        )

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `Statistic.merge` says."""
        others = _by_name(b)
        return _each(lambda name, parts: Moments().merge(parts, others[name]), a)

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives ``pairs``: mean by name, and ``pair_errors``: standard error of it by name."""
        found = {n.removeprefix(_MARK): Moments().finalise(parts) for n, parts in _by_name(accumulator).items()}
        return {
            "pairs": {name: float(m["mean"][0]) for name, m in found.items()},
            "pair_errors": {name: float(np.sqrt(m["covariance"][0, 0] / m["count"])) for name, m in found.items()},
        }


def _by_name(accumulator: Accumulator) -> dict[str, Accumulator]:
    names: dict[str, Accumulator] = {}
    for key, array in accumulator.items():
        name, _, part = key.partition("/")
        names.setdefault(name, {})[part] = array
    return names


def _each(function: Any, accumulator: Accumulator) -> Accumulator:
    found = {name: function(name, parts) for name, parts in _by_name(accumulator).items()}
    return {f"{name}/{part}": array for name, parts in found.items() for part, array in parts.items()}
