"""Official LightningDiT weights (hustvl/LightningDiT): names, shapes and the official sampler."""

import math
from typing import Any

import numpy as np

from gen.diffusion.backbones.lightningdit import LightningDiTConfig
from gen.diffusion.backbones.sit import parameterization
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import TimeSampler, VelocityMatching
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.nn.rotary import axial_rotation
from gen.pretrained.dit import dimensions, frame
from gen.pretrained.rules import Arrays, Computed, Importer, Rule, Rules, linear
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree, Interval
from gen.sampling.solvers import Euler

__all__ = ["IMPORTER", "config", "generator", "guidance", "rules"]

_HEAD_WIDTH = {768: 64, 1024: 64, 1152: 72, 1536: 64, 1792: 64}  # the published sizes


def rules(config: LightningDiTConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    mlp = ("w12", "w3") if config.swiglu else ("fc1", "fc2")
    table = [
        *frame(config),
        *(rule for name in mlp for rule in linear(f"blocks.{{i}}.mlp.{name}", f"blocks/mlp/{name}")),
    ]
    if config.rope:
        cos, sin = axial_rotation(config.grid, config.head_dim, spacing=config.spacing)
        table += [Computed("feat_rope.freqs_cos", cos), Computed("feat_rope.freqs_sin", sin)]
    if config.rmsnorm:
        table += [Rule(f"blocks.{{i}}.{name}.weight", f"blocks/{name}/scale") for name in ("norm1", "norm2")]
        table.append(Rule("final_layer.norm_final.weight", "norm_final/scale"))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            table.append(Rule(f"blocks.{{i}}.attn.{name}.weight", f"blocks/attn/{name}/scale"))
            if not config.rmsnorm:
                table.append(Rule(f"blocks.{{i}}.attn.{name}.bias", f"blocks/attn/{name}/bias"))
    return table


def config(
    weights: Arrays, *, heads: int | None = None, null_class: bool = True, size: tuple[int, int] | None = None
) -> LightningDiTConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads; needed for a width that was not published, unless the file has rotary tables or norms of
        q and k, which tell.
      null_class: whether the label table's last row is the null label.
      size: (H, W) of the latents, which a file does not tell; square by default.

    Raises GenError when a needed array is missing or misshaped, or the heads are not known.
    """
    sizes = dimensions(weights, null_class, size)
    width = sizes["width"]
    switches: dict[str, Any] = {
        "rmsnorm": "blocks.0.norm1.weight" in weights,
        "swiglu": "blocks.0.mlp.w12.weight" in weights,
        "rope": "feat_rope.freqs_cos" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
    }
    first = "blocks.0.mlp.w12.weight" if switches["swiglu"] else "blocks.0.mlp.fc1.weight"
    last = "blocks.0.adaLN_modulation.1.weight"
    for name in (first, last):
        if name not in weights:
            raise GenError(f"this is not a LightningDiT: {name} is missing; give an official file")
    return LightningDiTConfig(
        **sizes,
        **switches,
        heads=_heads(weights, width) if heads is None else heads,
        mlp_ratio=_mlp_ratio(weights[first].shape[0], width, switches["swiglu"]),
        shift=weights[last].shape[0] == 6 * width,
    )


def _heads(weights: Arrays, width: int) -> int:
    for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if name in weights:
            return width // int(weights[name].shape[-1])
    if width not in _HEAD_WIDTH:
        raise GenError(
            f"LightningDiT width {width} is not a published size; give its number of attention heads (heads)"
        )
    return width // _HEAD_WIDTH[width]


def _mlp_ratio(rows: int, width: int, swiglu: bool) -> float:
    """The ratio whose hidden size, rounded down twice, is that of the file: 4 where 4 does it."""
    if not swiglu:
        return rows / width
    hidden = rows // 2
    return 4.0 if hidden == int(2 / 3 * (4 * width)) else (math.ceil(1.5 * hidden) + 0.5) / width


def guidance(scale: float = 6.7, start: float = 0.125) -> Interval:
    """Gives the published guidance: the first three channels, where the official clock is at `start` or later.

    Args:
      scale, start: 6.7 and 0.125 for the model of 800 epochs, 10.0 and 0.10 for that of 64.
    """
    end = float(np.nextafter(np.float32(1.0 - start), np.float32(2.0)))  # the official comparison includes the end
    return Interval(ClassifierFree(scale, channels=3), 0.0, end)


def generator(config: LightningDiTConfig, steps: int = 249, guidance: Any = ClassifierFree()) -> DiffusionGenerator:
    """Gives the official sampler: Euler on 250 times shifted by 0.3 on the official clock; normalised VA-VAE latents.

    Args:
      guidance: none by default; `guidance` gives the published one.
    """
    loss = VelocityMatching(TimeSampler("logit-normal"), cosine=1.0)
    denoiser = Denoiser(config, Linear(), parameterization(config), loss)
    sampler = Sampler(Euler(), Uniform(shift=1 / 0.3), steps, guidance)
    return DiffusionGenerator(denoiser, sampler)


IMPORTER = Importer(
    name="lightningdit",
    signature=(
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "blocks.0.attn.qkv.bias",
        "pos_embed",
        "blocks.0.mlp.w12.weight",
        "feat_rope.freqs_cos",
    ),
    config=config,
    rules=rules,
    generator=generator,
)
