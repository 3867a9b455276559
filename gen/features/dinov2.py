"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193): published sizes, and its class token as features of scores."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import flatten
from gen.config import suggest
from gen.errors import GenError
from gen.features.resize import resize, resize_host
from gen.features.vit import DEVIATION, MEAN, ViTConfig
from gen.features.weights import ConvertedWeights, network_of
from gen.nn.network import Network, Params, param_shapes

__all__ = ["SIZES", "DINOv2Extractor", "dinov2"]

# name -> (width, depth, heads, hidden, swiglu), all with patches of 14 and a table for 518 pixels
SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "S": (384, 12, 6, 1536, False),
    "B": (768, 12, 12, 3072, False),
    "L": (1024, 24, 16, 4096, False),
    "g": (1536, 40, 24, 4096, True),
}


def dinov2(name: str, *, registers: int = 0, **changes: Any) -> ViTConfig:
    """Gives a published size by name, "S", "B", "L" or "g", with its own way to resample positions; registers are 0 or
    4.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown DINOv2 size '{name}'; {suggest(name, SIZES)}")
    width, depth, heads, hidden, swiglu = SIZES[name]
    config = ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        swiglu=swiglu,
        registers=registers,
        antialias=registers > 0,
        offset=0.0 if registers else 0.1,
    )
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True)
class DINOv2Extractor(ConvertedWeights):
    """The final class token of DINOv2, for the Frechet distance of Stein et al. 2023 (FD-DINOv2).

    Images are resized to exactly `size` by Pillow's bicubic filter, not rounded in between, as EDM2 does.

    Attributes:
      size: side of the images that it sees.
      weights: a file made by ``gen convert dinov2``; that of the per-user cache by default. The published choice is
        ViT-L/14 without registers.
    """

    size: int = 224
    weights: str = ""

    @property
    def name(self) -> str:
        """Gives the short name for protocols and tables."""
        return "dinov2"

    @property
    def resize(self) -> str:
        """Does what `Extractor.resize` says."""
        return f"pil-bicubic {self.size}"

    @property
    def hint(self) -> str:
        """Does what `ConvertedWeights.hint` says."""
        return "get dinov2_vitl14_pretrain.pth from facebookresearch/dinov2 and run gen convert dinov2 FILE"

    @property
    def network(self) -> ViTConfig:
        """Gives the architecture of the weights. Raises GenError when there are none."""
        return network_of(self.path, ViTConfig, self.hint)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Does what `ConvertedWeights.shapes` says."""
        return {name: value.shape for name, value in flatten(param_shapes(self.network)).items()}

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Gives one image (H, W, 3) of any size resized on the host to (size, size, 3) float32, which a call takes as
        is.
        """
        return resize_host(image, (self.size, self.size), "pil-bicubic")

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (B, H, W, 3) float32 on the 0..255 grid -> "features" (B, width) float32."""
        x = jnp.clip(resize(images, (self.size, self.size), "pil-bicubic"), 0, 255) / 255
        x = (x - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
        with jax.default_matmul_precision("highest"):
            return {"features": Network(self.network).apply(params, x)["cls"]}
