"""RAE weights: released decoders (bytetriper/RAE) beside DINOv2 in the names of the transformers library."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from gen.errors import GenError
from gen.pretrained import dinov2
from gen.pretrained.rules import SAME, Arrays, Computed, Importer, Rule, Rules, depth_of, joined, linear
from gen.tokenizers.rae import SIZES, RAEConfig, positions
from gen.tokenizers.trunk import Tower

__all__ = ["IMPORTER", "rules", "with_encoder"]

_ENCODER = "encoder.encoder."


def with_encoder(decoder: Arrays, encoder: Arrays) -> dict[str, np.ndarray]:
    """Gives the state dict of a whole RAE from a released decoder file and the encoder's own file.

    The gain and bias of the encoder's final norm are left out, as the released decoders want it.
    """
    own = {name.removeprefix("decoder."): array for name, array in decoder.items()}
    taken = {name: array for name, array in encoder.items() if not name.startswith("layernorm.")}
    return {f"decoder.{name}": array for name, array in own.items()} | {
        f"{_ENCODER}{name}": array for name, array in taken.items()
    }


def rules(config: RAEConfig) -> Rules:
    """Gives the table of official names for a configuration."""
    table = positions(config.grid, config.decoder.width)
    block, ours = "decoder.decoder_layers.{i}.", "decoder/trunk/blocks"
    parts = [f"{block}attention.attention.{part}" for part in ("query", "key", "value")]
    norms = [
        (f"{block}layernorm_before", f"{ours}/norm1"),
        (f"{block}layernorm_after", f"{ours}/norm2"),
        ("decoder.decoder_norm", "decoder/trunk/norm"),
    ]
    return [
        *_encoder(config),
        Computed("decoder.decoder_pos_embed", table[None], atol=1e-5),
        Rule("decoder.trainable_cls_token", "decoder/cls"),
        *linear("decoder.decoder_embed", "decoder/embed"),
        Rule(tuple(f"{part}.weight" for part in parts), f"{ours}/attn/qkv/kernel", joined(3)),
        Rule(tuple(f"{part}.bias" for part in parts), f"{ours}/attn/qkv/bias", joined(3, SAME)),
        *linear(f"{block}attention.output.dense", f"{ours}/attn/proj"),
        *linear(f"{block}intermediate.dense", f"{ours}/mlp/fc1"),
        *linear(f"{block}output.dense", f"{ours}/mlp/fc2"),
        *(Rule(f"{n}.{w}", f"{o}/{m}") for n, o in norms for w, m in (("weight", "scale"), ("bias", "bias"))),
        *linear("decoder.decoder_pred", "decoder/head"),
    ]


def _encoder(config: RAEConfig) -> list[Rule]:
    """The encoder's rules under the prefixes of both sides."""
    found = []
    for rule in dinov2.rules(config.encoder, "hub"):
        assert isinstance(rule, Rule)
        names = tuple(_ENCODER + name for name in rule.names)
        official = names[0] if isinstance(rule.official, str) else names
        found.append(dataclasses.replace(rule, official=official, ours=f"encoder/{rule.ours}"))
    return found


def config(weights: Arrays, *, heads: int | None = None, decoder_heads: int | None = None) -> RAEConfig:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      heads: attention heads of the encoder; by default heads of 64 channels.
      decoder_heads: those of the decoder; by default those of the published sizes, or heads of 64 channels.

    Raises GenError when a needed array is missing or not shaped as in an RAE.
    """
    if "trainable_cls_token" in weights or not any(name.startswith(_ENCODER) for name in weights):
        raise GenError("this RAE file has a decoder alone; give the file of its encoder too (gen convert --encoder)")
    own: Mapping[str, np.ndarray] = {
        name.removeprefix(_ENCODER): array for name, array in weights.items() if name.startswith(_ENCODER)
    }
    try:
        width = weights["decoder.decoder_embed.weight"].shape[0]
        tokens = weights["decoder.decoder_pos_embed"].shape[1] - 1
        pixels = weights["decoder.decoder_pred.weight"].shape[0]
        hidden = weights["decoder.decoder_layers.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not an RAE: {error} is missing or misshaped; give a released decoder") from None
    published = {tower.width: tower.heads for tower, _ in SIZES.values()}
    heads_found = published.get(width, max(width // 64, 1)) if decoder_heads is None else decoder_heads
    patch = math.isqrt(pixels // 3)
    side = math.isqrt(tokens) * patch
    return RAEConfig(
        (side, side, 3),
        patch,
        dinov2.config(own, heads=heads, naming="hub"),
        Tower(width, depth_of(weights, "decoder.decoder_layers.{i}.layernorm_before.weight"), heads_found),
        hidden,
    )


IMPORTER = Importer(
    name="rae",
    signature=("decoder.trainable_cls_token", "decoder.decoder_pred.weight"),
    config=config,
    rules=rules,
    generator=None,
    role="tokenizer",
)
