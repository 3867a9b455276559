"""What the classifiers of ImageNet have in common: features, logits of a thousand classes, images in small parts."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from gen.features.extractor import in_parts
from gen.features.weights import ConvertedWeights
from gen.nn.network import Params

__all__ = ["CLASSES", "SIDE", "ImageNetClassifier", "kernels_and_biases"]

SIDE, CLASSES = 224, 1000
_PART = 8  # images a CPU takes at a time


@dataclasses.dataclass(frozen=True)
class ImageNetClassifier(ConvertedWeights):
    """A network of ImageNet's classes as an extractor; a subclass resizes images to `SIDE` pixels a side and maps them.

    Attributes:
      weights: a file made by ``gen convert``; that of the per-user cache by default.
    """

    weights: str = ""

    filter: ClassVar[str]  # that resizes, as `gen.features.resize.resize` calls it

    @abc.abstractmethod
    def features_and_logits(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, H, W, 3) on the 0..255 grid -> "features" (B, D), "logits" (B, 1000), row by row."""

    @property
    def resize(self) -> str:
        """Does what `gen.features.extractor.Extractor.resize` says."""
        return f"{self.filter} {SIDE}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Does what `gen.features.extractor.Extractor.outputs` says."""
        return ("features", "logits")

    @property
    def classes(self) -> int:
        """Gives ImageNet's 1000 classes, in the order of their WordNet numbers."""
        return CLASSES

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, H, W, 3) float32 on the 0..255 grid -> "features" (B, D), "logits" (B, 1000) float32."""
        found: dict[str, jax.Array] = in_parts(self.features_and_logits, params, images, _PART)
        return found


def kernels_and_biases(kernels: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Gives the shapes of the arrays of layers by path, from those of their kernels (..., outputs)."""
    found = {f"{name}/kernel": shape for name, shape in kernels.items()}
    return found | {f"{name}/bias": shape[-1:] for name, shape in kernels.items()}
