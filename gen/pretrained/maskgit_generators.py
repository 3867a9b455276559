"""MaskGIT generators of TiTok's tokens under the names of its files: BERT (L-32, B-64) and U-ViT (S-128)."""

from typing import Any

from gen.autoregressive.decoding import PowerCosineScale
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.maskgit import MaskGITConfig, MaskGITSkipConfig
from gen.autoregressive.unmasking import MaskedSampler, RampScale
from gen.errors import GenError
from gen.pretrained.rules import SAME, Arrays, Importer, Rule, Rules, Transform, depth_of, joined, linear
from gen.pretrained.towers import norm

__all__ = ["BERT", "SKIPS", "bert_config", "bert_rules", "skip_config", "skip_rules"]

HEADS = 16  # of both published networks
# a table with an axis of 1 in front, which ours lacks
_TABLE = Transform(lambda a: a[0], lambda a: (a[None],))


def bert_rules(config: MaskGITConfig) -> Rules:
    """Gives the table of official names for a BERT."""
    del config
    embeddings, layer = "model.embeddings", "model.encoder.layer.{i}"
    qkv = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    return [
        Rule(f"{embeddings}.word_embeddings.weight", "embedding/embedding"),
        Rule(f"{embeddings}.position_embeddings.weight", "positions"),
        Rule(f"{embeddings}.token_type_embeddings.weight", "kinds"),
        *norm(f"{embeddings}.LayerNorm", "norm"),
        Rule(tuple(f"{part}.weight" for part in qkv), "blocks/attn/qkv/kernel", joined(3)),
        Rule(tuple(f"{part}.bias" for part in qkv), "blocks/attn/qkv/bias", joined(3, SAME)),
        *linear(f"{layer}.attention.output.dense", "blocks/attn/proj"),
        *norm(f"{layer}.attention.output.LayerNorm", "blocks/norm1"),
        *linear(f"{layer}.intermediate.dense", "blocks/mlp/fc1"),
        *linear(f"{layer}.output.dense", "blocks/mlp/fc2"),
        *norm(f"{layer}.output.LayerNorm", "blocks/norm2"),
        *linear("model.lm_head", "head"),
    ]


def skip_rules(config: MaskGITSkipConfig) -> Rules:
    """Gives the table of official names for a U-ViT."""
    del config
    rows: list[Any] = [Rule("embeddings.weight", "embedding/embedding"), Rule("pos_embed", "positions", _TABLE)]
    for official, ours in (("in_blocks.{i}", "down"), ("mid_block", "middle"), ("out_blocks.{i}", "up")):
        for name in ("norm1", "norm2"):
            rows += norm(f"{official}.{name}", f"{ours}/{name}")
        rows += linear(f"{official}.attn.qkv", f"{ours}/attn/qkv", bias=False)
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            rows += linear(f"{official}.{name}", f"{ours}/{name.replace('.', '/')}")
    return [*rows, *linear("out_blocks.{i}.skip_linear", "up/join"), *norm("norm", "norm"), *linear("lm_head", "head")]


def bert_config(weights: Arrays, *, heads: int = HEADS) -> MaskGITConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads, which shapes do not tell.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        rows, width = weights["model.embeddings.word_embeddings.weight"].shape
        positions = len(weights["model.embeddings.position_embeddings.weight"])
        codes = len(weights["model.lm_head.weight"])
        hidden = len(weights["model.encoder.layer.0.intermediate.dense.bias"])
    except (KeyError, ValueError, TypeError) as error:
        raise GenError(f"this is no MaskGIT of TiTok's: {error} is missing or misshaped; give its file") from None
    return MaskGITConfig(
        shape=(positions - 1,),
        vocabulary=codes,
        num_classes=rows - codes - 2,
        width=width,
        depth=depth_of(weights, "model.encoder.layer.{i}.output.dense.weight"),
        heads=heads,
        hidden=hidden,
    )


def skip_config(weights: Arrays, *, heads: int = HEADS) -> MaskGITSkipConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads, which shapes do not tell.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        rows, width = weights["embeddings.weight"].shape
        positions = weights["pos_embed"].shape[1]
        codes, hidden = len(weights["lm_head.weight"]), len(weights["mid_block.mlp.fc1.bias"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise GenError(f"this is no MaskGIT of TiTok's: {error} is missing or misshaped; give its file") from None
    return MaskGITSkipConfig(
        shape=(positions - 1,),
        vocabulary=codes,
        num_classes=rows - codes - 2,
        width=width,
        depth=2 * depth_of(weights, "in_blocks.{i}.mlp.fc1.weight"),
        heads=heads,
        hidden=hidden,
    )


# the published settings by generator: (steps, temperature, guidance)
_SAMPLERS = {32: MaskedSampler(8, 9.5, guidance=RampScale(5.5)), 64: MaskedSampler(8, 11.0, guidance=RampScale(4.0))}


def bert_generator(config: MaskGITConfig) -> TokenGenerator:
    """Gives the published sampler of TiTok-L-32 or B-64 (scripts' scales 4.5 and 3 are our 5.5 and 4); tokens."""
    return TokenGenerator(config, _SAMPLERS.get(config.length, _SAMPLERS[32]))


def skip_generator(config: MaskGITSkipConfig) -> TokenGenerator:
    """Gives the published sampler of TiTok-S-128: 64 steps with guidance that rises to 6.9; tokens."""
    return TokenGenerator(config, MaskedSampler(64, 2.8, guidance=PowerCosineScale(6.9, 3.0)))


BERT = Importer(
    "maskgit",
    ("model.embeddings.word_embeddings.weight", "model.encoder.layer.0.output.dense.weight", "model.lm_head.weight"),
    bert_config,
    bert_rules,
    bert_generator,
    ("model.embeddings.position_ids",),
)
SKIPS = Importer(
    "maskgit-uvit",
    ("embeddings.weight", "in_blocks.0.attn.qkv.weight", "out_blocks.0.skip_linear.weight", "lm_head.weight"),
    skip_config,
    skip_rules,
    skip_generator,
)
