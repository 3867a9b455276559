"""The encoder of MAE (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377)."""

import dataclasses
from typing import Any

from gen.config import suggest
from gen.errors import GenError
from gen.features.vit import ViTConfig

__all__ = ["SIZES", "mae"]

# name -> (patch, width, depth, heads), all with a position table for 224 pixels
SIZES: dict[str, tuple[int, int, int, int]] = {
    "B": (16, 768, 12, 12),
    "L": (16, 1024, 24, 16),
    "H": (14, 1280, 32, 16),
}


def mae(name: str, **changes: Any) -> ViTConfig:
    """Gives a published size by name, "B", "L" or "H": no LayerScale, no registers, positions resampled as timm does.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown MAE size '{name}'; {suggest(name, SIZES)}")
    patch, width, depth, heads = SIZES[name]
    config = ViTConfig(
        224, patch, width, depth, heads, 4 * width, scaled=False, antialias=True, offset=0.0, masked=False
    )
    return dataclasses.replace(config, **changes)
