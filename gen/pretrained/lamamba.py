"""Official LaMamba-Diff weights (yunxiangfu2001/LaMamba-Diff): names, shapes and the official sampler."""

import math
from typing import Any, Literal, cast

from gen.diffusion.backbones.lamamba import STAGES, LaMambaConfig, relative_index, window_mask
from gen.errors import GenError
from gen.nn.mamba import Order
from gen.pretrained import dit
from gen.pretrained.mamba import scan2d_rules
from gen.pretrained.rules import (
    Arrays,
    Computed,
    Importer,
    Rule,
    Rules,
    Transform,
    convolution,
    depth_of,
    linear,
    patches,
)
from gen.pretrained.sdvae import SCALED
from gen.sampling.generator import DiffusionGenerator

__all__ = ["IMPORTER", "block_rules", "config", "generator", "rules"]

_FIRST = Transform(lambda a: a[0], lambda a: (a[None],))  # without the axis of length one


def _norm(official: str, ours: str) -> Rules:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def block_rules(official: str, ours: str, *, projected: bool, conv_bias: bool, conv: int = 3) -> Rules:
    """Gives the table of a block without its buffers; the prefixes end in "." and "/"."""
    return [
        *(linear(f"{official}condition_projection", f"{ours}cond") if projected else []),
        *linear(f"{official}adaLN_modulation.1", f"{ours}ada"),
        *_norm(f"{official}norm", f"{ours}norm1"),
        *_norm(f"{official}norm_swin", f"{ours}norm2"),
        *_norm(f"{official}norm2", f"{ours}norm3"),
        *scan2d_rules(f"{official}op.", f"{ours}scan/", conv_bias, conv),
        *linear(f"{official}attn.qkv", f"{ours}attn/qkv"),
        *linear(f"{official}attn.proj", f"{ours}attn/proj"),
        Rule(f"{official}attn.relative_position_bias_table", f"{ours}attn/bias"),
        *linear(f"{official}mlp.fc1", f"{ours}mlp/fc1"),
        *linear(f"{official}mlp.fc2", f"{ours}mlp/fc2"),
    ]


def buffers(official: str, grid: tuple[int, int], window: int, shift: int) -> Rules:
    """Gives what a block's file holds and we compute: index of the bias table, and the mask of shifted windows."""
    sides = (min(window, grid[0]), min(window, grid[1]))
    shifts = tuple(shift if n > window else 0 for n in grid)
    found: list[Rule | Computed] = [
        Computed(f"{official}attn.relative_position_index", relative_index(sides), optional=True)
    ]
    if any(shifts):
        mask = window_mask(grid, sides, (shifts[0], shifts[1]))
        found.append(Computed(f"{official}attn_mask", mask, optional=True))
    return found


