"""Official DINOv2 weights (facebookresearch/dinov2): names and shapes."""

import math
import re
from pathlib import Path

from gen.errors import GenError
from gen.features.dinov2 import DINOv2Config
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, depth_of, linear, patches

__all__ = ["IMPORTER", "config", "convert", "rules", "unchunked"]

_HEAD_WIDTH = 64  # of all published sizes


def rules(config: DINOv2Config) -> Rules:
    """The table of official names for a configuration."""
    inner, outer = ("w12", "w3") if config.swiglu else ("fc1", "fc2")
    norms = [
        Rule(f"{official}.{theirs}", f"{ours}/{name}")
        for official, ours in (
            ("blocks.{i}.norm1", "blocks/norm1"),
            ("blocks.{i}.norm2", "blocks/norm2"),
            ("norm", "norm"),
        )
        for theirs, name in (("weight", "scale"), ("bias", "bias"))
    ]
    return [
        Rule("cls_token", "cls"),
        Rule("mask_token", "mask"),
        Rule("pos_embed", "positions"),
        *([Rule("register_tokens", "registers")] if config.registers else []),
        Rule("patch_embed.proj.weight", "patch/kernel", patches(config.patch)),
        Rule("patch_embed.proj.bias", "patch/bias"),
        *linear("blocks.{i}.attn.qkv", "blocks/attn/qkv"),
        *linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        *([Rule(f"blocks.{{i}}.ls{k}.gamma", f"blocks/scale{k}") for k in (1, 2)] if config.scaled else []),
        *linear("blocks.{i}.mlp." + inner, "blocks/mlp/fc1"),
        *linear("blocks.{i}.mlp." + outer, "blocks/mlp/fc2"),
        *norms,
    ]


def config(weights: Arrays, *, heads: int | None = None) -> DINOv2Config:
    """The configuration of a state dict, from its shapes, with the position table resampled as was published.

    Args:
      heads: attention heads; by default heads of 64 channels, as in every published size.

    Raises GenError when a needed array is missing or not shaped as in a DINOv2, or the width does not fit the heads.
    """
    swiglu = "blocks.0.mlp.w12.weight" in weights
    try:
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1] - 1
        hidden = weights["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a DINOv2: {error} is missing or misshaped; give an official file") from None
    if heads is None and width % _HEAD_WIDTH:
        raise GenError(f"DINOv2 width {width} is not a published size; give its number of attention heads (heads)")
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    return DINOv2Config(
        size=math.isqrt(tokens) * patch,
        patch=patch,
        width=width,
        depth=depth_of(weights, "blocks.{i}.attn.qkv.weight"),
        heads=width // _HEAD_WIDTH if heads is None else heads,
        hidden=hidden,
        swiglu=swiglu,
        scaled="blocks.0.ls1.gamma" in weights,
        registers=registers,
        antialias=registers > 0,
        offset=0.0 if registers else 0.1,
    )


def unchunked(weights: Arrays) -> Arrays:
    """A state dict under the names of published files: training in chunks (``block_chunks``) says which a block is in.

    ``blocks.CHUNK.BLOCK.`` becomes ``blocks.BLOCK.``; all else stays.
    """
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): array for name, array in weights.items()}


IMPORTER = Importer(
    name="dinov2",
    signature=("cls_token", "mask_token", "pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"),
    config=config,
    rules=rules,
    generator=None,
)


def convert(source: Path, out: Path | None = None) -> str:
    """Reads a published DINOv2 and keeps it where evaluation looks for it; returns one line on it.

    Args:
      source: .pth or .safetensors of an official state dict.
      out: the .safetensors file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    network, params, _ = IMPORTER.load(unchunked(read_weights(source)))
    out = cache_path("dinov2") if out is None else out
    identity = store_weights(out, params, origin=source.name, network=network)
    return f"dinov2: width {network.width}, depth {network.depth}, identity {identity}; written to {out}"
