"""Official DINOv2 weights: names and shapes of facebookresearch/dinov2, of timm and of the transformers library."""

import functools
import math
import re
from pathlib import Path
from typing import Literal

from gen.errors import GenError
from gen.features.vit import ViTConfig
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import SAME, Arrays, Importer, Rule, Rules, depth_of, joined, linear, patches

__all__ = ["HUB", "IMPORTER", "Naming", "config", "convert", "rules", "stored", "unchunked"]

Naming = Literal["official", "hub"]

_HEAD_WIDTH = 64  # of all published sizes
# names of the class token, mask token, position table, registers, patch projection, blocks, block parts and last norm
_NAMES: dict[Naming, dict[str, str]] = {
    "official": {
        "cls": "cls_token",
        "mask": "mask_token",
        "positions": "pos_embed",
        "registers": "register_tokens",
        "patch": "patch_embed.proj",
        "block": "blocks.{i}.",
        "proj": "attn.proj",
        "scale": "ls{k}.gamma",
        "swiglu": "w12 w3",
        "norm": "norm",
    },
    "hub": {
        "cls": "embeddings.cls_token",
        "mask": "embeddings.mask_token",
        "positions": "embeddings.position_embeddings",
        "registers": "embeddings.register_tokens",
        "patch": "embeddings.patch_embeddings.projection",
        "block": "encoder.layer.{i}.",
        "proj": "attention.output.dense",
        "scale": "layer_scale{k}.lambda1",
        "swiglu": "weights_in weights_out",
        "norm": "layernorm",
    },
}


def rules(config: ViTConfig, naming: Naming = "official") -> Rules:
    """Gives the table of official names for a configuration: of Meta's code and timm's, or of the transformers
    library.
    """
    names = _NAMES[naming]
    block = names["block"]
    inner, outer = names["swiglu"].split() if config.swiglu else ("fc1", "fc2")
    norms = [(f"{block}norm1", "blocks/norm1"), (f"{block}norm2", "blocks/norm2")]
    norms += [(names["norm"], "norm")] if config.affine else []
    return [
        Rule(names["cls"], "cls"),
        *([Rule(names["mask"], "mask")] if config.masked else []),
        Rule(names["positions"], "positions"),
        *([Rule(names["registers"], "registers")] if config.registers else []),
        Rule(names["patch"] + ".weight", "patch/kernel", patches(config.patch)),
        Rule(names["patch"] + ".bias", "patch/bias"),
        *_qkv(block, naming),
        *linear(block + names["proj"], "blocks/attn/proj"),
        *([Rule(block + names["scale"].replace("{k}", k), f"blocks/scale{k}") for k in "12"] if config.scaled else []),
        *linear(f"{block}mlp.{inner}", "blocks/mlp/fc1"),
        *linear(f"{block}mlp.{outer}", "blocks/mlp/fc2"),
        *(Rule(f"{n}.{w}", f"{ours}/{m}") for n, ours in norms for w, m in (("weight", "scale"), ("bias", "bias"))),
    ]


def _qkv(block: str, naming: Naming) -> list[Rule]:
    if naming == "official":
        return linear(f"{block}attn.qkv", "blocks/attn/qkv")
    parts = [f"{block}attention.attention.{part}" for part in ("query", "key", "value")]
    return [
        Rule(tuple(f"{part}.weight" for part in parts), "blocks/attn/qkv/kernel", joined(3)),
        Rule(tuple(f"{part}.bias" for part in parts), "blocks/attn/qkv/bias", joined(3, SAME)),
    ]


def config(weights: Arrays, *, heads: int | None = None, naming: Naming = "official") -> ViTConfig:
    """Gives the configuration of a state dict, from its shapes, with the position table resampled as was published.

    A file without a mask token is timm's, which has a way of its own.

    Args:
      heads: attention heads; by default heads of 64 channels, as in every published size.

    Raises GenError when a needed array is missing or not shaped as in a DINOv2, or the width does not fit the heads.
    """
    names = _NAMES[naming]
    first = names["block"].replace("{i}", "0")
    inner, outer = names["swiglu"].split()
    swiglu = f"{first}mlp.{inner}.weight" in weights
    try:
        width, _, patch, _ = weights[names["patch"] + ".weight"].shape
        tokens = weights[names["positions"]].shape[1] - 1
        hidden = weights[f"{first}mlp.{outer if swiglu else 'fc2'}.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a DINOv2: {error} is missing or misshaped; give an official file") from None
    if heads is None and width % _HEAD_WIDTH:
        raise GenError(f"DINOv2 width {width} is not a published size; give its number of attention heads (heads)")
    registers = weights[names["registers"]].shape[1] if names["registers"] in weights else 0
    masked = names["mask"] in weights
    own = masked and not registers  # resampled by DINOv2's first rule
    return ViTConfig(
        size=math.isqrt(tokens) * patch,
        patch=patch,
        width=width,
        depth=depth_of(weights, f"{names['block']}norm1.weight"),
        heads=width // _HEAD_WIDTH if heads is None else heads,
        hidden=hidden,
        swiglu=swiglu,
        scaled=first + names["scale"].replace("{k}", "1") in weights,
        registers=registers,
        antialias=not own,
        offset=0.1 if own else 0.0,
        masked=masked,
        affine=f"{names['norm']}.weight" in weights,
    )


def unchunked(weights: Arrays) -> Arrays:
    """Gives a state dict under the names of published files: training in chunks (``block_chunks``) says which a block
    is in.

    ``blocks.CHUNK.BLOCK.`` becomes ``blocks.BLOCK.``; all else stays.
    """
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): array for name, array in weights.items()}


def _hub(weights: Arrays, *, heads: int | None = None) -> ViTConfig:
    return config(weights, heads=heads, naming="hub")


def _official(weights: Arrays, *, heads: int | None = None) -> ViTConfig:
    return config(weights, heads=heads)


IMPORTER = Importer(
    name="dinov2",
    signature=("cls_token", "mask_token", "pos_embed", "blocks.0.attn.qkv.weight", "norm.weight"),
    config=_official,
    rules=rules,
    generator=None,
)
HUB = Importer(
    name="dinov2-hub",
    signature=("embeddings.cls_token", "encoder.layer.0.layer_scale1.lambda1"),
    config=_hub,
    rules=functools.partial(rules, naming="hub"),
    generator=None,
)


def convert(source: Path, out: Path | None = None) -> str:
    """Reads a published DINOv2 and keeps it where evaluation looks for it; returns one line on it.

    Args:
      source: .pth or .safetensors of an official state dict, of timm or of the transformers library.
      out: the .safetensors file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    weights = unchunked(read_weights(source))
    importer = HUB if HUB.signature[0] in weights else IMPORTER
    return stored("dinov2", importer, weights, source, out)


def stored(name: str, importer: Importer, weights: Arrays, source: Path, out: Path | None) -> str:
    """Imports an encoder and keeps it as `name`; returns one line on it."""
    network, params, _ = importer.load(weights)
    out = cache_path(name) if out is None else out
    identity = store_weights(out, params, origin=source.name, network=network)
    return f"{name}: width {network.width}, depth {network.depth}, identity {identity}; written to {out}"
