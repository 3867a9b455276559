"""CLIP weights under the names of transformers' ``CLIPModel``, in which they are published."""

import math
from typing import Literal

from gen.errors import GenError
from gen.features.clip import CLIPConfig, TowerConfig
from gen.pretrained.rules import LINEAR, SAME, Arrays, Importer, Rule, Rules, depth_of, joined, linear, patches

__all__ = ["IMPORTER", "config", "rules"]

_HEAD_WIDTH = 64  # of all published sizes


def _norm(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")]


def _blocks(official: str, ours: str) -> Rules:
    layer = f"{official}.encoder.layers.{{i}}"
    projections = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    return [
        Rule(tuple(f"{name}.weight" for name in projections), f"{ours}/blocks/attn/qkv/kernel", joined(3, LINEAR)),
        Rule(tuple(f"{name}.bias" for name in projections), f"{ours}/blocks/attn/qkv/bias", joined(3, SAME)),
        *linear(f"{layer}.self_attn.out_proj", f"{ours}/blocks/attn/proj"),
        *linear(f"{layer}.mlp.fc1", f"{ours}/blocks/fc1"),
        *linear(f"{layer}.mlp.fc2", f"{ours}/blocks/fc2"),
        *_norm(f"{layer}.layer_norm1", f"{ours}/blocks/norm1"),
        *_norm(f"{layer}.layer_norm2", f"{ours}/blocks/norm2"),
    ]


def rules(config: CLIPConfig) -> Rules:
    """The table of official names for a configuration."""
    return [
        Rule("logit_scale", "logit_scale"),
        *linear("visual_projection", "project_image", bias=False),
        *linear("text_projection", "project_text", bias=False),
        Rule("vision_model.embeddings.class_embedding", "vision/cls"),
        Rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", patches(config.patch)),
        Rule("vision_model.embeddings.position_embedding.weight", "vision/positions"),
        *_norm("vision_model.pre_layrnorm", "vision/before"),
        *_norm("vision_model.post_layernorm", "vision/after"),
        *_blocks("vision_model", "vision"),
        Rule("text_model.embeddings.token_embedding.weight", "text/tokens"),
        Rule("text_model.embeddings.position_embedding.weight", "text/positions"),
        *_norm("text_model.final_layer_norm", "text/after"),
        *_blocks("text_model", "text"),
    ]


def _tower(weights: Arrays, name: str, heads: int | None) -> TowerConfig:
    hidden, width = weights[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
    if heads is None and width % _HEAD_WIDTH:
        raise GenError(
            f"CLIP width {width} is not a published size; give its attention heads (vision_heads, text_heads)"
        )
    depth = depth_of(weights, name + ".encoder.layers.{i}.mlp.fc1.weight")
    return TowerConfig(width, depth, width // _HEAD_WIDTH if heads is None else heads, hidden)


def config(
    weights: Arrays,
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
    end_token: int = 2,
) -> CLIPConfig:
    """The configuration of a state dict, from its shapes.

    Args:
      vision_heads, text_heads: attention heads; by default of 64 channels, as in every published size.
      activation, end_token: see `CLIPConfig`; the defaults are those of OpenAI's models.

    Raises GenError when a needed array is missing or not shaped as in a CLIP, or a width does not fit the heads.
    """
    try:
        patch = weights["vision_model.embeddings.patch_embedding.weight"].shape[2]
        tokens = weights["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
        vocabulary = weights["text_model.embeddings.token_embedding.weight"].shape[0]
        return CLIPConfig(
            vision=_tower(weights, "vision_model", vision_heads),
            text=_tower(weights, "text_model", text_heads),
            size=math.isqrt(tokens) * patch,
            patch=patch,
            vocabulary=vocabulary,
            length=weights["text_model.embeddings.position_embedding.weight"].shape[0],
            projection=weights["text_projection.weight"].shape[0],
            activation=activation,
            end_token=end_token,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is not a CLIP: {error} is missing or misshaped; give a CLIPModel file") from None


IMPORTER = Importer(
    name="clip",
    signature=("logit_scale", "vision_model.pre_layrnorm.weight", "text_projection.weight"),
    config=config,
    rules=rules,
    generator=None,
    ignore=("*.embeddings.position_ids",),
)
