"""Official FlexTok weights (apple/ml-flextok): names and shapes; the first stage under diffusers' names inside."""

import dataclasses

from gen.autoregressive.flextok_ar import FlexTokARConfig
from gen.errors import GenError
from gen.pretrained import sdvae, towers
from gen.pretrained.rules import Arrays, Importer, Rule, Rules, Transform, depth_of, joined, linear
from gen.tokenizers.flextok import FlexTokConfig, Pixels
from gen.tokenizers.flextok_layers import Positions
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.trunk import Tower

__all__ = ["IMPORTER", "ar_embedding_rules", "config", "decoder_rules", "encoder_rules", "rules"]

_FIRST, _ENCODER, _DECODER = "vae.vae.", "encoder.module_dict.", "decoder.module_dict."

# learned rows and columns (2, 1, D, L) as ours (2, L, D); learned places (1, 1, D, N) as ours (N, D); a fixed table
# (1, D, h, w) as ours (h, w, D)
_AXES = Transform(lambda a: a[:, 0].transpose(0, 2, 1), lambda a: (a.transpose(0, 2, 1)[:, None],))
_PLACES = Transform(lambda a: a[0, 0].T, lambda a: (a.T[None, None],))
_TABLE = Transform(lambda a: a[0].transpose(1, 2, 0), lambda a: (a.transpose(2, 0, 1)[None],))


