"""Official MAE weights (facebookresearch/mae): the encoder, from a file of it alone or from one of pre-training."""

from pathlib import Path

from gen.errors import GenError
from gen.features.vit import ViTConfig
from gen.pretrained import dinov2
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays, Importer

__all__ = ["IMPORTER", "convert"]


def config(weights: Arrays, *, heads: int | None = None) -> ViTConfig:
    """Gives the configuration of a state dict, from its shapes.

    Args:
      heads: attention heads; by default those of the published sizes: 12 and 16 for widths of 768 and 1024, else 16.

    Raises GenError when a needed array is missing or not shaped as in an MAE.
    """
    if "blocks.0.ls1.gamma" in weights or "register_tokens" in weights:
        raise GenError("this is a DINOv2, not an MAE: it has LayerScale or registers; write gen convert dinov2 FILE")
    own = {name: array for name, array in weights.items() if name != "mask_token"}  # the decoder's
    published = {768: 12, 1024: 16, 1280: 16}
    width = weights["norm.weight"].shape[0] if "norm.weight" in weights else 0
    return dinov2.config(own, heads=published.get(width) if heads is None else heads)


IMPORTER = Importer(
    name="mae",
    signature=("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"),
    config=config,
    rules=dinov2.rules,
    generator=None,
    ignore=("decoder_*", "mask_token"),
)


def convert(source: Path, out: Path | None = None) -> str:
    """Reads a published MAE and keeps its encoder; returns one line on it.

    Args:
      source: .pth or .safetensors of an official state dict; the decoder of a pre-training file is left out.
      out: the .safetensors file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    return dinov2.stored("mae", IMPORTER, read_weights(source), source, out)
