"""The transformers of binary latent diffusion under the names of their files."""

import math

from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler
from gen.autoregressive.binary_transformer import BinaryTransformerConfig
from gen.autoregressive.generator import TokenGenerator
from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, Transform, depth_of, linear
from gen.pretrained.towers import norm

__all__ = ["IMPORTER", "config", "generator", "rules"]

_FIRST = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, N, D) <-> (N, D)
_VECTOR = Transform(lambda a: a[0, 0], lambda a: (a[None, None],))  # (1, 1, D) <-> (D,)


def rules(config: BinaryDiffusion) -> Rules:
    """Gives the table of official names for a configuration."""
    network: BinaryTransformerConfig = config.backbone
    rows = [
        Rule("tok_emb.weight", "bits"),
        Rule("pos_emb", "positions", _FIRST),
        *linear("time_step_embedding.l0", "time1"),
        *linear("time_step_embedding.linear", "time2"),
        *norm("blocks.{i}.ln1", "blocks/norm1"),
        *linear("blocks.{i}.attn.qkv", "blocks/attn/qkv"),
        *linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        Rule("blocks.{i}.gamma_1", "blocks/scale1"),
        *norm("blocks.{i}.ln2", "blocks/norm2"),
        *linear("blocks.{i}.mlp.0", "blocks/mlp/fc1"),
        *linear("blocks.{i}.mlp.2", "blocks/mlp/fc2"),
        Rule("blocks.{i}.gamma_2", "blocks/scale2"),
        *norm("ln_f", "norm"),
        *linear("head", "head"),
    ]
    if network.num_classes:
        rows.append(Rule("cls_embedding.weight", "label/embedding"))
    if network.text is not None:
        rows += norm("blocks.{i}.ln1_5", "blocks/cross_norm")
        rows += linear("blocks.{i}.cross.query", "blocks/query")
        rows += linear("blocks.{i}.cross.kv", "blocks/kv")
        rows += linear("blocks.{i}.cross.proj", "blocks/cross_proj")
        rows.append(Rule("blocks.{i}.cross.null_emb", "blocks/null_text", _VECTOR))
        rows.append(Rule("blocks.{i}.gamma_1_5", "blocks/cross_scale"))
    return rows


def config(
    weights: Arrays, *, heads: int | None = None, levels: int = 64, text_tokens: int = 120, flips: bool = True
) -> BinaryDiffusion:
    """Gives the model of a state dict, from its names and shapes.

    Args:
      heads: attention heads; by default one for 64 channels, as published.
      levels: of the noise; 64 in the published runs, 256 by default in their code.
      text_tokens: length of the captions that a network with cross-attention is used on.
      flips: whether the network says which bits were flipped (p_flip), as all published ones do.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        bits, width = weights["tok_emb.weight"].shape
        positions = weights["pos_emb"].shape[1]
        key = "blocks.0.cross.kv.weight"
        text = (text_tokens, weights[key].shape[1]) if key in weights else None
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is no binary latent diffusion: {error} is missing or misshaped; give its file") from None
    side = math.isqrt(positions)
    if side**2 != positions:
        raise GenError(f"the file has {positions} positions, which are no square grid; give an official file")
    network = BinaryTransformerConfig(
        shape=(side, side, bits),
        width=width,
        depth=depth_of(weights, "blocks.{i}.attn.qkv.weight"),
        heads=heads or max(width // 64, 1),
        num_classes=len(weights["cls_embedding.weight"]) if "cls_embedding.weight" in weights else 0,
        text=text,
    )
    return BinaryDiffusion(network, levels=levels, target="flip" if flips else "bits", gamma=0.0)


def generator(config: BinaryDiffusion) -> TokenGenerator:
    """Gives the official sampler: every level, temperature 0.9 (LSUN churches, 64 levels)."""
    return TokenGenerator(config, BinarySampler(steps=config.levels or 64, temperature=0.9))


IMPORTER = Importer(
    "binary-diffusion",
    ("tok_emb.weight", "pos_emb", "time_step_embedding.l0.weight", "blocks.0.gamma_1", "ln_f.weight"),
    config,
    rules,
    generator,
)
