"""KL autoencoder weights: diffusers' names, today's and those before its 0.15 (SD-VAE), and CompVis's (LDM, VA-VAE).

The tables give raw latents: stable diffusion's factor 0.18215 and VA-VAE's statistics are the normaliser's.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from gen.errors import GenError
from gen.pretrained.rules import CONV, Arrays, Importer, Rule, Rules, Transform, convolution, depth_of
from gen.tokenizers.base import Affine
from gen.tokenizers.kl_vae import KLVAEConfig

__all__ = ["COMPVIS", "DIFFUSERS", "DIFFUSERS_OLD", "SCALED", "config", "rules"]

Naming = Literal["diffusers", "diffusers-old", "compvis"]

# the normaliser of stable diffusion and DiT: latents times 0.18215
SCALED = Affine(np.zeros(4, np.float32), np.full(4, 1.0 / 0.18215, np.float32))

# a dense layer (O, I) as our 1x1 convolution (1, 1, I, O)
_DENSE = Transform(lambda a: a.T[None, None], lambda a: (a[0, 0].T,))

# names of an attention's norm, q, k, v and output layers
_ATTENTION: dict[Naming, tuple[str, ...]] = {
    "diffusers": ("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    "diffusers-old": ("group_norm", "query", "key", "value", "proj_attn"),
    "compvis": ("norm", "q", "k", "v", "proj_out"),
}


def rules(config: KLVAEConfig, naming: Naming) -> Rules:
    """The table of official names for a configuration under one of the three namings."""
    rows: list[Rule] = []
    for side in ("encoder", "decoder"):
        rows += convolution(f"{side}.conv_in", f"{side}/conv_in")
        for kind, official, ours in _parts(config, side, naming):
            rows += _part(config, kind, official, ours, naming)
        rows += _norm(f"{side}.{'norm_out' if naming == 'compvis' else 'conv_norm_out'}", f"{side}/norm_out")
        rows += convolution(f"{side}.conv_out", f"{side}/conv_out")
    if config.quant_conv:
        rows += [*convolution("quant_conv", "quant"), *convolution("post_quant_conv", "post_quant")]
    return rows


def _parts(config: KLVAEConfig, side: str, naming: Naming) -> Iterator[tuple[str, str, str]]:
    """(kind, official name, our path) of every residual block, attention and resampling of one tower."""
    encoder, levels = side == "encoder", len(config.mult)
    tower, attended = ("down", config.attention) if encoder else ("up", config.decoder_attention)
    for i in range(levels):
        # diffusers numbers the decoder's levels as they run, from the coarsest
        place = f"{tower}_blocks.{i if encoder else levels - 1 - i}" if naming != "compvis" else f"{tower}.{i}"
        block, attention = ("block", "attn") if naming == "compvis" else ("resnets", "attentions")
        ours = f"{side}/{tower}/level{i}"
        width = config.widths[i]
        before = config.widths[max(i - 1, 0) if encoder else min(i + 1, levels - 1)]
        before = config.width if encoder and i == 0 else before
        for j in range(config.blocks + (not encoder)):
            changes = j == 0 and before != width
            yield "changing" if changes else "residual", f"{side}.{place}.{block}.{j}", f"{ours}/res/block{j}"
            if i in attended:
                yield "attention", f"{side}.{place}.{attention}.{j}", f"{ours}/attn/block{j}"
        if i < levels - 1 if encoder else i > 0:
            sampler = f"{tower}sample" if naming == "compvis" else f"{tower}samplers.0"
            yield "convolution", f"{side}.{place}.{sampler}.conv", f"{ours}/conv"
    middle = ("mid.block_1", "mid.attn_1", "mid.block_2")
    if naming != "compvis":
        middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    yield "residual", f"{side}.{middle[0]}", f"{side}/mid/block_1"
    if config.middle_attention:
        yield "attention", f"{side}.{middle[1]}", f"{side}/mid/attn_1"
    yield "residual", f"{side}.{middle[2]}", f"{side}/mid/block_2"


def _part(config: KLVAEConfig, kind: str, official: str, ours: str, naming: Naming) -> list[Rule]:
    if kind == "convolution":
        return convolution(official, ours)
    if kind == "attention":
        norm, *layers = _ATTENTION[naming]
        rows = _norm(f"{official}.{norm}", f"{ours}/norm")
        for name, own in zip(layers, ("q", "k", "v", "proj"), strict=True):
            transform = CONV if naming == "compvis" else _DENSE
            rows.append(Rule(f"{official}.{name}.weight", f"{ours}/{own}/kernel", transform))
            rows.append(Rule(f"{official}.{name}.bias", f"{ours}/{own}/bias"))
        return rows
    rows = []
    for i in (1, 2):
        rows += _norm(f"{official}.norm{i}", f"{ours}/norm{i}")
        rows += convolution(f"{official}.conv{i}", f"{ours}/conv{i}")
    if kind == "changing":
        rows += convolution(f"{official}.{'nin' if naming == 'compvis' else 'conv'}_shortcut", f"{ours}/shortcut")
    return rows


def _norm(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def config(naming: Naming, weights: Arrays, *, size: int = 256, groups: int = 32) -> KLVAEConfig:
    """The configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images it is to be used on; the network takes any.
      groups: of its group norms; shapes do not tell, 32 in all published networks.

    Raises GenError when a needed array is missing or not shaped as in a KL autoencoder.
    """
    compvis = naming == "compvis"
    level, block, attention = ("down.{}", "block", "attn") if compvis else ("down_blocks.{}", "resnets", "attentions")
    norm = _ATTENTION[naming][0]

    def attended(pattern: str, levels: int, flip: bool) -> tuple[int, ...]:
        found = [i for i in range(levels) if f"{pattern.format(i)}.{attention}.0.{norm}.weight" in weights]
        return tuple(sorted(levels - 1 - i if flip else i for i in found))

    try:
        first = weights["encoder.conv_in.weight"]
        levels = depth_of(weights, f"encoder.{level.format('{i}')}.{block}.0.conv1.weight")
        widths = [weights[f"encoder.{level.format(i)}.{block}.0.conv1.weight"].shape[0] for i in range(levels)]
        inner = weights["encoder.conv_out.weight"].shape[0] // 2
        channels = weights["quant_conv.weight"].shape[0] // 2 if "quant_conv.weight" in weights else inner
        width, image_channels = first.shape[:2]
    except (KeyError, IndexError, ValueError) as error:
        raise GenError(
            f"this is not a KL autoencoder: {error} is missing or misshaped; give an official file"
        ) from None
    if levels == 0 or any(w % width for w in widths):
        raise GenError(f"this KL autoencoder has level widths {widths} over {width}; expected multiples of it")
    return KLVAEConfig(
        image=(size, size, image_channels),
        width=width,
        mult=tuple(w // width for w in widths),
        blocks=depth_of(weights, f"encoder.{level.format(0)}.{block}.{{i}}.conv1.weight"),
        channels=channels,
        inner=inner,
        attention=attended(f"encoder.{level}", levels, False),
        decoder_attention=attended(f"decoder.{level.replace('down', 'up')}", levels, not compvis),
        middle_attention=f"encoder.{'mid.attn_1' if compvis else 'mid_block.attentions.0'}.{norm}.weight" in weights,
        quant_conv="quant_conv.weight" in weights,
        groups=groups,
    )


def _importer(name: str, naming: Naming, signature: tuple[str, ...], ignore: tuple[str, ...] = ()) -> Importer:
    def infer(weights: Arrays, *, size: int = 256, groups: int = 32) -> KLVAEConfig:
        return config(naming, weights, size=size, groups=groups)

    table: Any = functools.partial(rules, naming=naming)
    return Importer(name, signature, infer, table, None, ignore, role="tokenizer")


# attention and quant_conv are not in every file
_DIFFUSERS = ("encoder.conv_norm_out.weight", "encoder.mid_block.resnets.0.conv1.weight")
DIFFUSERS = _importer("sd-vae", "diffusers", _DIFFUSERS)
DIFFUSERS_OLD = _importer("sd-vae-old", "diffusers-old", (*_DIFFUSERS, "encoder.mid_block.attentions.0.query.weight"))
# training files also hold the loss's networks and VA-VAE's frozen foundation model
COMPVIS = _importer(
    "kl-vae",
    "compvis",
    ("encoder.norm_out.weight", "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),
    ("loss.*", "foundation_model.*", "linear_proj.*"),
)
