"""ViTok weights under the names of its first author's release; the tables that it stores are computed here."""

import dataclasses
import math
from typing import Literal

import numpy as np

from gen.errors import GenError
from gen.pretrained.rules import SAME, Arrays, Computed, Importer, Rule, Rules, Transform, depth_of, joined, linear
from gen.tokenizers.trunk import Tower
from gen.tokenizers.vitok import ViTokConfig, position_table

__all__ = ["IMPORTER", "rules"]

_HEADS = {768: 12, 1152: 16, 1312: 16, 1296: 16}


def _tubelets(sides: tuple[int, ...]) -> Transform:
    """A kernel (D, C, q, p, p) of stride (q, p, p) as the dense layer (q p p C, D)."""
    cube = (*((1,) if len(sides) == 2 else ()), *sides)
    return Transform(
        lambda a: a.transpose(2, 3, 4, 1, 0).reshape(-1, a.shape[0]),
        lambda a: (a.reshape(*cube, -1, a.shape[1]).transpose(4, 3, 0, 1, 2),),
    )


def _untubelets(sides: tuple[int, ...]) -> Transform:
    """A transposed kernel (D, C, q, p, p) of stride (q, p, p) as the dense layer (D, q p p C)."""
    inner = _tubelets(sides)
    return Transform(lambda a: inner.load(a).T, lambda a: inner.save(a.T))


def rules(config: ViTokConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    found: list[Rule | Computed] = [
        Rule("tubelet_embed.proj.weight", "embed/kernel", _tubelets(config.sides)),
        Rule("tubelet_embed.proj.bias", "embed/bias"),
        *linear("encoder_to_code", "to_code"),
        *linear("code_to_decoder", "from_code"),
        Rule("tubelet_decode.proj.weight", "unembed/kernel", _untubelets(config.sides)),
        Rule("tubelet_decode.proj.bias", "colour"),
    ]
    for trunk in ("encoder", "decoder"):
        found += _trunk(trunk)
    if config.positions != "none":
        for name, tower in (("posemb", config.encoder), ("dec_posemb", config.decoder)):
            table = position_table(config.grid, tower.width, config.positions)
            found.append(Computed(name, table[None], atol=1e-5))
    return found


def _trunk(name: str) -> list[Rule]:
    block, ours = f"{name}.blocks.{{i}}", f"{name}/blocks"
    norms = [(f"{block}.norm1", f"{ours}/norm1"), (f"{block}.norm2", f"{ours}/norm2"), (f"{name}.norm", f"{name}/norm")]
    gates = [f"{block}.mlp.fc1", f"{block}.mlp.fc2"]  # the activated branch, then the linear one
    return [
        *linear(f"{block}.attn.qkv", f"{ours}/attn/qkv", bias=False),
        *linear(f"{block}.attn.proj", f"{ours}/attn/proj"),
        Rule(tuple(f"{gate}.weight" for gate in gates), f"{ours}/mlp/fc1/kernel", joined(2)),
        Rule(tuple(f"{gate}.bias" for gate in gates), f"{ours}/mlp/fc1/bias", joined(2, SAME)),
        *linear(f"{block}.mlp.fc3", f"{ours}/mlp/fc2"),
        *(Rule(f"{n}.{w}", f"{o}/{m}") for n, o in norms for w, m in (("weight", "scale"), ("bias", "bias"))),
    ]


def config(
    weights: Arrays,
    *,
    size: int = 256,
    frames: int = 1,
    heads: int | None = None,
    rotary: Literal["1d", "2d"] = "1d",
    theta: float = 10000.0,
) -> ViTokConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images.
      frames: frames of a video; 1 for images.
      heads: attention heads; by default those of the released sizes.
      rotary, theta: how q and k are turned; the release has "1d".

    Raises GenError when a needed array is missing or not shaped as in a ViTok.
    """
    try:
        width, colours, tubelet, patch, _ = weights["tubelet_embed.proj.weight"].shape
        channels = weights["code_to_decoder.weight"].shape[1]
        moments = weights["encoder_to_code.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a ViTok: {error} is missing or misshaped; give a file of the release") from None
    if moments != 2 * channels:
        raise GenError(f"this ViTok gives {moments} numbers for {channels} channels; only variational ones are known")
    heads = _HEADS.get(width, max(width // 64, 1)) if heads is None else heads
    encoder, decoder = (
        Tower(width, depth_of(weights, f"{name}.blocks.{{i}}.norm1.weight"), heads) for name in ("encoder", "decoder")
    )
    video = tubelet > 1 or frames > 1
    found = ViTokConfig(
        image=(frames, size, size, colours) if video else (size, size, colours),
        patch=patch,
        frames=tubelet,
        channels=channels,
        encoder=encoder,
        decoder=decoder,
        rotary=rotary,
        theta=theta,
    )
    return _with_table(found, weights)


def _with_table(found: ViTokConfig, weights: Arrays) -> ViTokConfig:
    """The configuration with the kind of position table whose values the file holds."""
    if "posemb" not in weights:
        return found
    table, tokens = weights["posemb"], math.prod(found.grid)
    kinds: tuple[Literal["1d", "2d", "3d"], ...] = ("1d", "2d" if len(found.sides) == 2 else "3d")
    for kind in kinds:
        own = position_table(found.grid, found.encoder.width, kind)
        if table.shape[1:] == own.shape and np.abs(table[0] - own).max() < 1e-4:
            return dataclasses.replace(found, positions=kind)
    raise GenError(f"the position table {table.shape} is none that ViTok computes for {tokens} tokens; give the size")


IMPORTER = Importer(
    name="vitok",
    signature=("tubelet_embed.proj.weight", "encoder_to_code.weight", "code_to_decoder.weight"),
    config=config,
    rules=rules,
    generator=None,
    role="tokenizer",
)
