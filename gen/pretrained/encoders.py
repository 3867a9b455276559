"""Foundation encoders from their published files, whichever of them a file holds."""

from pathlib import Path
from typing import Any

from gen.features.vit import ViTConfig
from gen.pretrained import dinov2, mae
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays, Importer

__all__ = ["encoder_importer", "read_encoder"]


def encoder_importer(weights: Arrays) -> Importer:
    """Gives DINOv2's importer, of Meta's and timm's names or the transformers library's, or MAE's (no LayerScale)."""
    if dinov2.HUB.signature[0] in weights:
        return dinov2.HUB
    mask = weights.get("mask_token")
    trained_so = "blocks.0.ls1.gamma" in weights or (mask is not None and mask.ndim == 2)  # MAE's is its decoder's
    return dinov2.IMPORTER if trained_so else mae.IMPORTER


def read_encoder(source: Path) -> tuple[ViTConfig, dict[str, Any]]:
    """Gives the configuration and parameters of the encoder in a .pth or .safetensors file.

    Raises GenError when the file cannot be read, or holds something else.
    """
    weights = dinov2.unchunked(read_weights(source))
    network, params, _ = encoder_importer(weights).load(weights)
    return network, params
