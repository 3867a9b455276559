"""The binary autoencoder of binary latent diffusion under the names of its files.

Its towers are flat lists of blocks. Every residual block of a file has a shortcut ``conv_out``, used only where
channels change, and the decoder a ``logsigma`` of a likelihood: what is not used has no place here.
"""

from typing import Literal

from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, convolution
from gen.pretrained.towers import norm
from gen.tokenizers.binary import BinaryAutoencoderConfig
from gen.tokenizers.quantizers.binary import Binary

__all__ = ["AUTOENCODER_IMPORTER", "config", "rules"]

_TOWERS = ("encoder", "generator")


def rules(config: BinaryAutoencoderConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    rows = [*_tower(config, "encoder"), *_tower(config, "decoder")]
    rows += convolution("quantize.proj.0", "to_bits")
    return [*rows, Rule("quantize.embed.weight", "embedding")]


def _tower(config: BinaryAutoencoderConfig, side: str) -> list[Rule]:
    """The rules of one tower, whose parts are numbered as they run."""
    encoder, last = side == "encoder", len(config.mult) - 1
    before = config.width if encoder else config.widths[-1]
    parts: list[tuple[str, str]] = [] if encoder or not config.normed else [("norm", "")]
    parts.append(("convolution", "conv_in"))
    middle = [("residual", "mid/block_1"), ("attention", "mid/attn_1"), ("residual", "mid/block_2")]
    parts += [] if encoder else middle
    for i in range(last + 1) if encoder else reversed(range(last + 1)):
        level = f"{'down' if encoder else 'up'}/level{i}"
        for j in range(config.blocks if encoder else config.decoder_blocks):
            parts.append(("residual" if before == config.widths[i] else "changing", f"{level}/res/block{j}"))
            before = config.widths[i]
            parts += [("attention", f"{level}/attn/block{j}")] if i in config.attention else []
        if i != (last if encoder else 0):
            parts.append(("resampling", f"{level}/conv"))
    parts += middle if encoder else []
    parts += [("norm", "norm_out"), ("convolution", "conv_out")]
    rows: list[Rule] = []
    for number, (kind, ours) in enumerate(parts):
        path = f"{side}/{ours}" if ours else "norm_in"
        rows += _part(kind, f"{'encoder' if encoder else 'generator'}.blocks.{number}", path)
    return rows


def _part(kind: str, official: str, ours: str) -> list[Rule]:
    match kind:
        case "convolution":
            return convolution(official, ours)
        case "resampling":
            return convolution(f"{official}.conv", ours)
        case "norm":
            return norm(official, ours)
        case "attention":
            rows = norm(f"{official}.norm", f"{ours}/norm")
            for name, own in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "proj")):
                rows += convolution(f"{official}.{name}", f"{ours}/{own}")
            return rows
    rows = []
    for i in (1, 2):
        rows += norm(f"{official}.norm{i}", f"{ours}/norm{i}")
        rows += convolution(f"{official}.conv{i}", f"{ours}/conv{i}")
    return rows + (convolution(f"{official}.conv_out", f"{ours}/shortcut") if kind == "changing" else [])


def config(
    weights: Arrays,
    *,
    size: int = 256,
    mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    attention: tuple[int, ...] = (4,),
    activation: Literal["sigmoid", "tanh"] = "sigmoid",
) -> BinaryAutoencoderConfig:
    """Gives the configuration of a state dict; flat lists of blocks do not tell the options.

    Args:
      size: height and width of the images it is to be used on; the network takes any.
      mult, attention: see `gen.tokenizers.binary.BinaryAutoencoderConfig`.
      activation: of the quantizer, "sigmoid" or "tanh".

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        width, channels = weights["encoder.blocks.0.weight"].shape[:2]
        bits, inner = weights["quantize.embed.weight"].shape
        normed = weights["generator.blocks.0.weight"].ndim == 1
    except (KeyError, ValueError) as error:
        raise GenError(f"this is not a binary autoencoder: {error} is missing or misshaped; give its file") from None
    # a tower has two convolutions, a norm, three parts in the middle, and a resampling between any two levels
    counts = [1 + max(int(n.split(".")[2]) for n in weights if n.startswith(f"{t}.blocks.")) for t in _TOWERS]
    fixed = 6 + len(mult) - 1
    blocks, decoder_blocks = ((n - fixed) // (len(mult) + len(attention)) for n in (counts[0], counts[1] - normed))
    return BinaryAutoencoderConfig(
        image=(size, size, channels),
        quantizer=Binary(bits, activation, squashed_loss=True),
        width=width,
        mult=mult,
        blocks=blocks,
        decoder_blocks=decoder_blocks,
        inner=inner,
        attention=attention,
        normed=normed,
    )


AUTOENCODER_IMPORTER = Importer(
    "binary-autoencoder",
    ("encoder.blocks.0.weight", "generator.blocks.0.weight", "quantize.proj.0.weight", "quantize.embed.weight"),
    config,
    rules,
    None,
    ("generator.logsigma.*", "*.conv_out.*"),
    role="tokenizer",
)
