"""The CLIP score: how well images fit their captions (Hessel et al. 2021)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.metrics.statistics import Accumulator, Moments, Shapes

__all__ = ["CLIPScore"]


@dataclasses.dataclass(frozen=True)
class CLIPScore:
    """Mean over samples of 100 max(cos(image, text), 0), from CLIP's embeddings of a sample and of its caption.

    The factor is that of torchmetrics and of text-to-image tables; Hessel's own is 2.5 and its captions begin with
    "A photo depicts". Samples carry their caption's embedding of length 1 as "text" (B, D).
    """

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `Statistic.init` says."""
        return Moments().init({"features": jax.ShapeDtypeStruct((1, 1), jnp.float32)}, span)

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `Statistic.update` says."""
        images = batch["features"] / jnp.linalg.norm(batch["features"], axis=-1, keepdims=True)
        scores = 100 * jnp.maximum((images * batch["text"]).sum(-1, keepdims=True), 0)
        return Moments().update(accumulator, {"features": scores}, weight, index)

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `Statistic.merge` says."""
        return Moments().merge(a, b)

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """Gives ``clip_score`` and its standard error over samples, ``clip_score_error``."""
        found = Moments().finalise(accumulator)
        return {
            "clip_score": np.float64(found["mean"][0]),
            "clip_score_error": np.sqrt(found["covariance"][0, 0] / found["count"]),
        }