def rules(config: FlexTokConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    first = [] if isinstance(config.first, Pixels) else sdvae.rules(config.first, towers.DIFFUSERS)
    table = [
        dataclasses.replace(rule, official=_FIRST + rule.official, ours=f"first/{rule.ours}")
        for rule in first
        if isinstance(rule, Rule) and isinstance(rule.official, str)
    ]
    return [*table, *encoder_rules(config), *decoder_rules(config)]


def encoder_rules(config: FlexTokConfig) -> list[Rule]:
    """Gives the part of the table that is the encoder's."""
    return [
        *linear(f"{_ENCODER}enc_patch_emb.patch_proj", "encoder/patch"),
        _positions(f"{_ENCODER}enc_posemb_module.posembs", "encoder/positions", config.positions),
        Rule(f"{_ENCODER}enc_register_module.registers", "encoder/registers"),
        *_blocks(f"{_ENCODER}enc_transformer.blocks.{{i}}", "encoder/blocks"),
        *linear(f"{_ENCODER}enc_to_latents.proj", "encoder/out"),
    ]


def decoder_rules(config: FlexTokConfig) -> list[Rule]:
    """Gives the part of the table that is the decoder's."""
    blocks = f"{_DECODER}dec_transformer.blocks.{{i}}"
    return [
        *linear(f"{_DECODER}dec_from_latents.proj", "decoder/codes"),
        Rule(f"{_DECODER}dec_registers_posemb_module.posembs", "decoder/code_positions", _PLACES),
        Rule(f"{_DECODER}dec_nested_dropout.dropout_mask_token", "decoder/dropped"),
        Rule(f"{_DECODER}dec_latent_dropout.nullcond", "decoder/unconditional"),
        *linear(f"{_DECODER}dec_noise_patch_emb.patch_proj", "decoder/patch"),
        _positions(f"{_DECODER}dec_patches_posemb_module.posembs", "decoder/positions", config.positions),
        *linear(f"{_DECODER}dec_time_embedder.mlp.0", "decoder/time/fc1"),
        *linear(f"{_DECODER}dec_time_embedder.mlp.2", "decoder/time/fc2"),
        *_blocks(blocks, "decoder/blocks"),
        *linear(f"{blocks}.adaLN_modulation.1", "decoder/blocks/ada"),
        *linear(f"{_DECODER}dec_to_patches.adaLN_modulation.1", "decoder/final_ada"),
        *linear(f"{_DECODER}dec_to_patches.proj", "decoder/final"),
    ]


def _positions(official: str, ours: str, kind: Positions) -> Rule:
    fixed = kind == "sincos"
    return Rule(official, f"{ours}/{'table' if fixed else 'axes'}", _TABLE if fixed else _AXES)


def _blocks(official: str, ours: str) -> list[Rule]:
    qkv = tuple(f"{official}.attn.w{name}.weight" for name in "qkv")
    return [
        Rule(qkv, f"{ours}/attn/qkv/kernel", joined(3)),
        *linear(f"{official}.attn.proj", f"{ours}/attn/proj", bias=False),
        Rule((f"{official}.mlp.fc1.weight", f"{official}.mlp.fc3.weight"), f"{ours}/mlp/fc1/kernel", joined(2)),
        *linear(f"{official}.mlp.fc2", f"{ours}/mlp/fc2", bias=False),
    ]


def config(
    weights: Arrays,
    *,
    size: int | None = None,
    scaling: float | None = None,
    patch: int = 2,
    head_size: int = 64,
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
    positions: Positions | None = None,
    stretch: bool = False,
    max_time: float = 1000.0,
    groups: int = 32,
) -> FlexTokConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      size: height and width of the images; what the learned positions are enough for by default.
      scaling: factor on the latents of the autoencoder in the file, the scaling_factor of its config.json; 1 without.
      patch: side of a patch of latents.
      head_size: channels of an attention head.
      levels: of FSQ.
      positions: of the patches, where they are learned rows times columns (product); otherwise the file tells.
      stretch: see `gen.tokenizers.flextok.FlexTokConfig`.
      max_time: the decoder's max_timestep.
      groups: of the autoencoder's group norms.

    Raises GenError when a needed array is missing or misshaped, or the scaling of the latents is not known.
    """
    try:
        tokens, width = weights[f"{_ENCODER}enc_register_module.registers"].shape
        table = weights[f"{_ENCODER}enc_posemb_module.posembs"]
        values = weights[f"{_ENCODER}enc_patch_emb.patch_proj.weight"].shape[1]
        codes = weights[f"{_ENCODER}enc_to_latents.proj.weight"].shape[0]
        decoder_width, frequencies = weights[f"{_DECODER}dec_time_embedder.mlp.0.weight"].shape
        learned, _, height, length = table.shape
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a FlexTok: {error} is missing or misshaped; give an official file") from None
    if codes != len(levels):
        raise GenError(
            f"the file's codes have {codes} channels, and FSQ levels {levels} are for {len(levels)}; give the levels "
            "(--network.levels)"
        )
    depths = [depth_of(weights, f"{part}_transformer.blocks.{{i}}.mlp.fc2.weight") for part in _PARTS]
    fixed = learned == 1
    grid = (height, length) if fixed else (length, length)
    first = _first(weights, size, (patch * grid[0], patch * grid[1], values // patch**2), groups)
    if scaling is None and not isinstance(first, Pixels):
        raise GenError(
            "the file does not tell the factor on the latents of its autoencoder; give the scaling_factor of its "
            "config.json (--network.scaling)"
        )
    return FlexTokConfig(
        first=first,
        scaling=1.0 if scaling is None else scaling,
        patch=patch,
        tokens=tokens,
        encoder=Tower(width, depths[0], width // head_size),
        decoder=Tower(decoder_width, depths[1], decoder_width // head_size),
        quantizer=FSQ(levels),
        positions="sincos" if fixed else positions or "sum",
        length=length,
        stretch=stretch,
        frequencies=frequencies,
        max_time=max_time,
    )


_PARTS = (f"{_ENCODER}enc", f"{_DECODER}dec")


def _first(weights: Arrays, size: int | None, latent: tuple[int, int, int], groups: int) -> Pixels | KLVAEConfig:
    """The autoencoder in the file; the latents themselves where there is none."""
    own = {name.removeprefix(_FIRST): array for name, array in weights.items() if name.startswith(_FIRST)}
    if not own:
        return Pixels(latent if size is None else (size, size, latent[2]))
    found = sdvae.config(towers.DIFFUSERS, own, size=0, groups=groups)
    sides = (latent[0] * found.factor, latent[1] * found.factor) if size is None else (size, size)
    return dataclasses.replace(found, image=(*sides, found.image[2]))


IMPORTER = Importer(
    name="flextok",
    signature=(f"{_ENCODER}enc_register_module.registers", f"{_DECODER}dec_nested_dropout.dropout_mask_token"),
    config=config,
    rules=rules,
    generator=None,
    role="tokenizer",
)


def ar_embedding_rules(config: FlexTokARConfig, ours: str = "embed/") -> list[Rule]:
    """Gives the rules of what an autoregressive model reads; the names of its trunk stand in no public code.

    Args:
      ours: what stands before our names.
    """
    rows = [
        Rule("embedding.weight", f"{ours}tokens/embedding"),
        Rule("sos_token_embed", f"{ours}start", _START),
        Rule("positional_embedding", f"{ours}positions"),
    ]
    return [*rows, Rule("cls_embedding.weight", f"{ours}label/embedding")] if config.num_classes else rows


_START = Transform(lambda a: a[0, 0], lambda a: (a[None, None],))  # (1, 1, D) <-> (D,)
