"""SlimFlow's students (yuanzhi-zhu/SlimFlow): score SDE's NCSN++ code in its DDPM++ configuration, as rectified flows.

The official network keeps its layers in one flat list, ``all_modules.0`` and on, in the order in which they are called.
It computes what EDM's DDPM++ does, so that our `SongUNetConfig` is its network; attention is a module of its own there,
after the block that it follows.
"""

from typing import Any

import numpy as np

from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.distill.slimflow import EDGE
from gen.errors import GenError
from gen.pretrained.rules import Arrays, Computed, Importer, Rule, Rules, Transform, convolution, linear
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Euler

__all__ = ["IMPORTER", "config", "denoiser", "rules"]

_BEFORE = 3  # two dense layers and the first convolution come before the blocks
# noise levels of score matching, which the code base stores and the flow does not use
_SIGMAS = np.exp(np.linspace(np.log(50.0), np.log(0.01), 1000)).astype(np.float32)

# a layer of q, k and v (C, C) each <-> our kernel, in which the three of a channel are neighbours
_QKV = Transform(
    lambda *parts: np.stack(parts, axis=-1).reshape(1, 1, len(parts[0]), -1),
    lambda a: tuple(np.moveaxis(a.reshape(a.shape[2], -1, 3), -1, 0)),
)
_QKV_BIAS = Transform(lambda *parts: np.stack(parts, axis=-1).reshape(-1), lambda a: tuple(a.reshape(-1, 3).T))
_PROJECTION = Transform(lambda a: a[None, None], lambda a: (a[0, 0],))


def denoiser(network: SongUNetConfig) -> Denoiser:
    """Gives the flow of a network: it is told 999 times the time from noise, and predicts data minus noise."""
    return Denoiser(network, Linear(), Predict("velocity", "reversed", 999.0, -1))


def generator(network: SongUNetConfig) -> DiffusionGenerator:
    """Gives the Generator with one step from just below pure noise."""
    sampler = Sampler(Euler(), Uniform(start=1.0 - EDGE), 1, ClassifierFree(1.0))
    return DiffusionGenerator(denoiser(network), sampler)


def rules(config: SongUNetConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    table: list[Rule | Computed] = [Computed("sigmas", _SIGMAS, atol=1e-4)]
    table += [*linear("all_modules.0", "map/layer0"), *linear("all_modules.1", "map/layer1")]
    number = _BEFORE - 1
    for side, plan in zip(("enc", "dec"), config.plans, strict=True):
        for row in plan:
            official, ours = f"all_modules.{number}", f"{side}/{row.name}"
            number += 1
            if row.kind == "norm":
                table += _norm(official, ours)
            elif row.kind != "block":
                table += convolution(official, ours)
            else:
                table += _block(official, ours, skip=row.inputs != row.outputs or row.up or row.down)
                if row.attention:
                    table += _attention(f"all_modules.{number}", ours)
                    number += 1
    return table


def _norm(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def _block(official: str, ours: str, *, skip: bool) -> list[Rule]:
    table = [*_norm(f"{official}.GroupNorm_0", f"{ours}/norm0"), *_norm(f"{official}.GroupNorm_1", f"{ours}/norm1")]
    table += linear(f"{official}.Dense_0", f"{ours}/affine")
    names = {"Conv_0": "conv0", "Conv_1": "conv1"} | ({"Conv_2": "skip"} if skip else {})
    return table + [
        rule for theirs, own in names.items() for rule in convolution(f"{official}.{theirs}", f"{ours}/{own}")
    ]


def _attention(official: str, ours: str) -> list[Rule]:
    three = [f"{official}.NIN_{i}" for i in range(3)]
    return [
        *_norm(f"{official}.GroupNorm_0", f"{ours}/norm2"),
        Rule(tuple(f"{name}.W" for name in three), f"{ours}/qkv/kernel", _QKV),
        Rule(tuple(f"{name}.b" for name in three), f"{ours}/qkv/bias", _QKV_BIAS),
        Rule(f"{official}.NIN_3.W", f"{ours}/proj/kernel", _PROJECTION),
        Rule(f"{official}.NIN_3.b", f"{ours}/proj/bias"),
    ]


def config(weights: Arrays, *, size: int = 32) -> SongUNetConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: of the images, which no array tells.

    Raises GenError when a needed array is missing or not shaped as in one of these networks.
    """
    try:
        return _config({name: np.shape(array) for name, array in weights.items()}, size)
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a SlimFlow network: {error} is missing or misshaped; give its file") from None


def _config(shapes: dict[str, tuple[int, ...]], size: int) -> SongUNetConfig:
    emb, width = shapes["all_modules.0.weight"]
    channels = shapes["all_modules.2.weight"][1]
    # (inputs, outputs, whether it is followed by attention) of each block, in order
    blocks: list[list[Any]] = []
    resampled: list[bool] = []
    number = _BEFORE
    while f"all_modules.{number}.GroupNorm_0.weight" in shapes:
        if f"all_modules.{number}.NIN_0.W" in shapes:
            blocks[-1][2] = True
        else:
            outputs, inputs = shapes[f"all_modules.{number}.Conv_0.weight"][:2]
            blocks.append([inputs, outputs, False])
            # only what changes the resolution has a projection between equal widths
            resampled.append(inputs == outputs and f"all_modules.{number}.Conv_2.weight" in shapes)
        number += 1
    levels = sum(resampled) // 2 + 1
    if levels > 1:
        each = resampled.index(True)
    else:  # the two blocks of the middle come before the first that takes a skip
        each = next(i for i, (inputs, outputs, _) in enumerate(blocks) if inputs > outputs) - 2
    firsts = [blocks[level * (each + 1)] for level in range(levels)]
    return SongUNetConfig(
        size,
        channels,
        shapes[f"all_modules.{number + 1}.weight"][0],
        width=width,
        mult=tuple(outputs // width for _, outputs, _ in firsts),
        emb=emb // width,
        blocks=each,
        attention=tuple(size >> level for level, (*_, attention) in enumerate(firsts) if attention),
    )


IMPORTER = Importer(
    "slimflow", ("all_modules.0.weight", "all_modules.3.GroupNorm_0.weight", "sigmas"), config, rules, generator
)
