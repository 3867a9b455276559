"""MaskGen-VQ under the names of its files (bytedance/1d-tokenizer, ``maskgen_vq_l.bin``, ``maskgen_vq_xl.bin``)."""

import numpy as np

from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.joint import TextConfig, TrunkConfig
from gen.autoregressive.maskgen import MaskGenConfig
from gen.autoregressive.unmasking import MaskedSampler, RisenCosineScale
from gen.errors import GenError
from gen.pretrained.rules import SAME, Arrays, Importer, Rule, Rules, Transform, depth_of, joined, linear

__all__ = ["IMPORTER", "config", "generator", "rules"]

HEADS = 16  # of both published sizes


def _tied(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if not np.array_equal(first, second):
        raise ValueError("the table of tokens and the last layer are two arrays")
    return first


# the file holds the table of tokens twice, under both of its uses
_TIED = Transform(_tied, lambda a: (a, a))
_TABLE = Transform(lambda a: a[0], lambda a: (a[None],))


def rules(config: MaskGenConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    last = config.trunk.depth - 1
    return [
        Rule(("embeddings.weight", "lm_head.weight"), "embedding/embedding", _TIED),
        Rule("pos_embed", "trunk/positions", _TABLE),
        *linear("text_embed_proj", "trunk/words"),
        *linear("cond_pooled_proj", "trunk/vector"),
        *_stream("blocks.{i}", "trunk/blocks", image=True),
        *_stream("blocks.{i}", "trunk/blocks", image=False),
        *_stream(f"blocks.{last}", "trunk/last", image=True),
        *_stream(f"blocks.{last}", "trunk/last", image=False, last=True),
        *linear("norm.linear", "trunk/ada"),
    ]


def _stream(official: str, ours: str, *, image: bool, last: bool = False) -> list[Rule]:
    """One stream of a block; diffusers calls the text's layers ``add_`` and ``_context``."""
    stream = f"{ours}/{'image' if image else 'text'}"
    names = [f"{official}.attn.{f'to_{part}' if image else f'add_{part}_proj'}" for part in "qkv"]
    rows = [
        *linear(f"{official}.{'norm1' if image else 'norm1_context'}.linear", f"{stream}/ada"),
        Rule(tuple(f"{name}.weight" for name in names), f"{stream}/qkv/kernel", joined(3)),
        Rule(tuple(f"{name}.bias" for name in names), f"{stream}/qkv/bias", joined(3, SAME)),
    ]
    if last:
        return rows
    feedforward = f"{official}.{'ff' if image else 'ff_context'}.net"
    return [
        *rows,
        *linear(f"{official}.attn.{'to_out.0' if image else 'to_add_out'}", f"{stream}/proj"),
        *linear(f"{feedforward}.0.proj", f"{stream}/mlp/fc1"),
        *linear(f"{feedforward}.2", f"{stream}/mlp/fc2"),
    ]


def config(
    weights: Arrays, *, heads: int = HEADS, vocabulary: int = 8192, length: int = TextConfig.length
) -> MaskGenConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads, which shapes do not tell.
      vocabulary: codes of the tokenizer, likewise; 8192 in both published files.
      length: positions of the text features, likewise.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        rows, width = weights["embeddings.weight"].shape
        tokens, text = weights["pos_embed"].shape[1], weights["text_embed_proj.weight"].shape[1]
        pooled = weights["cond_pooled_proj.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is no MaskGen: {error} is missing or misshaped; give an official file") from None
    if not 1 < vocabulary < rows:
        raise GenError(f"a vocabulary of {vocabulary} in a table of {rows} rows; give the tokenizer's (vocabulary)")
    return MaskGenConfig(
        shape=(tokens,),
        vocabulary=vocabulary,
        spare=rows - vocabulary - 1,
        trunk=TrunkConfig(width, depth_of(weights, "blocks.{i}.attn.to_q.weight"), heads),
        text=TextConfig(length, text, pooled - text),
    )


def generator(config: MaskGenConfig) -> TokenGenerator:
    """Gives the published sampler: 16 steps, temperature 2, guidance that rises to 13 (12 there); tokens."""
    return TokenGenerator(config, MaskedSampler(16, 2.0, guidance=RisenCosineScale(13.0)))


IMPORTER = Importer(
    "maskgen",
    ("embeddings.weight", "text_embed_proj.weight", "cond_pooled_proj.weight", "blocks.0.attn.add_q_proj.weight"),
    config,
    rules,
    generator,
)
