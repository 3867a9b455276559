"""Discriminator weights under the official names of VQGAN and latent diffusion, TiTok, and ViTok's blocks.

They stand in training checkpoints beside the tokenizer (``loss.discriminator.``, ``discriminator.``): what adversarial
training goes on from.
"""

from gen.nn.discriminators import BLUR, PatchGAN, TiTokDiscriminator
from gen.pretrained.rules import Computed, Rule, Rules, convolution

__all__ = ["PATCHGAN_COUNTERS", "patchgan_rules", "style_block_rules", "titok_rules"]

# batch norm's number of batches so far, which nothing reads
PATCHGAN_COUNTERS = "*num_batches_tracked"


def patchgan_rules(config: PatchGAN, prefix: str = "") -> Rules:
    """Gives the table of taming-transformers' NLayerDiscriminator with batch norms."""
    rows = convolution(f"{prefix}main.0", "first")
    for k in range(1, config.layers + 1):
        conv, norm, ours = f"{prefix}main.{3 * k - 1}", f"{prefix}main.{3 * k}", f"norms/layer{k}"
        rows += convolution(conv, f"convs/layer{k}", bias=False)
        pairs = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
        rows += [Rule(f"{norm}.{official}", f"{ours}/{own}") for official, own in pairs]
    return [*rows, *convolution(f"{prefix}main.{3 * config.layers + 2}", "last")]


def titok_rules(config: TiTokDiscriminator, prefix: str = "") -> Rules:
    """Gives the table of 1d-tokenizer's NLayerDiscriminator, which stores its blur."""
    rows: list[Rule | Computed] = [*convolution(f"{prefix}block_in.0", "block_in")]
    for i in range(config.stages):
        official, ours = f"{prefix}blocks.{i}", f"stages/stage{i}"
        rows += convolution(f"{official}.0", f"{ours}/conv")
        rows.append(Computed(f"{official}.1.kernel", BLUR[None, None]))
        rows += [Rule(f"{official}.2.weight", f"{ours}/norm/scale"), Rule(f"{official}.2.bias", f"{ours}/norm/bias")]
    return [*rows, *convolution(f"{prefix}to_logits.0", "to_logits"), *convolution(f"{prefix}to_logits.2", "out")]


def style_block_rules(prefix: str = "", ours: str = "") -> Rules:
    """Gives the table of one residual block of ViTok's discriminator, which stores its blur."""
    return [
        Computed(f"{prefix}blur_pool.filter", BLUR[None, None]),
        *convolution(f"{prefix}conv1", f"{ours}conv1"),
        *convolution(f"{prefix}conv2", f"{ours}conv2"),
        *convolution(f"{prefix}res_conv", f"{ours}skip", bias=False),
    ]
