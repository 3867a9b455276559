"""l-DeTok weights under the names of the authors' release (Jiawei-Yang/DeTok)."""

import math

from gen.errors import GenError
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
from gen.tokenizers.detok import SIZES, DeTokConfig
from gen.tokenizers.trunk import Tower

__all__ = ["IMPORTER", "rules"]

_UNBATCHED = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, N, D) <-> (N, D)
_PIXELS = Transform(lambda a: a[:, :, 0, 0].T, lambda a: (a.T[:, :, None, None],))  # a 1x1 convolution as a dense layer


def rules(config: DeTokConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    found: list[Rule | Computed] = [
        Rule("encoder.patch_embed.0.weight", "embed/kernel", patches(config.patch)),
        Rule("encoder.patch_embed.0.bias", "embed/bias"),
        *linear("encoder.latent_head", "to_code"),
        *linear("decoder.decoder_embed", "from_code"),
        Rule("decoder.mask_token", "mask_token"),
        Rule("decoder.ffn.1.weight", "head/kernel", _PIXELS),
        Rule("decoder.ffn.1.bias", "head/bias"),
        *convolution("decoder.conv_out", "conv_out"),
    ]
    for side in ("encoder", "decoder"):
        block, ours = f"{side}.transformer.{{i}}", f"{side}/trunk/blocks"
        found += [
            Rule(f"{side}.positional_embedding", f"{side}/positions", _UNBATCHED),
            Rule(f"{side}.ln_pre.weight", f"{side}/pre/scale"),
            Rule(f"{side}.ln_post.weight", f"{side}/trunk/norm/scale"),
            Rule(f"{block}.norm1.weight", f"{ours}/norm1/scale"),
            Rule(f"{block}.norm2.weight", f"{ours}/norm2/scale"),
            *linear(f"{block}.attn.qkv", f"{ours}/attn/qkv"),
            *linear(f"{block}.attn.proj", f"{ours}/attn/proj"),
            *linear(f"{block}.mlp.w12", f"{ours}/mlp/fc1"),
            *linear(f"{block}.mlp.w3", f"{ours}/mlp/fc2"),
        ]
    return found


def config(weights: Arrays, *, heads: int | None = None, decoder_heads: int | None = None) -> DeTokConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads, decoder_heads: attention heads; by default those of the published sizes, or heads of 64 channels.

    Raises GenError when a needed array is missing or not shaped as in an l-DeTok.
    """
    try:
        _, colours, patch, _ = weights["encoder.patch_embed.0.weight"].shape
        tokens = weights["encoder.positional_embedding"].shape[1]
        channels = weights["decoder.decoder_embed.weight"].shape[1]
        widths = [weights[f"{side}.positional_embedding"].shape[2] for side in ("encoder", "decoder")]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not an l-DeTok: {error} is missing or misshaped; give a file of the release") from None
    published = {tower.width: tower.heads for tower in SIZES.values()}
    towers = [
        Tower(
            width,
            depth_of(weights, f"{side}.transformer.{{i}}.norm1.weight"),
            published.get(width, max(width // 64, 1)) if given is None else given,
        )
        for side, width, given in zip(("encoder", "decoder"), widths, (heads, decoder_heads), strict=True)
    ]
    side = math.isqrt(tokens) * patch
    return DeTokConfig((side, side, colours), patch, channels, towers[0], towers[1])


IMPORTER = Importer(
    name="detok",
    signature=("encoder.latent_head.weight", "encoder.ln_pre.weight", "decoder.decoder_embed.weight"),
    config=config,
    rules=rules,
    generator=None,
    role="tokenizer",
)
