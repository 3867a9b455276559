"""Instella-T2I's binary tokenizer and its two generators under the names of their files."""

from typing import Any

from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler
from gen.autoregressive.bits import BitSampler
from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.instella import InstellaDiffusionConfig, InstellaNetwork
from gen.autoregressive.instella_ar import InstellaARConfig
from gen.errors import GenError
from gen.pretrained.rules import (
    LINEAR,
    Arrays,
    Importer,
    Rule,
    Rules,
    Transform,
    convolution,
    depth_of,
    joined,
    linear,
    patches,
)
from gen.pretrained.towers import norm
from gen.tokenizers.instella import InstellaConfig
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.trunk import Tower

__all__ = [
    "AR_IMPORTER",
    "DIFFUSION_IMPORTER",
    "TOKENIZER_IMPORTER",
    "ar_config",
    "ar_generator",
    "ar_rules",
    "config",
    "diffusion_config",
    "diffusion_generator",
    "diffusion_rules",
    "rules",
]

_ROWS = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, K, D) <-> (K, D)
_ROW = Transform(lambda a: a[0, 0], lambda a: (a[None, None],))  # (1, 1, D) <-> (D,)


def rules(config: InstellaConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    rows = [
        Rule("encoder.patch_embedder.weight", "encoder/patch_embed/kernel", patches(config.patch)),
        Rule("encoder.patch_embedder.bias", "encoder/patch_embed/bias"),
        Rule("encoder.latent_tokens", "encoder/latent_tokens", _ROWS),
        *_trunk("encoder", "down_layers", config.halve_after),
        Rule("encoder.norm_out.weight", "encoder/norm_out/scale"),
        *linear("encoder.proj_out", "encoder/proj_out"),
        *linear("quantizer.proj.0", "to_bits"),
        Rule("quantizer.embed", "embedding"),
        Rule("decoder.input_layer.0.weight", "decoder/norm_in/scale"),
        *linear("decoder.input_layer.1", "decoder/proj_in"),
        Rule("decoder.mask_tokens", "decoder/mask_token", _ROW),
        *_trunk("decoder", "up_layers", config.double_after),
        Rule("decoder.norm_out.weight", "decoder/norm_out/scale"),
        *linear("to_pixel", "to_pixel"),
    ]
    if config.aligned_width:
        rows += linear("decoder.repa_proj.0", "decoder/align_in")
        rows += norm("decoder.repa_proj.1", "decoder/align_norm")
        rows += linear("decoder.repa_proj.3", "decoder/align_out")
    return rows


def _trunk(side: str, resizes: str, after: tuple[int, ...]) -> list[Rule]:
    official, ours = f"{side}.transformer_blocks.{{i}}.", f"{side}/trunk/blocks/"
    rows = [
        Rule(f"{official}input_layernorm.weight", f"{ours}norm1/scale"),
        Rule(f"{official}post_attention_layernorm.weight", f"{ours}norm2/scale"),
        Rule(tuple(f"{official}attn.{n}_proj.weight" for n in "qkv"), f"{ours}attn/qkv/kernel", joined(3)),
        Rule(f"{official}attn.o_proj.weight", f"{ours}attn/proj/kernel", LINEAR),
        Rule(f"{official}attn.norm_q.weight", f"{ours}attn/q_norm/scale"),
        Rule(f"{official}attn.norm_k.weight", f"{ours}attn/k_norm/scale"),
        Rule(tuple(f"{official}mlp.{n}_proj.weight" for n in ("gate", "up")), f"{ours}mlp/fc1/kernel", joined(2)),
        Rule(f"{official}mlp.down_proj.weight", f"{ours}mlp/fc2/kernel", LINEAR),
    ]
    for number, i in enumerate(after):
        rows += convolution(f"{side}.{resizes}.{number}.conv", f"{side}/trunk/resize/after{i}/conv")
    return rows


def config(
    weights: Arrays,
    *,
    size: int = 512,
    span: int | None = 1024,
    axes: tuple[int, int, int] = (8, 28, 28),
    halve_after: tuple[int, ...] = (7,),
    double_after: tuple[int, ...] = (7,),
    aligned_after: int = 0,
    temperature: float = 0.1,
) -> InstellaConfig:
    """Gives the configuration of a state dict, from its names and shapes; shapes do not tell the options.

    Args:
      size: height and width of the images it is to be used on.
      span, axes, halve_after, double_after, aligned_after: see `gen.tokenizers.instella.InstellaConfig`.
      temperature: of the draws of bits in training.

    Raises GenError when a needed array is missing or not shaped as in this tokenizer.
    """
    try:
        width, channels, patch, _ = weights["encoder.patch_embedder.weight"].shape
        tokens = weights["encoder.latent_tokens"].shape[1]
        decoder_width = weights["to_pixel.weight"].shape[1]
        bits = weights["quantizer.embed"].shape[0]
        head = weights["encoder.transformer_blocks.0.attn.norm_q.weight"].shape[0]
        aligned = weights["decoder.repa_proj.3.weight"].shape[0] if "decoder.repa_proj.3.weight" in weights else 0
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not Instella's tokenizer: {error} is missing or misshaped; give its file") from None
    depths = [
        depth_of(weights, f"{side}.transformer_blocks.{{i}}.attn.q_proj.weight") for side in ("encoder", "decoder")
    ]
    return InstellaConfig(
        image=(size, size, channels),
        patch=patch,
        tokens=tokens,
        encoder=Tower(width, depths[0], width // head),
        decoder=Tower(decoder_width, depths[1], decoder_width // head),
        halve_after=halve_after,
        double_after=double_after,
        axes=axes,
        span=span,
        quantizer=Binary(bits, temperature=temperature),
        aligned_width=aligned,
        aligned_after=aligned_after,
    )


TOKENIZER_IMPORTER = Importer(
    "instella-tokenizer",
    ("encoder.latent_tokens", "encoder.patch_embedder.weight", "decoder.mask_tokens", "quantizer.proj.0.weight"),
    config,
    rules,
    None,
    role="tokenizer",
)


def _generator_rules(network: InstellaNetwork) -> list[Rule]:
    """What both generators have alike."""
    block, ours = "transformer_blocks.{i}.", "blocks/"
    if network.text is None:
        raise GenError("Instella's files hold models of captions; a model of classes has no place in them")
    return [
        *linear("x_embedder", "enter"),
        *linear("proj_out", "head"),
        Rule(f"{block}pos_emb", f"{ours}positions", _ROWS),
        Rule(tuple(f"{block}attn.{n}_proj.weight" for n in "qkv"), f"{ours}attn/qkv/kernel", joined(3)),
        Rule(f"{block}attn.o_proj.weight", f"{ours}attn/proj/kernel", LINEAR),
        Rule(f"{block}attn.norm_q.weight", f"{ours}attn/q_norm/scale"),
        Rule(f"{block}attn.norm_k.weight", f"{ours}attn/k_norm/scale"),
        *linear(f"{block}proj_cond", f"{ours}attn/text"),
    ]


def diffusion_rules(config: BinaryDiffusion) -> Rules:
    """Gives the table of official names of the diffusion model."""
    return [
        *_generator_rules(config.backbone),
        *linear("time_embed.linear_1", "time1"),
        *linear("time_embed.linear_2", "time2"),
        *linear("transformer_blocks.{i}.norm1.linear", "blocks/modulation"),
        *linear("transformer_blocks.{i}.ff.net.0.proj", "blocks/mlp/fc1"),
        *linear("transformer_blocks.{i}.ff.net.2", "blocks/mlp/fc2"),
        *linear("norm_out.linear", "head_modulation"),
    ]


def ar_rules(config: InstellaARConfig) -> Rules:
    """Gives the table of official names of the autoregressive model."""
    return [
        *_generator_rules(config),
        Rule("split_token", "start", _ROW),
        *linear("transformer_blocks.{i}.mlp.net.0.proj", "blocks/mlp/fc1"),
        *linear("transformer_blocks.{i}.mlp.net.2", "blocks/mlp/fc2"),
        Rule("transformer_blocks.{i}.input_layernorm.weight", "blocks/norm1/scale"),
        Rule("transformer_blocks.{i}.post_attention_layernorm.weight", "blocks/norm2/scale"),
        Rule("norm_out.weight", "norm/scale"),
    ]


def _sizes(weights: Arrays, text_tokens: int, extra: int) -> dict[str, Any]:
    """Fields of an `InstellaNetwork`; `extra` positions of a file stand for no token of an image."""
    try:
        width, bits = weights["x_embedder.weight"].shape
        tokens = weights["transformer_blocks.0.pos_emb"].shape[1] - extra
        head = weights["transformer_blocks.0.attn.norm_q.weight"].shape[0]
        text = weights["transformer_blocks.0.proj_cond.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is no generator of Instella: {error} is missing or misshaped; give its file") from None
    depth = depth_of(weights, "transformer_blocks.{i}.pos_emb")
    sizes = {"shape": (tokens, bits), "width": width, "depth": depth, "heads": width // head}
    return {**sizes, "text": (text_tokens, text)}


def diffusion_config(weights: Arrays, *, text_tokens: int = 128, flips: bool = True) -> BinaryDiffusion:
    """Gives the diffusion model of a state dict, from its names and shapes.

    Args:
      text_tokens: length of the captions, which shapes do not tell.
      flips: whether the network says which bits were flipped (the "epsilon" target).

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    network = InstellaDiffusionConfig(**_sizes(weights, text_tokens, 0))
    return BinaryDiffusion(network, target="flip" if flips else "bits", times="logit-normal")


def ar_config(weights: Arrays, *, text_tokens: int = 128) -> InstellaARConfig:
    """Gives the autoregressive model of a state dict, from its names and shapes.

    Args:
      text_tokens: length of the captions, which shapes do not tell.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    return InstellaARConfig(**_sizes(weights, text_tokens, 1))


def diffusion_generator(config: BinaryDiffusion) -> TokenGenerator:
    """Gives the official sampler: 20 steps with fresh noise, guidance 7.5 counted from 0."""
    return TokenGenerator(config, BinarySampler(rule="renoise", guidance=8.5))


def ar_generator(config: InstellaARConfig) -> TokenGenerator:
    """Gives the official sampler: temperature 0.5, guidance 9 counted from 0."""
    return TokenGenerator(config, BitSampler(ConstantScale(10.0), temperature=0.5))


_SIGNATURE = ("x_embedder.weight", "transformer_blocks.0.pos_emb", "transformer_blocks.0.proj_cond.weight")
DIFFUSION_IMPORTER = Importer(
    "instella-diffusion",
    (*_SIGNATURE, "transformer_blocks.0.norm1.linear.weight"),
    diffusion_config,
    diffusion_rules,
    diffusion_generator,
)
# the embedding of a time is in the file and never used
AR_IMPORTER = Importer(
    "instella-ar", (*_SIGNATURE, "split_token"), ar_config, ar_rules, ar_generator, ("time_embed.*",)
)
