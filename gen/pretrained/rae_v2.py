"""RAEv2's diffusion transformer under its official names, with the published sampler."""

import math
from typing import Any

from gen.diffusion.backbones.rae_v2 import RAEv2Config, rotation
from gen.diffusion.clamped import Clamped, ClampedMatching, EarlyHead
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.pretrained.rules import SAME, Arrays, Computed, Importer, Rule, Rules, joined, linear, patches
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import Interval
from gen.sampling.internal_guidance import Internal
from gen.sampling.solvers import Euler

__all__ = ["IMPORTER", "config", "denoiser", "generator", "rules", "shift_of"]

_SIDE_BY_SIDE = {count: joined(count, SAME) for count in (2, 3)}


def rules(config: RAEv2Config) -> Rules:
    """Gives the table of official names for a configuration."""
    further = config.time_tokens + config.class_tokens
    trunk = rotation(config.size, config.width // config.heads, further)
    head = rotation(config.size, config.head_width // config.head_heads, 0)
    rows: list[Rule | Computed] = [
        Rule("s_embedder.proj.weight", "enter/kernel", patches(1)),
        Rule("s_embedder.proj.bias", "enter/bias"),
        Rule("x_embedder.proj.weight", "enter_head/kernel", patches(1)),
        Rule("x_embedder.proj.bias", "enter_head/bias"),
        Rule("t_embedder.W", "time/frequencies"),
        Rule("t_embedder.learnable_tokens", "time_tokens"),
        *linear("t_embedder.mlp.0", "time/fc1"),
        *linear("t_embedder.mlp.2", "time/fc2"),
        Rule("ctx_embedder.learnable_tokens", "class_tokens"),
        Rule("ctx_embedder.embedding_table.weight", "label/embedding", SAME),
        *_block("blocks.{i}", "blocks"),
        *(Computed(f"enc_rope.freqs_{name}", table) for name, table in zip(("cos", "sin"), trunk, strict=True)),
        *(Computed(f"dec_rope.freqs_{name}", table) for name, table in zip(("cos", "sin"), head, strict=True)),
    ]
    for i in range(config.head_depth):
        official, ours = f"blocks.{config.depth + i}", f"head/block_{i}"
        rows += [*_block(official, ours), *linear(f"{official}.adaln_modulation.1", f"{ours}/ada")]
    for official, ours in (("final_layer", "final"), ("base_final_layer", "early")):
        rows += [
            Rule(f"{official}.norm.weight", f"{ours}/norm/scale"),
            *linear(f"{official}.linear", f"{ours}/out"),
            *linear(f"{official}.adaln_modulation.1", f"{ours}/ada"),
        ]
    if config.width != config.head_width:
        rows += linear("s_projector", "to_head")
    return rows


def _block(official: str, ours: str) -> Rules:
    def together(names: tuple[str, ...], layer: str) -> list[Rule]:
        weights, biases = ((*(f"{official}.{name}.{part}" for name in names),) for part in ("weight", "bias"))
        count = len(names)
        return [
            Rule(weights, f"{ours}/{layer}/kernel", joined(count)),
            Rule(biases, f"{ours}/{layer}/bias", _SIDE_BY_SIDE[count]),
        ]

    return [
        *(Rule(f"{official}.{norm}.weight", f"{ours}/{norm}/scale") for norm in ("norm1", "norm2")),
        *together(("attn.q", "attn.k", "attn.v"), "attn/qkv"),
        *linear(f"{official}.attn.proj", f"{ours}/attn/proj"),
        *(Rule(f"{official}.attn.{norm}.weight", f"{ours}/attn/{norm}/scale") for norm in ("q_norm", "k_norm")),
        *together(("mlp.w1", "mlp.w2"), "mlp/fc1"),
        *linear(f"{official}.mlp.w3", f"{ours}/mlp/fc2"),
    ]


def config(weights: Arrays, *, early: int = 8, size: tuple[int, int] | None = None) -> RAEv2Config:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      early: blocks of the trunk before the early head, which a file does not tell; 8 in the published models.
      size: (H, W) of the latents; square by default.

    Raises GenError where a needed array is missing or misshaped.
    """
    try:
        width, channels = weights["s_embedder.proj.weight"].shape[:2]
        head_width = weights["x_embedder.proj.weight"].shape[0]
        tokens, head_size = weights["dec_rope.freqs_cos"].shape
        names = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        depth = sum(f"blocks.{i}.adaln_modulation.1.weight" not in weights for i in names)
        hidden = weights["blocks.0.mlp.w1.weight"].shape[0]
        table = weights["ctx_embedder.embedding_table.weight"].shape[0]
        sizes = {key: weights[f"{key}_embedder.learnable_tokens"].shape[0] for key in ("t", "ctx")}
        heads = width // weights["enc_rope.freqs_cos"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a RAEv2: {error} is missing or misshaped; give an official file") from None
    side = math.isqrt(tokens)
    size = (side, side) if size is None else size
    if size[0] * size[1] != tokens:
        raise GenError(f"this RAEv2 has {tokens} tokens, which are not latents of {size[0]}x{size[1]}; say their sides")
    ratio = next((r for r in (4.0, 1.5 * (hidden + 0.5) / width) if int(2 / 3 * width * r) == hidden), 4.0)
    return RAEv2Config(
        size,
        channels,
        width,
        depth,
        heads,
        head_width,
        len(names) - depth,
        head_width // head_size,
        early,
        ratio,
        sizes["t"],
        sizes["ctx"],
        table - 1,
    )


def shift_of(config: RAEv2Config, base: int = 4096) -> float:
    """Gives the time shift of the latents' dimension: sqrt(H W C / base)."""
    return math.sqrt(config.size[0] * config.size[1] * config.channels / base)


def denoiser(
    config: RAEv2Config, shift: float, *, least: float = 0.05, weight: float = 1.0, times: TimeSampler | None = None
) -> Denoiser:
    """Gives the denoiser as it is trained: data predictions as clamped velocities, on the output and the early head."""
    law = times or TimeSampler("logit-normal", shift=shift)
    return Denoiser(config, Linear(), Clamped(least=least), EarlyHead(ClampedMatching(law), weight))


def generator(config: RAEv2Config, steps: int = 100, guidance: Any = None) -> DiffusionGenerator:
    """Gives the official sampler: Euler on shifted times, internal guidance of 1.78 from time 0.1 on.

    Args:
      guidance: another one, or None for the published.
    """
    shift = shift_of(config)
    published = Interval(Internal(1.78), 0.1, float("inf"))
    sampler = Sampler(Euler(), Uniform(shift=shift), steps, published if guidance is None else guidance)
    return DiffusionGenerator(denoiser(config, shift), sampler)


IMPORTER = Importer(
    name="rae-v2",
    signature=("ctx_embedder.learnable_tokens", "base_final_layer.linear.weight", "enc_rope.freqs_cos"),
    config=config,
    rules=rules,
    generator=generator,
)
