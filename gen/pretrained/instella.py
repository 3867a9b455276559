"""Instella-T2I's binary tokenizer under the names of its file."""

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

__all__ = ["TOKENIZER_IMPORTER", "config", "rules"]

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