def rules(config: LaMambaConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    depths = config.depths
    stages = [(f"layers.{i}", f"down_{i}", i, depths[i], i < 2) for i in range(STAGES)]
    stages.append(("mid_layer", "middle", STAGES - 1, config.middle, False))
    for i in range(STAGES):
        stage = STAGES - 1 - i
        stages.append((f"layers_up.{i}", f"up_{i}", stage, depths[stage] + config.extra, True))
    table: list[Rule | Computed] = [
        Rule("pos_embed", "positions", _FIRST),
        *linear("t_embedder.mlp.0", "time/fc1"),
        *linear("t_embedder.mlp.2", "time/fc2"),
        Rule("y_embedder.embedding_table.weight", "label/embedding"),
        Rule("patch_embed.proj.weight", "patch/kernel", patches(config.patch)),
        Rule("patch_embed.proj.bias", "patch/bias"),
        *_norm("patch_embed.norm", "patch_norm"),
        *_norm("final_up.norm", "final_expand/norm"),
        *linear("final_up.expand", "final_expand/expand", bias=False),
        *linear("final_condition_projection", "final_cond"),
        *linear("final_adaLN_modulation.1", "final_ada"),
        *linear("final_linear", "final"),
    ]
    for official, ours, stage, depth, projected in stages:
        prefix = f"{official}.blocks."
        bias, side = config.conv_bias, config.conv
        table += block_rules(f"{prefix}{{i}}.", f"{ours}/", projected=projected, conv_bias=bias, conv=side)
        for j in range(depth):
            shift = config.window // 2 if j % 2 else 0
            table += buffers(f"{prefix}{j}.", config.grids[stage], config.window, shift)
    for i in (0, 1):
        table += _merging(config.merging, f"layers.{i}.downsample", f"merge_{i}")
    for i in (2, 3):
        table += linear(f"layers_up.{i}.upsample.expand", f"expand_{i}/expand", bias=False)
        table += _norm(f"layers_up.{i}.upsample.norm", f"expand_{i}/norm")
    return table


def _merging(kind: str, official: str, ours: str) -> Rules:
    if kind == "neighbours":
        reduce = linear(f"{official}.reduction", f"{ours}/reduce", bias=False)
        return [*reduce, *_norm(f"{official}.norm", f"{ours}/norm")]
    if kind == "conv3":
        reduce = convolution(f"{official}.1", f"{ours}/reduce")
    else:
        reduce = [
            Rule(f"{official}.1.weight", f"{ours}/reduce/kernel", patches(2)),
            Rule(f"{official}.1.bias", f"{ours}/reduce/bias"),
        ]
    return [*reduce, *_norm(f"{official}.3", f"{ours}/norm")]


def config(weights: Arrays, *, order: Order = "snake") -> LaMambaConfig:
    """Gives the configuration of a state dict, from its shapes.

    Args:
      order: directions of the scans, which shapes do not tell.

    Raises GenError when a needed array is missing or not shaped as in a LaMamba.
    """
    if any(".skip_conv." in name for name in weights):
        raise GenError(
            "this LaMamba joins its skips by a convolution (skip_concat), whose published code mixes up pixels and "
            "channels and normalises by batch; that variant is not supported: give one that adds its skips"
        )
    try:
        return _config(weights, order)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise GenError(f"this is not a LaMamba: {error} is missing or misshaped; give an official file") from None


def _config(weights: Arrays, order: Order) -> LaMambaConfig:
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    _, h, w, _ = weights["pos_embed"].shape
    first = "layers.0.blocks.0."
    # one rank for all stages, or the rule by their widths; sizes from ratios were rounded down, least in the widest
    ranks = [weights[f"layers.{i}.blocks.0.op.dt_projs_weight"].shape[2] for i in range(STAGES)]
    wide, widest = f"layers.{STAGES - 1}.blocks.0.", 4 * width
    table = weights[f"{first}attn.relative_position_bias_table"].shape[0]
    depths = [depth_of(weights, f"layers.{i}.blocks.{{i}}.norm.weight") for i in range(STAGES)]
    up = depth_of(weights, f"layers_up.{STAGES - 1}.blocks.{{i}}.norm.weight")
    heads = [weights[f"layers.{i}.blocks.0.attn.relative_position_bias_table"].shape[1] for i in range(STAGES)]
    return LaMambaConfig(
        size=(h * patch, w * patch),
        channels=channels,
        patch=patch,
        width=width,
        depths=cast(Any, tuple(depths)),
        middle=depth_of(weights, "mid_layer.blocks.{i}.norm.weight"),
        extra=up > depths[0],
        heads=cast(Any, tuple(heads)),
        window=(math.isqrt(table) + 1) // 2,
        order=order,
        state=weights[f"{first}op.A_logs"].shape[1],
        expand=_ratio(weights[f"{wide}op.x_proj_weight"].shape[2], widest),
        rank=ranks[0] if len(set(ranks)) == 1 and ranks[-1] != math.ceil(widest / 16) else None,
        conv=weights[f"{first}op.conv2d.weight"].shape[-1] if f"{first}op.conv2d.weight" in weights else 1,
        conv_bias=f"{first}op.conv2d.bias" in weights,
        mlp_ratio=_ratio(weights[f"{wide}mlp.fc1.weight"].shape[0], widest),
        merging=_merging_kind(weights),
        num_classes=weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        learned_variance=weights["final_linear.weight"].shape[0] == 2 * channels,
    )


def _ratio(size: int, width: int) -> float:
    """size / width, so that its product with the width, rounded down, is the size again."""
    ratio = size / width
    return ratio if int(ratio * width) == size else math.nextafter(ratio, math.inf)


def _merging_kind(weights: Arrays) -> Literal["neighbours", "conv2", "conv3"]:
    if "layers.0.downsample.reduction.weight" in weights:
        return "neighbours"
    return "conv2" if weights["layers.0.downsample.1.weight"].shape[-1] == 2 else "conv3"


def generator(config: LaMambaConfig, steps: int = 250, guidance: Any = None) -> DiffusionGenerator:
    """Gives the official sampler, DiT's: ancestral, learned variance, respaced to `steps`; latents of the SD-VAE (times
    0.18215).

    Args:
      guidance: none by default; the published code guides all channels: ``ClassifierFree(1.5)``.
    """
    return dit.generator(cast(Any, config), steps, guidance)


IMPORTER = Importer(
    name="lamamba",
    signature=("patch_embed.proj.weight", "mid_layer.blocks.0.op.A_logs", "final_condition_projection.weight"),
    config=config,
    rules=rules,
    generator=generator,
    normalizer=SCALED,
)
