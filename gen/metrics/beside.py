"""What some measures look at beside samples and reference: captions, training images, held-out images.

Each joins the samples' source with its identity, so that it stands in the protocol of the scores.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gen.arrays import digest
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.onepass import Progress, collect
from gen.metrics.sources import ImageSet
from gen.metrics.statistics import Features, basic_statistics, finalised

__all__ = ["with_images", "with_texts"]


def with_texts(source: ImageSet, texts: np.ndarray) -> ImageSet:
    """Gives a source whose sample i carries the embedding of its caption, for the CLIP score.

    Args:
      texts: (N, D) float32 of length 1, one for every sample (`gen.features.clip.CLIPExtractor.texts`).

    Raises:
      GenError: another number of captions than samples.
    """
    if len(texts) != source.count:
        raise GenError(f"{len(texts)} captions for {source.count} samples; expected one for each, in their order")
    identity = digest({"texts": texts})
    read = source.read
    if read is not None:
        changes: dict[str, Any] = {"read": lambda indices: {**read(indices), "text": texts[indices]}}
    else:
        arguments = {"made": source.arguments, "text": texts}
        changes = {"function": _Captioned(source.function), "arguments": arguments}
    beside = {**source.beside, "captions": (identity, texts)}
    return dataclasses.replace(source, identity=f"{source.identity} captions {identity}", beside=beside, **changes)


@dataclasses.dataclass(frozen=True)
class _Captioned:
    """Equal for equal functions, so that programs are shared."""

    function: Any

    def __call__(self, arguments: Mapping[str, Any], indices: jax.Array) -> dict[str, jax.Array]:
        return {**self.function(arguments["made"], indices), "text": arguments["text"][indices]}


def with_images(
    source: ImageSet,
    name: str,
    images: ImageSet,
    extractor: Extractor,
    *,
    batch: int = 256,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Gives a source with real images beside it: "training" or "heldout". All of them are kept on the host.

    Args:
      name: what they are.
      images: the real images, of one size with the samples.
      extractor: the feature network of the evaluation.
      batch, mesh, progress: see `gen.metrics.onepass.collect`.
    """
    statistics = basic_statistics(extractor, images.labels != "none", images.count)
    statistics["images"] = Features(images.count, "levels", "uint8", "images")
    tally = collect(images, extractor, statistics, batch=batch, mesh=mesh, progress=progress)
    beside = {**source.beside, name: (images.identity, finalised(statistics, tally.accumulators))}
    return dataclasses.replace(source, beside=beside)
