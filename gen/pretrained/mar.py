"""MAR under the names of the files of l-DeTok and of the original (LTH14/mar), and its diffusion head alone."""

from typing import Any

from gen.autoregressive.infilling import InfillingSampler, KnownScale, LatentTokenGenerator
from gen.autoregressive.mar import MARConfig
from gen.autoregressive.token_head import HeadConfig
from gen.errors import GenError
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, Transform, depth_of, linear
from gen.pretrained.towers import norm

__all__ = ["IMPORTER", "config", "generator", "head_rules", "rules"]

_TABLE = Transform(lambda a: a[0], lambda a: (a[None],))  # (1, N, D) <-> (N, D)
_HEADS = {768: 12, 1024: 16, 1280: 16}


def head_rules(config: HeadConfig, official: str = "", ours: str = "") -> Rules:
    """Gives the table of the diffusion head.

    Args:
      official, ours: what stands before its names there and here.
    """
    del config
    net, block = f"{official}net", f"{official}net.res_blocks.{{i}}"
    return [
        *linear(f"{net}.time_embed.mlp.0", f"{ours}time/fc1"),
        *linear(f"{net}.time_embed.mlp.2", f"{ours}time/fc2"),
        *linear(f"{net}.cond_embed", f"{ours}condition"),
        *linear(f"{net}.input_proj", f"{ours}enter"),
        *norm(f"{block}.in_ln", f"{ours}blocks/norm"),
        *linear(f"{block}.mlp.0", f"{ours}blocks/fc1"),
        *linear(f"{block}.mlp.2", f"{ours}blocks/fc2"),
        *linear(f"{block}.adaLN_modulation.1", f"{ours}blocks/ada"),
        *linear(f"{net}.final_layer.adaLN_modulation.1", f"{ours}final_ada"),
        *linear(f"{net}.final_layer.linear", f"{ours}final"),
    ]


def rules(config: MARConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    rows: list[Any] = [
        Rule("fake_latent", "unknown"),
        Rule("mask_token", "mask_token", _TABLE),
        Rule("encoder_pos_embed_learned", "encoder_positions", _TABLE),
        Rule("decoder_pos_embed_learned", "decoder_positions", _TABLE),
        Rule("diffusion_pos_embed_learned", "positions", _TABLE),
        *linear("z_proj", "enter"),
        *norm("z_proj_ln", "enter_norm"),
        *linear("decoder_embed", "join"),
    ]
    if config.num_classes:
        rows.append(Rule("class_emb.weight", "label/embedding"))
    for tower in ("encoder", "decoder"):
        block, ours = f"{tower}_blocks.{{i}}", f"{tower}/blocks"
        for name in ("norm1", "norm2"):
            rows += norm(f"{block}.{name}", f"{ours}/{name}")
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            rows += linear(f"{block}.{name}", f"{ours}/{name.replace('.', '/')}")
        rows += norm(f"{tower}_norm", f"{tower}/norm")
    return [*rows, *head_rules(config.head, "diffloss.", "head/")]


def config(weights: Arrays, *, heads: int | None = None, channels: int = 16) -> MARConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads; by default those of the published sizes.
      channels: of the latents; the rest of a token's numbers is its patch. 16 as published.

    Raises GenError when a needed array is missing or not shaped as in this network, or the heads are not known.
    """
    try:
        width, token = weights["z_proj.weight"].shape
        length = weights["diffusion_pos_embed_learned"].shape[1]
        buffer = weights["encoder_pos_embed_learned"].shape[1] - length
        classes = len(weights["class_emb.weight"])
        head_width = len(weights["diffloss.net.input_proj.bias"])
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is no MAR: {error} is missing or misshaped; give an official file") from None
    if heads is None and width not in _HEADS:
        raise GenError(f"MAR width {width} is not a published size; give its number of attention heads (heads)")
    side, patch = (round(n**0.5) for n in (length, token / channels))
    if side**2 != length or patch**2 * channels != token:
        raise GenError(
            f"a MAR of {length} tokens of {token} numbers is no square of latents of {channels} channels; give their "
            "number (channels)"
        )
    return MARConfig(
        shape=(side * patch, side * patch, channels),
        patch=patch,
        num_classes=classes,
        width=width,
        depth=depth_of(weights, "encoder_blocks.{i}.attn.qkv.weight"),
        heads=_HEADS[width] if heads is None else heads,
        buffer=buffer,
        head_width=head_width,
        head_depth=depth_of(weights, "diffloss.net.res_blocks.{i}.in_ln.weight"),
    )


def generator(config: MARConfig) -> LatentTokenGenerator:
    """Gives the sampler of the published tables, 256 steps with guidance that grows to 3.9 (B) or 3.4; latents."""
    scale = 3.9 if config.width == 768 else 3.4
    steps = min(256, config.length)
    return LatentTokenGenerator(config, InfillingSampler(steps, guidance=KnownScale(scale)))


IMPORTER = Importer(
    "mar",
    ("fake_latent", "z_proj_ln.weight", "diffusion_pos_embed_learned", "diffloss.net.input_proj.weight"),
    config,
    rules,
    generator,
)
