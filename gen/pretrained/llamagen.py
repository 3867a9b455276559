"""LlamaGen under the names of its files: tokenizers (``vq_ds16_c2i.pt``) and decoders (``c2i_B_256.pt``).

Decoders of classes (c2i) and of captions (t2i) have one table. Their files say neither heads nor the grid of tokens.
"""

import dataclasses

from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.gpt import SIZES, GPTConfig
from gen.autoregressive.sampler import TokenSampler
from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, convolution, depth_of, joined, linear
from gen.pretrained.towers import LLAMAGEN, tower_mult, tower_rules
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.vqgan import VQGANConfig

__all__ = ["IMPORTER", "VQ_IMPORTER", "config", "generator", "gpt_config", "gpt_rules", "rules"]

# guidance scales of the published tables (official README), by width
GUIDANCE = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}


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


def gpt_rules(config: GPTConfig) -> Rules:
    """Gives the table of official names of a decoder's configuration."""
    prefix = [Rule("cls_embedding.embedding_table.weight", "label/embedding")]
    if config.text is not None:
        prefix = [row for n in ("fc1", "fc2") for row in linear(f"cls_embedding.cap_proj.{n}", f"text/{n}", bias=False)]
        prefix += [Rule("cls_embedding.uncond_embedding", "text/null")]
    gates = tuple(f"layers.{{i}}.feed_forward.{name}.weight" for name in ("w1", "w3"))
    return [
        *prefix,
        Rule("tok_embeddings.weight", "tokens/embedding"),
        *linear("layers.{i}.attention.wqkv", "blocks/attn/qkv", bias=False),
        *linear("layers.{i}.attention.wo", "blocks/attn/proj", bias=False),
        Rule(gates, "blocks/mlp/fc1/kernel", joined(2)),
        *linear("layers.{i}.feed_forward.w2", "blocks/mlp/fc2", bias=False),
        Rule("layers.{i}.attention_norm.weight", "blocks/norm1/scale"),
        Rule("layers.{i}.ffn_norm.weight", "blocks/norm2/scale"),
        Rule("norm.weight", "norm/scale"),
        *linear("output", "head", bias=False),
    ]


def gpt_config(
    weights: Arrays,
    *,
    heads: int | None = None,
    shape: tuple[int, ...] = (16, 16),
    null_class: bool = True,
    theta: float = 10000.0,
    eps: float = 1e-5,
) -> GPTConfig:
    """Gives the configuration of a decoder's state dict, from its names and shapes.

    Args:
      heads: attention heads; by default those of the published size of this width, else one for 64 channels.
      shape: sides of the grid of tokens: (24, 24) for the files of 384 pixels.
      null_class: whether the last row of the label table is the null class.
      theta, eps: as in `gen.autoregressive.gpt.GPTConfig`.

    Raises GenError when a needed array is missing or not shaped as in this network.
    """
    try:
        vocabulary, width = weights["tok_embeddings.weight"].shape
        hidden = weights["layers.0.feed_forward.w1.weight"].shape[0]
        rows = weights["layers.0.attention.wqkv.weight"].shape[0]
        caption = weights.get("cls_embedding.uncond_embedding")
        classes = 0 if caption is not None else len(weights["cls_embedding.embedding_table.weight"]) - null_class
        text = None if caption is None else (caption.shape[0], caption.shape[1])
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a LlamaGen decoder: {error} is missing or misshaped; give its file") from None
    heads = heads or next((h for _, h, w in SIZES.values() if w == width), max(width // 64, 1))
    spare, size = rows - width, width // heads
    if width % heads or spare < 2 * size or spare % (2 * size):
        raise GenError(f"{rows} rows of q, k and v do not fit {heads} heads of a width of {width}; give the heads")
    key_heads = spare // (2 * size)
    return GPTConfig(
        shape=shape,
        vocabulary=vocabulary,
        width=width,
        depth=depth_of(weights, "layers.{i}.attention_norm.weight"),
        heads=heads,
        hidden=hidden,
        kv_heads=None if key_heads == heads else key_heads,
        num_classes=classes,
        null_class=null_class,
        text=text,
        theta=theta,
        eps=eps,
    )


def generator(config: GPTConfig) -> TokenGenerator:
    """Gives the published sampler: no filters, the guidance of the size's best table (7.5 for captions, as the demo's).

    Its tokens become images by the tokenizer of a file of its own.
    """
    scale = GUIDANCE.get(config.width, 2.0) if config.text is None else 7.5
    filters = {} if config.text is None else {"top_k": 1000}
    return TokenGenerator(config, TokenSampler(ConstantScale(scale), **filters))


# old files hold the rotary table
IMPORTER = Importer(
    "llamagen",
    ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w3.weight", "output.weight"),
    gpt_config,
    gpt_rules,
    generator,
    ("freqs_cis",),
)
