"""Official DiT weights (facebookresearch/DiT): names, shapes and the official sampler."""

import math
from typing import Any

import numpy as np

from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import DDPMLoss
from gen.errors import GenError
from gen.nn.layers import sincos_positions
from gen.pretrained.rules import (
    LINEAR,
    SAME,
    Arrays,
    Computed,
    Importer,
    Rule,
    Rules,
    Transform,
    depth_of,
    linear,
    patches,
)
from gen.pretrained.sdvae import SCALED
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Respaced
from gen.sampling.solvers import Ancestral

__all__ = ["IMPORTER", "config", "dimensions", "frame", "generator", "rules"]

_HEAD_WIDTH = {384: 64, 768: 64, 1024: 64, 1152: 72}  # the published sizes


def rules(config: DiTConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    return [
        *frame(config),
        *linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
    ]


def frame(config: DiTConfig) -> Rules:
    """Gives the rows that DiT shares with its relatives: everything but the MLPs."""
    positions = sincos_positions(config.grid, config.width, config.spacing)[None]
    return [
        Computed("pos_embed", positions),
        Rule("x_embedder.proj.weight", "patch/kernel", patches(config.patch)),
        Rule("x_embedder.proj.bias", "patch/bias"),
        *linear("t_embedder.mlp.0", "time/fc1"),
        Rule("t_embedder.mlp.2.weight", "time/fc2/kernel", LINEAR),
        *_labels(config),
        *linear("blocks.{i}.attn.qkv", "blocks/attn/qkv"),
        *linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        *linear("blocks.{i}.adaLN_modulation.1", "blocks/ada"),
        *linear("final_layer.linear", "final"),
        *linear("final_layer.adaLN_modulation.1", "final_ada"),
    ]


# the time embedder's last bias and the only row of a label table: their sum is what the network sees
_NULL_ROW = Transform(lambda bias, table: bias + table[0], lambda a: (a, np.zeros_like(a)[None]))


def _labels(config: DiTConfig) -> Rules:
    """The label table, beside the bias that it is added to; an unconditional network has the null row or no table."""
    bias, table = "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight"
    if config.num_classes:
        return [Rule(bias, "time/fc2/bias"), Rule(table, "label/embedding", SAME)]
    if config.null_class:
        return [Rule((bias, table), "time/fc2/bias", _NULL_ROW)]
    return [Rule(bias, "time/fc2/bias")]


def config(
    weights: Arrays, *, heads: int | None = None, null_class: bool = True, size: tuple[int, int] | None = None
) -> DiTConfig:
    """Gives the configuration of a state dict, from its shapes.

    Args:
      heads: attention heads; shapes do not tell, so they are required for a width that was not published.
      null_class: whether the label table's last row is the null label.
      size: (H, W) of the latents, which a file does not tell; square by default.

    Raises GenError when a needed array is missing or not shaped as in a DiT, or the heads are not known.
    """
    sizes = dimensions(weights, null_class, size)
    width = sizes["width"]
    if "blocks.0.mlp.fc1.weight" not in weights:
        raise GenError("this is not a DiT: blocks.0.mlp.fc1.weight is missing; give an official DiT file")
    if heads is None and width not in _HEAD_WIDTH:
        raise GenError(f"DiT width {width} is not a published size; give its number of attention heads (option heads)")
    return DiTConfig(
        **sizes,
        heads=heads if heads is not None else width // _HEAD_WIDTH[width],
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
    )


def dimensions(weights: Arrays, null_class: bool = True, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Gives the fields of a `DiTConfig`, or a relative's, that shapes tell. Raises GenError where they do not."""
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens = weights["pos_embed"].shape[1]
        table = weights.get("y_embedder.embedding_table.weight")
        rows = int(null_class) if table is None else table.shape[0]
        outputs = weights["final_layer.linear.weight"].shape[0] // patch**2
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise GenError(f"this is not a DiT: {error} is missing or misshaped; give an official DiT file") from None
    side = math.isqrt(tokens) * patch
    size = (side, side) if size is None else size
    if size[0] * size[1] != tokens * patch**2:
        raise GenError(
            f"this DiT has {tokens} patches of {patch}x{patch}, which are not latents of {size[0]}x{size[1]}; "
            "say their sides, such as --network.size '[32,64]'"
        )
    return {
        "size": size,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth_of(weights, "blocks.{i}.attn.qkv.weight"),
        "num_classes": rows - null_class,
        "null_class": null_class and table is not None,
        "learned_variance": outputs == 2 * channels,
    }


def generator(config: DiTConfig, steps: int = 250, guidance: Any = None) -> DiffusionGenerator:
    """Gives the official sampler: ancestral, learned variance, respaced to `steps`; latents of the SD-VAE (times
    0.18215).

    Args:
      guidance: none by default; ``ClassifierFree(1.5, channels=3)`` reproduces the published tables, which guide
        only the first three channels.
    """
    parameterization = Predict("eps", clock="index", learned_variance=config.learned_variance)
    loss = DDPMLoss(variance="learned" if config.learned_variance else "large")
    denoiser = Denoiser(config, DDPM("linear", 1000), parameterization, loss)
    solver = Ancestral("learned" if config.learned_variance else "large")
    sampler = Sampler(solver, Respaced(), steps) if guidance is None else Sampler(solver, Respaced(), steps, guidance)
    return DiffusionGenerator(denoiser, sampler)


IMPORTER = Importer(
    name="dit",
    signature=("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.bias", "pos_embed"),
    config=config,
    rules=rules,
    generator=generator,
    normalizer=SCALED,
    alike=("sit",),
)
