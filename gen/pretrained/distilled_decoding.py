"""Students of Distilled Decoding: the published files' names (the file's ``ema``)."""

import dataclasses

from gen.distill.gpt_student import GPTStudentConfig
from gen.distill.noise_decoder import NoiseDecoder, NoiseDecoding
from gen.distill.var_student import VARStudentConfig
from gen.errors import GenError
from gen.pretrained.llamagen import gpt_config, gpt_rules
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, linear
from gen.pretrained.var import network, transformer_rules
from gen.tokenizers.var_vqvae import SCALES

__all__ = ["GPT_IMPORTER", "VAR_IMPORTER", "config", "generator", "rules", "var_config", "var_generator", "var_rules"]

_HEAD = "final_layer_conti"
_ADDED = (  # of both students
    Rule("n_d_embed.weight", "known/embedding"),
    Rule(f"{_HEAD}.scale_shift_table", "codes/table"),
    *linear(f"{_HEAD}.linear", "codes/linear"),
)


def rules(config: GPTStudentConfig) -> Rules:
    """Gives the table of official names of a LlamaGen student's configuration."""
    rows = gpt_rules(config.of)
    return [
        *(row for row in rows if not (isinstance(row, Rule) and row.ours == "tokens/embedding")),
        *linear("tok_embeddings", "tokens"),
        *_ADDED,
    ]


def var_rules(config: VARStudentConfig) -> Rules:
    """Gives the table of official names of a VAR student's configuration."""
    return [
        *transformer_rules(config.inner),
        *_ADDED,
        *linear("layerwise_n_d_embed.{i}", "blocks/known"),
        *linear(f"layerwise_n_d_embed.{config.of.depth}", "last"),
    ]


def config(
    weights: Arrays, *, heads: int | None = None, shape: tuple[int, int] = (16, 16), null_class: bool = True
) -> GPTStudentConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads, shape: as in `gen.pretrained.llamagen.gpt_config`.
      null_class: whether the label table has one more row, which no student uses.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        channels = weights["tok_embeddings.weight"].shape[1]
        like = {**weights, "tok_embeddings.weight": weights["output.weight"]}
    except (KeyError, IndexError) as error:
        raise GenError(f"this is not a student of LlamaGen: {error} is missing or misshaped; give its file") from None
    return GPTStudentConfig(gpt_config(like, heads=heads, shape=shape, null_class=null_class), channels)


def generator(config: GPTStudentConfig) -> NoiseDecoder:
    """Gives the two calls of the published LlamaGen-B student, which keep 80 of 256 tokens; it needs the tokenizer."""
    kept = max(1, config.of.length * 80 // 256)
    return NoiseDecoder(config, NoiseDecoding((0, kept), kept))


GPT_IMPORTER = Importer(
    "llamagen-dd",
    (
        "tok_embeddings.weight",
        "layers.0.attention.wqkv.weight",
        "layers.0.feed_forward.w3.weight",
        "output.weight",
        "n_d_embed.weight",
        f"{_HEAD}.scale_shift_table",
    ),
    config,
    rules,
    generator,
    ("freqs_cis",),
)


def var_config(
    weights: Arrays,
    *,
    heads: int | None = None,
    scales: tuple[int, ...] | None = None,
    strength: float = 0.5,
    convolutions: int = 4,
    cosine: bool = False,
    eps: float = 1e-6,
) -> VARStudentConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads, strength, convolutions, cosine, eps: as in `gen.pretrained.var.network`.
      scales: sides of the teacher's token maps; by default the published ones of as many tokens.

    Raises GenError when a needed array is missing or not shaped as in this network, or the scales are not known.
    """
    shape = weights["pos_1LC"].shape if "pos_1LC" in weights else (1, 0, 0)
    if scales is None:
        scales = next((s for s in SCALES.values() if 1 + sum(side**2 for side in s) == shape[1]), None)
    inner = network(
        weights,
        heads=heads,
        scales=None if scales is None else (1, *scales),
        strength=strength,
        convolutions=convolutions,
        cosine=cosine,
        eps=eps,
    )
    quantizer = dataclasses.replace(inner.quantizer, scales=inner.scales[1:])
    return VARStudentConfig(dataclasses.replace(inner, quantizer=quantizer))


def var_generator(config: VARStudentConfig) -> NoiseDecoder:
    """Gives the two calls of the published students, which keep 5 of 10 maps (d16) or 4; it needs the tokenizer."""
    maps = len(config.of.scales)
    kept = sum(config.of.groups[: max(1, maps * (5 if config.of.depth == 16 else 4) // 10)])
    return NoiseDecoder(config, NoiseDecoding((0, kept), kept))


VAR_IMPORTER = Importer(
    "var-dd",
    (
        "pos_1LC",
        "lvl_embed.weight",
        "word_embed.weight",
        "blocks.0.attn.mat_qkv.weight",
        "n_d_embed.weight",
        f"{_HEAD}.scale_shift_table",
    ),
    var_config,
    var_rules,
    var_generator,
    ("lvl_1L", "attn_bias_for_masking", "noise_idx"),
)
