"""RAR under the names of its files (``rar_b.bin`` to ``rar_xxl.bin``, bytedance/1d-tokenizer).

Their tokens are those of MaskGIT's VQGAN, whose file is converted by itself.
"""

import math

from gen.autoregressive.decoding import PowerCosineScale
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.rar import SIZES, RARConfig
from gen.autoregressive.sampler import TokenSampler
from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, Transform, depth_of, linear

__all__ = ["IMPORTER", "config", "generator", "rules"]

_FIRST = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, N, D) <-> (N, D)

# width -> (scale, power, temperature) of the published tables (official README)
SAMPLING = {768: (16.0, 2.75, 1.0), 1024: (15.5, 2.5, 1.02), 1280: (6.9, 1.5, 1.02), 1408: (8.0, 1.2, 1.02)}


def rules(config: RARConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    del config
    norms = {"norm1": "norm1", "norm2": "norm2", "attn.q_norm": "attn/q_norm", "attn.k_norm": "attn/k_norm"}
    layers = {"attn.qkv": "attn/qkv", "attn.proj": "attn/proj", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
    layers["adaLN_modulation.1"] = "ada"
    return [
        Rule("cls_token", "start", _FIRST),
        Rule("embeddings.weight", "embed/embedding"),
        Rule("pos_embed", "positions", _FIRST),
        Rule("target_aware_pos_embed", "targets", _FIRST),
        Rule("timesteps_embeddings", "places", _FIRST),
        *(
            Rule(f"blocks.{{i}}.{theirs}.{name}", f"blocks/{ours}/{own}")
            for theirs, ours in norms.items()
            for name, own in (("weight", "scale"), ("bias", "bias"))
        ),
        *(row for theirs, ours in layers.items() for row in linear(f"blocks.{{i}}.{theirs}", f"blocks/{ours}")),
        *linear("adaln_before_head.adaLN_modulation.1", "final_ada"),
        *linear("lm_head", "head"),
    ]


def config(weights: Arrays, *, shape: tuple[int, ...] = (16, 16)) -> RARConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      shape: sides of the grid of tokens, or the length of a row, which the tables of positions do not tell.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        rows, width = weights["embeddings.weight"].shape
        vocabulary, size = len(weights["lm_head.weight"]), len(weights["blocks.0.attn.q_norm.weight"])
        tables = (weights["pos_embed"].shape[1], weights["timesteps_embeddings"].shape[1])
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a RAR model: {error} is missing or misshaped; give its file") from None
    least = math.prod(shape) + 2
    return RARConfig(
        shape=shape,
        vocabulary=vocabulary,
        width=width,
        depth=depth_of(weights, "blocks.{i}.attn.qkv.weight"),
        heads=width // size,
        hidden=hidden,
        num_classes=rows - vocabulary - 2,
        rows=None if tables == (least, least) else tables,
    )


def generator(config: RARConfig) -> TokenGenerator:
    """Gives the published sampler of the size, or RAR-B's for another."""
    scale, power, temperature = SAMPLING.get(config.width, SAMPLING[SIZES["B"][0]])
    return TokenGenerator(config, TokenSampler(PowerCosineScale(scale, power), temperature))


IMPORTER = Importer(
    "rar",
    ("embeddings.weight", "target_aware_pos_embed", "timesteps_embeddings", "lm_head.weight"),
    config,
    rules,
    generator,
)
