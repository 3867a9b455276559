"""LlamaGen's VQ tokenizers under the names of its files (``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt``)."""

import dataclasses

from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, convolution, depth_of
from gen.pretrained.towers import LLAMAGEN, tower_mult, tower_rules
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.vqgan import VQGANConfig

__all__ = ["VQ_IMPORTER", "config", "rules"]


def rules(config: VQGANConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    decoder = dataclasses.replace(config, mult=config.decoder_mult or config.mult)
    rows = [*tower_rules(config, "encoder", LLAMAGEN), *tower_rules(decoder, "decoder", LLAMAGEN)]
    rows += [*convolution("quant_conv", "quant"), *convolution("post_quant_conv", "post_quant")]
    return [*rows, Rule("quantize.embedding.weight", "quantizer/embedding")]


def config(weights: Arrays, *, size: int = 256, groups: int = 32) -> VQGANConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images it is to be used on; the network takes any.
      groups: of its group norms; shapes do not tell, 32 in all published networks.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        width, channels = weights["encoder.conv_in.weight"].shape[:2]
        inner = weights["encoder.conv_out.weight"].shape[0]
        codes, code_width = weights["quantize.embedding.weight"].shape
        kernel = weights["quant_conv.weight"].shape[3]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not LlamaGen's tokenizer: {error} is missing or misshaped; give its file") from None
    mult, decoder_mult = (
        tower_mult(weights, side, LLAMAGEN, width=width, what="VQ tokenizer") for side in ("encoder", "decoder")
    )
    return VQGANConfig(
        image=(size, size, channels),
        quantizer=VQ(codes, code_width, normalize=True),
        width=width,
        mult=mult,
        decoder_mult=() if decoder_mult == mult else decoder_mult,
        blocks=depth_of(weights, "encoder.conv_blocks.0.res.{i}.conv1.weight"),
        inner=inner,
        quant_kernel=kernel,
        groups=groups,
    )


# how often each of the last 65536 codes was drawn is a record of training
VQ_IMPORTER = Importer(
    "llamagen-vq",
    (
        "encoder.conv_blocks.0.res.0.conv1.weight",
        "decoder.conv_blocks.0.res.0.conv1.weight",
        "quantize.embedding.weight",
    ),
    config,
    rules,
    None,
    ("quantize.codebook_used",),
    role="tokenizer",
)
