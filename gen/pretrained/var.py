"""VAR's tokenizer and transformers under the names of their files (``vae_ch160v4096z32.pth``, ``var_d16.pth``)."""

import numpy as np

from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.scales import ScaleSampler
from gen.autoregressive.var import VARConfig
from gen.errors import GenError
from gen.pretrained.rules import (
    Arrays,
    Computed,
    Importer,
    Rule,
    Rules,
    Transform,
    convolution,
    depth_of,
    linear,
)
from gen.pretrained.towers import VAR, tower_mult, tower_rules
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.var_vqvae import SCALES, VARVQVAEConfig

__all__ = [
    "IMPORTER",
    "VQVAE_IMPORTER",
    "config",
    "generator",
    "network",
    "quantizer_rules",
    "rules",
    "transformer_rules",
]

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


_FIRST = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, N, D) <-> (N, D)
_HEADS = Transform(lambda a: a[0, :, 0, 0], lambda a: (a[None, :, None, None],))  # (1, H, 1, 1) <-> (H,)
_TABLE = Transform(lambda a: a[0, 0], lambda a: (a[None, None],))  # (1, 1, 6, D) <-> (6, D)


def transformer_rules(config: VARConfig) -> Rules:
    """Gives the table of official names of a transformer."""
    rows: list[Rule | Computed] = [
        Rule("class_emb.weight", "label/embedding"),
        Rule("pos_start", "start", _FIRST),
        Rule("pos_1LC", "positions", _FIRST),
        Rule("lvl_embed.weight", "levels"),
        *linear("word_embed", "enter"),
        *linear("blocks.{i}.attn.mat_qkv", "blocks/attn/qkv", bias=False),
        Rule("blocks.{i}.attn.q_bias", "blocks/attn/q_bias"),
        Rule("blocks.{i}.attn.v_bias", "blocks/attn/v_bias"),
        *(Computed(f"blocks.{i}.attn.zero_k_bias", np.zeros(config.width, np.float32)) for i in range(config.depth)),
        *linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        *linear("blocks.{i}.ffn.fc1", "blocks/mlp/fc1"),
        *linear("blocks.{i}.ffn.fc2", "blocks/mlp/fc2"),
        *linear("head_nm.ada_lin.1", "head_modulation"),
        *linear("head", "head"),
    ]
    if config.normed:
        rows.append(Rule("blocks.{i}.attn.scale_mul_1H11", "blocks/attn/log_scale", _HEADS))
    if config.shared:
        return [*rows, Rule("blocks.{i}.ada_gss", "blocks/table", _TABLE), *linear("shared_ada_lin.1", "modulation")]
    return [*rows, *linear("blocks.{i}.ada_lin.1", "blocks/modulation")]


def network(
    weights: Arrays,
    *,
    heads: int | None = None,
    scales: tuple[int, ...] | None = None,
    strength: float = 0.5,
    convolutions: int = 4,
    cosine: bool = False,
    eps: float = 1e-6,
) -> VARConfig:
    """Gives the configuration of a transformer's state dict, from its names and shapes.

    Args:
      heads: of its attention where that is not normed; by default one for 64 channels.
      scales: sides of its token maps; by default the published ones of as many tokens.
      strength, convolutions, cosine: of the quantizer of its tokenizer.
      eps: of its norms.

    Raises GenError when a needed array is missing or not shaped as in VAR, or the scales are not known.
    """
    try:
        rows, width = weights["class_emb.weight"].shape
        vocabulary, code_width = weights["head.weight"].shape[0], weights["word_embed.weight"].shape[1]
        tokens, maps = weights["pos_1LC"].shape[1], weights["lvl_embed.weight"].shape[0]
        hidden = weights["blocks.0.ffn.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not VAR's transformer: {error} is missing or misshaped; give its file") from None
    factors = weights.get("blocks.0.attn.scale_mul_1H11")
    if scales is None:
        scales = next((s for s in SCALES.values() if _tokens(s) == (tokens, maps)), None)
    if scales is None or _tokens(scales) != (tokens, maps):
        raise GenError(
            f"the transformer has {tokens} tokens in {maps} maps, which are not the scales {scales or 'published'}; "
            "give --network.scales"
        )
    return VARConfig(
        Residual(vocabulary, code_width, scales, cosine, strength, convolutions),
        num_classes=rows - 1,
        width=width,
        depth=depth_of(weights, "blocks.{i}.attn.mat_qkv.weight"),
        heads=(heads or max(width // 64, 1)) if factors is None else factors.shape[1],
        hidden=hidden,
        normed=factors is not None,
        shared="shared_ada_lin.1.weight" in weights,
        eps=eps,
    )


def generator(config: VARConfig) -> TokenGenerator:
    """Gives the sampler of the published scores; it needs the tokenizer, which has a file of its own."""
    return TokenGenerator(config, ScaleSampler())


def _tokens(scales: tuple[int, ...]) -> tuple[int, int]:
    return sum(side**2 for side in scales), len(scales)


# which scale a token belongs to, and the mask that follows from it, are stored as well
IMPORTER = Importer(
    "var",
    ("pos_1LC", "lvl_embed.weight", "word_embed.weight", "blocks.0.attn.mat_qkv.weight"),
    network,
    transformer_rules,
    generator,
    ("lvl_1L", "attn_bias_for_masking"),
)
