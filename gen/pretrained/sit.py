"""Official SiT (willisma/SiT) and REPA (sihyun-yu/REPA) weights: names, clocks and the official samplers.

A SiT file has DiT's names and shapes: nothing in it says which of the two it is, so that SiT must be asked for.
"""

import dataclasses
from typing import Any, Literal

from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.sit import parameterization
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.pretrained import dit
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, depth_of, linear
from gen.pretrained.sdvae import SCALED
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.sde import EulerMaruyama
from gen.sampling.solvers import Heun

__all__ = ["IMPORTER", "REPA", "aligned_config", "aligned_generator", "aligned_rules", "generator", "sampler"]


def sampler(kind: Literal["sde", "ode"] = "sde", steps: int = 250, guidance: Any = ClassifierFree()) -> Sampler:
    """Gives SiT's sampler, as published: Euler-Maruyama with w = sigma to time 0.04 and one mean step; or Heun.

    Args:
      guidance: ``ClassifierFree(1.5, channels=3)`` reproduces the published tables of SiT, which guide only the first
        three channels; ``Interval(ClassifierFree(1.8), 0.0, 0.7)`` those of REPA.
    """
    if kind == "ode":
        return Sampler(Heun(), Uniform(), steps, guidance)
    return Sampler(EulerMaruyama(), Uniform(end=0.04), steps, guidance)


def generator(config: DiTConfig) -> DiffusionGenerator:
    """Gives the official SDE sampler on latents of the SD-VAE (times 0.18215), unguided."""
    denoiser = Denoiser(config, Linear(), parameterization(config))
    return DiffusionGenerator(denoiser, sampler())


def aligned_config(
    weights: Arrays,
    *,
    heads: int | None = None,
    null_class: bool = True,
    size: tuple[int, int] | None = None,
    encoder_depth: int = 8,
) -> AlignedConfig:
    """Gives the configuration of a REPA state dict, from its shapes.

    Args:
      heads, null_class, size: see `gen.pretrained.dit.config`.
      encoder_depth: the block, counted from 1, whose output is aligned; 8 for L and XL, 4 for B.

    Raises GenError for arrays missing or misshaped, and for a depth that the network does not have.
    """
    network = dit.config(weights, heads=heads, null_class=null_class, size=size)
    encoders = depth_of(weights, "projectors.{i}.0.weight")
    try:
        widths = tuple(weights[f"projectors.{i}.4.weight"].shape[0] for i in range(encoders))
        hidden = weights["projectors.0.0.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise GenError(f"this is not a REPA model: {error} is missing; give an official file, or system sit") from None
    if not 1 <= encoder_depth <= network.depth:
        raise GenError(f"encoder_depth is {encoder_depth}; this network has blocks 1 to {network.depth}")
    return AlignedConfig(network, f"block_{encoder_depth - 1}", widths, hidden)


def aligned_rules(config: AlignedConfig) -> Rules:
    """Gives DiT's table for the backbone, and the projectors."""
    backbone = [
        dataclasses.replace(rule, ours=f"network/{rule.ours}") if isinstance(rule, Rule) else rule
        for rule in dit.rules(config.network)
    ]
    projectors = [
        rule
        for i in range(len(config.widths))
        for at, ours in ((0, "fc1"), (2, "fc2"), (4, "fc3"))
        for rule in linear(f"projectors.{i}.{at}", f"projector_{i}/{ours}")
    ]
    return [*backbone, *projectors]


def aligned_generator(config: AlignedConfig) -> DiffusionGenerator:
    """Gives REPA's SDE sampler, unguided; its network's clock is ours and its velocity has our sign."""
    network = config.network
    denoiser = Denoiser(config, Linear(), Predict("velocity", learned_variance=network.learned_variance))
    return DiffusionGenerator(denoiser, sampler())


IMPORTER = Importer(
    name="sit", signature=(), config=dit.config, rules=dit.rules, generator=generator, normalizer=SCALED, alike=("dit",)
)
REPA = Importer(
    name="repa",
    signature=(*dit.IMPORTER.signature, "projectors.0.0.weight"),
    config=aligned_config,
    rules=aligned_rules,
    generator=aligned_generator,
    normalizer=SCALED,
)
