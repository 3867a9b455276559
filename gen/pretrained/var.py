"""VAR's multi-scale tokenizer under the names of its file (``vae_ch160v4096z32.pth``)."""

from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, convolution, depth_of
from gen.pretrained.towers import VAR, tower_mult, tower_rules
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.var_vqvae import SCALES, VARVQVAEConfig

__all__ = ["VQVAE_IMPORTER", "config", "quantizer_rules", "rules"]

_HITS = "ema_vocab_hit_SV"


def rules(config: VARVQVAEConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    rows = [*tower_rules(config, "encoder", VAR), *tower_rules(config, "decoder", VAR)]
    rows += [*convolution("quant_conv", "quant"), *convolution("post_quant_conv", "post_quant")]
    rows += quantizer_rules(config.quantizer, "quantize.", "quantizer/")
    return [*rows, Rule(f"quantize.{_HITS}", "quantizer/hits")]


def quantizer_rules(config: Residual, official: str, ours: str) -> list[Rule]:
    """Gives the rules of the quantizer's codebook and convolutions.

    Args:
      official, ours: what stands before its names there and here.
    """
    rows = [Rule(f"{official}embedding.weight", f"{ours}embedding")]
    for i in range(config.count):
        place = {0: f".{i}", 1: ".qresi"}.get(config.convolutions, f".qresi_ls.{i}")
        rows += convolution(f"{official}quant_resi{place}", f"{ours}phi/conv{i}")
    return rows


def config(weights: Arrays, *, size: int = 256, groups: int = 32, strength: float = 0.5) -> VARVQVAEConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images it is to be used on: 256 or 512, whose scales are published.
      groups: of its group norms; shapes do not tell, 32 in the published network.
      strength: of the quantizer's convolutions, which shapes do not tell either.

    Raises GenError when a needed array is missing or not shaped as in this network, and for a size without scales.
    """
    if size not in SCALES:
        raise GenError(
            f"no scales are published for images of {size}; give --network.size {' or '.join(map(str, SCALES))}"
        )
    try:
        width, channels = weights["encoder.conv_in.weight"].shape[:2]
        inner = weights["encoder.conv_out.weight"].shape[0]
        codes, code_width = weights["quantize.embedding.weight"].shape
        kernel = weights["quant_conv.weight"].shape[3]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not VAR's tokenizer: {error} is missing or misshaped; give its file") from None
    shared = depth_of(weights, "quantize.quant_resi.qresi_ls.{i}.weight")
    one = "quantize.quant_resi.qresi.weight" in weights
    return VARVQVAEConfig(
        image=(size, size, channels),
        quantizer=Residual(codes, code_width, SCALES[size], False, strength, 1 if one else shared),
        width=width,
        mult=tower_mult(weights, "encoder", VAR, width=width, what="VQ tokenizer"),
        blocks=depth_of(weights, "encoder.down.0.block.{i}.conv1.weight"),
        inner=inner,
        quant_kernel=kernel,
        groups=groups,
    )


VQVAE_IMPORTER = Importer(
    "var-vqvae",
    (
        "encoder.norm_out.weight",
        "encoder.down.0.block.0.conv1.weight",
        "decoder.up.0.block.0.conv1.weight",
        "encoder.mid.attn_1.qkv.weight",
        "quantize.embedding.weight",
    ),
    config,
    rules,
    None,
    role="tokenizer",
)
