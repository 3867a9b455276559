"""MaskGIT's VQGAN under the names of TiTok's file of it (``maskgit-vqgan-imagenet-f16-256.bin``)."""

from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, convolution, depth_of
from gen.pretrained.towers import COMPVIS, norm, tower_mult
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.quantizers.vq import VQ

__all__ = ["IMPORTER", "config", "decoder_rules", "rules"]


def rules(config: MaskGITVQGANConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    rows = [*convolution("encoder.conv_in", "encoder/conv_in", bias=False)]
    for i, width in enumerate(config.widths):
        before = config.widths[i - 1] if i else config.width
        rows += _blocks(config, f"encoder.down.{i}.block", f"encoder/down/level{i}", changes=before != width)
    rows += _blocks(config, "encoder.mid", "encoder/mid")
    rows += [*norm("encoder.norm_out", "encoder/norm_out"), *convolution("encoder.conv_out", "encoder/conv_out")]
    rows += decoder_rules(config, "decoder", "decoder")
    return [*rows, Rule("quantize.embedding.weight", "quantizer/embedding")]


def decoder_rules(config: MaskGITVQGANConfig, official: str, ours: str) -> list[Rule]:
    """Gives the rules of the decoder alone, which other systems hold as well (TiTok's pixel decoder).

    Args:
      official, ours: what it is called there and here.
    """
    rows, last = convolution(f"{official}.conv_in", f"{ours}/conv_in"), len(config.mult) - 1
    rows += _blocks(config, f"{official}.mid", f"{ours}/mid")
    for i, width in enumerate(config.widths):
        changes = config.widths[min(i + 1, last)] != width
        rows += _blocks(config, f"{official}.up.{i}.block", f"{ours}/up/level{i}", changes=changes)
        if i:
            rows += convolution(f"{official}.up.{i}.upsample_conv", f"{ours}/upsample/level{i}")
    rows += norm(f"{official}.norm_out", f"{ours}/norm_out")
    return rows + convolution(f"{official}.conv_out", f"{ours}/conv_out")


def _blocks(config: MaskGITVQGANConfig, official: str, ours: str, *, changes: bool = False) -> list[Rule]:
    rows: list[Rule] = []
    for j in range(config.blocks):
        block, own = f"{official}.{j}", f"{ours}/res/block{j}"
        for i in (1, 2):
            rows += norm(f"{block}.norm{i}", f"{own}/norm{i}")
            rows += convolution(f"{block}.conv{i}", f"{own}/conv{i}", bias=False)
        if changes and j == 0:
            rows += convolution(f"{block}.{COMPVIS.shortcut}", f"{own}/shortcut", bias=False)
    return rows


def config(weights: Arrays, *, size: int = 256, groups: int = 32) -> MaskGITVQGANConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images it is to be used on; the network takes any.
      groups: of its group norms; shapes do not tell, 32 in the published network.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        width, channels = weights["encoder.conv_in.weight"].shape[:2]
        codes, code_width = weights["quantize.embedding.weight"].shape
    except (KeyError, ValueError) as error:
        raise GenError(f"this is not MaskGIT's VQGAN: {error} is missing or misshaped; give its file") from None
    return MaskGITVQGANConfig(
        image=(size, size, channels),
        width=width,
        mult=tower_mult(weights, "encoder", COMPVIS, width=width, what="VQGAN"),
        blocks=depth_of(weights, "encoder.mid.{i}.conv1.weight"),
        quantizer=VQ(codes, code_width),
        groups=groups,
    )


IMPORTER = Importer(
    "maskgit-vqgan",
    (
        "encoder.norm_out.weight",
        "encoder.down.0.block.0.conv1.weight",
        "decoder.up.0.block.0.conv1.weight",
        "decoder.up.1.upsample_conv.weight",
        "quantize.embedding.weight",
    ),
    config,
    rules,
    None,
    role="tokenizer",
)
