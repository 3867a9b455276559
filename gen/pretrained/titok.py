"""TiTok and TA-TiTok weights (Yu et al. 2024, Kim et al. 2025): two-stage and single-stage, codebook and posterior."""

import math

import numpy as np

from gen.errors import GenError
from gen.pretrained import maskgit
from gen.pretrained.rules import LINEAR, Arrays, Importer, Rule, Rules, Transform, convolution, depth_of, linear
from gen.pretrained.rules import patches as patch_convolution
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import TiTokConfig, Tower

__all__ = ["IMPORTER", "config", "rules"]

_HEAD = 64  # width of an attention head in all published networks

# a 1x1 convolution (O, I, 1, 1) as our dense layer (I, O)
_POINT = Transform(lambda a: a[:, :, 0, 0].T, lambda a: (a.T[:, :, None, None],))
# the official codebook is the sum of what the optimiser and what the restarts made of ours
_SUM = Transform(lambda a: (a, np.zeros_like(a)), lambda a, b: (a + b,))
_ROW = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, 1, W) <-> (1, W)


def rules(config: TiTokConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    rows = [Rule("latent_tokens", "latent_tokens")]
    rows.append(Rule("encoder.patch_embed.weight", "patch_embed/kernel", patch_convolution(config.patch)))
    rows.append(Rule("encoder.patch_embed.bias", "patch_embed/bias"))
    for tower in ("encoder", "decoder"):
        rows += _trunk(tower)
    rows += _point("encoder.conv_out", "encoder_out")
    rows += [*linear("decoder.decoder_embed", "decoder_embed"), Rule("decoder.mask_token", "mask_token", _ROW)]
    if config.text is not None:
        rows += linear("decoder.text_guidance_proj", "text_embed")
        rows.append(Rule("decoder.text_guidance_positional_embedding", "text_positions"))
    if config.quantizer is not None:
        rows += _codebook(config.quantizer)
    if config.pixels is None:
        return [*rows, *_point("decoder.ffn.0", "head"), *convolution("decoder.conv_out", "conv_out")]
    rows += [*_point("decoder.ffn.0", "head/fc1"), *_point("decoder.ffn.2", "head/fc2")]
    rows.append(Rule("pixel_quantize.embedding.weight", "pixel_codes"))
    return rows + maskgit.decoder_rules(config.pixels, "pixel_decoder", "pixel_decoder")


def _codebook(quantizer: VQ) -> list[Rule]:
    name, ours = "quantize.embedding.weight", "quantizer/embedding"
    if quantizer.averages or quantizer.restart == "random":
        raise GenError("official TiTok trains its codebook by gradient and restarts codes on the closest vectors only")
    if quantizer.restart == "none":
        return [Rule(name, ours)]
    return [Rule(name, (ours, "quantizer/offset"), _SUM), Rule("quantize.embed_prob", "quantizer/usage")]


def _trunk(tower: str) -> list[Rule]:
    names = {
        "class_embedding": "class_embedding",
        "positional_embedding": "positions",
        "latent_token_positional_embedding": "latent_positions",
    }
    rows = [Rule(f"{tower}.{official}", f"{tower}/{ours}") for official, ours in names.items()]
    for norm in ("ln_pre", "ln_post"):
        rows += _norm(f"{tower}.{norm}", f"{tower}/{norm}")
    block, ours = f"{tower}.transformer.{{i}}", f"{tower}/blocks"
    for norm in ("ln_1", "ln_2"):
        rows += _norm(f"{block}.{norm}", f"{ours}/{norm}")
    rows.append(Rule(f"{block}.attn.in_proj_weight", f"{ours}/attn/qkv/kernel", LINEAR))
    rows.append(Rule(f"{block}.attn.in_proj_bias", f"{ours}/attn/qkv/bias"))
    rows += linear(f"{block}.attn.out_proj", f"{ours}/attn/proj")
    return [*rows, *linear(f"{block}.mlp.c_fc", f"{ours}/mlp/fc1"), *linear(f"{block}.mlp.c_proj", f"{ours}/mlp/fc2")]


def _norm(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def _point(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/kernel", _POINT), Rule(f"{official}.bias", f"{ours}/bias")]


def config(
    weights: Arrays,
    *,
    encoder_heads: int = 0,
    decoder_heads: int = 0,
    normalize: bool | None = None,
    groups: int = 32,
) -> TiTokConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      encoder_heads, decoder_heads: of the towers; 0 for heads of 64 channels, as in all published networks.
      normalize: whether codes have length 1; shapes do not tell. By default they do in the two-stage TiTok alone, as
        published.
      groups: of the pixel decoder's group norms; 32 as published.

    Raises GenError when a needed array is missing or not shaped as in a TiTok.
    """
    try:
        width, channels, patch, _ = weights["encoder.patch_embed.weight"].shape
        rows, columns = (len(weights[f"{tower}.positional_embedding"]) - 1 for tower in ("encoder", "decoder"))
        side, painted = math.isqrt(rows) * patch, math.isqrt(columns)
        tokens, latent = len(weights["latent_tokens"]), weights["decoder.decoder_embed.weight"].shape[1]
        inner = weights["decoder.decoder_embed.weight"].shape[0]
        quantised, two_stage = "quantize.embedding.weight" in weights, "decoder.ffn.2.weight" in weights
        quantizer = None
        if quantised:
            codes, code_width = weights["quantize.embedding.weight"].shape
            quantizer = VQ(
                codes,
                code_width,
                normalize=two_stage if normalize is None else normalize,
                restart="closest" if "quantize.embed_prob" in weights else "none",
            )
        text = None
        if "decoder.text_guidance_proj.weight" in weights:
            positions = weights["decoder.text_guidance_positional_embedding"]
            text = (len(positions), weights["decoder.text_guidance_proj.weight"].shape[1])
        decoder_patch = side // painted
        pixels = _pixels(weights, side, groups) if two_stage else None
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise GenError(f"this is no TiTok: {error} is missing or misshaped; give an official file") from None
    return TiTokConfig(
        image=(side, side, channels),
        patch=patch,
        tokens=tokens,
        channels=None if quantised else latent,
        encoder=_tower(weights, "encoder", width, encoder_heads),
        decoder=_tower(weights, "decoder", inner, decoder_heads),
        quantizer=quantizer,
        decoder_patch=None if decoder_patch == patch else decoder_patch,
        text=text,
        pixels=pixels,
        init="normal",
    )


def _pixels(weights: Arrays, side: int, groups: int) -> MaskGITVQGANConfig:
    """The 2D tokenizer behind the second stage."""
    if "pixel_quantize.embedding.weight" not in weights:
        raise GenError(
            "this is a TiTok after its first stage: it names codes of MaskGIT's VQGAN and has no decoder of pixels; "
            "give the file of the second stage"
        )
    levels = depth_of(weights, "pixel_decoder.up.{i}.block.0.conv1.weight")
    widths = [len(weights[f"pixel_decoder.up.{i}.block.0.conv1.weight"]) for i in range(levels)]
    width = math.gcd(*widths)
    return MaskGITVQGANConfig(
        image=(side, side, len(weights["pixel_decoder.conv_out.weight"])),
        width=width,
        mult=tuple(w // width for w in widths),
        blocks=depth_of(weights, "pixel_decoder.mid.{i}.conv1.weight"),
        quantizer=VQ(*weights["pixel_quantize.embedding.weight"].shape),
        groups=groups,
    )


def _tower(weights: Arrays, name: str, width: int, heads: int) -> Tower:
    depth = depth_of(weights, f"{name}.transformer.{{i}}.ln_1.weight")
    return Tower(width, depth, heads or max(width // _HEAD, 1))


IMPORTER = Importer(
    "titok",
    ("latent_tokens", "encoder.latent_token_positional_embedding", "decoder.mask_token"),
    config,
    rules,
    None,
    role="tokenizer",
)
