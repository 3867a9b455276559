"""Students of Distilled Decoding: the published files' names (the file's ``ema``)."""

from gen.distill.gpt_student import GPTStudentConfig
from gen.errors import GenError
from gen.pretrained.llamagen import gpt_config, gpt_rules
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, linear

__all__ = ["GPT_IMPORTER", "config", "rules"]

_HEAD = "final_layer_conti"


def rules(config: GPTStudentConfig) -> Rules:
    """Gives the table of official names of a LlamaGen student's configuration."""
    rows = gpt_rules(config.of)
    return [
        *(row for row in rows if not (isinstance(row, Rule) and row.ours == "tokens/embedding")),
        *linear("tok_embeddings", "tokens"),
        Rule("n_d_embed.weight", "known/embedding"),
        Rule(f"{_HEAD}.scale_shift_table", "codes/table"),
        *linear(f"{_HEAD}.linear", "codes/linear"),
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


GPT_IMPORTER = Importer(
    "llamagen-dd",
    (f"{_HEAD}.scale_shift_table", "tok_embeddings.bias", "layers.0.attention.wqkv.weight", "n_d_embed.weight"),
    config,
    rules,
    None,
    ("freqs_cis",),
)
