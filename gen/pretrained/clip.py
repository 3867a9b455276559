"""CLIP weights under the names in which they are published: transformers' ``CLIPModel``, and openai/CLIP's own."""

import math
from pathlib import Path
from typing import Literal

from gen.errors import GenError
from gen.features.bpe import Vocabulary
from gen.features.clip import CLIPConfig, CLIPTowerConfig, model_name
from gen.features.weights import cache_path, store_weights
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import LINEAR, SAME, Arrays, Importer, Rule, Rules, depth_of, joined, linear, patches

__all__ = ["IMPORTER", "OPENAI", "config", "convert", "convert_vocabulary", "openai_config", "openai_rules", "rules"]

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
    """Gives the table of official names for a configuration."""
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


def _tower(weights: Arrays, name: str, heads: int | None) -> CLIPTowerConfig:
    hidden, width = weights[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
    if heads is None and width % _HEAD_WIDTH:
        raise GenError(
            f"CLIP width {width} is not a published size; give its attention heads (vision_heads, text_heads)"
        )
    depth = depth_of(weights, name + ".encoder.layers.{i}.mlp.fc1.weight")
    return CLIPTowerConfig(width, depth, width // _HEAD_WIDTH if heads is None else heads, hidden)


def config(
    weights: Arrays,
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
    end_token: int = 2,
) -> CLIPConfig:
    """Gives the configuration of a state dict, from its shapes.

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


def _openai_blocks(official: str, ours: str) -> Rules:
    layer = f"{official}.resblocks.{{i}}"
    return [
        Rule(f"{layer}.attn.in_proj_weight", f"{ours}/blocks/attn/qkv/kernel", LINEAR),
        Rule(f"{layer}.attn.in_proj_bias", f"{ours}/blocks/attn/qkv/bias"),
        *linear(f"{layer}.attn.out_proj", f"{ours}/blocks/attn/proj"),
        *linear(f"{layer}.mlp.c_fc", f"{ours}/blocks/fc1"),
        *linear(f"{layer}.mlp.c_proj", f"{ours}/blocks/fc2"),
        *_norm(f"{layer}.ln_1", f"{ours}/blocks/norm1"),
        *_norm(f"{layer}.ln_2", f"{ours}/blocks/norm2"),
    ]


def openai_rules(config: CLIPConfig) -> Rules:
    """Gives the table of openai/CLIP's names (ViT-B-32.pt ...), whose projections are stored as they are multiplied."""
    return [
        Rule("logit_scale", "logit_scale"),
        Rule("visual.proj", "project_image/kernel"),
        Rule("text_projection", "project_text/kernel"),
        Rule("visual.class_embedding", "vision/cls"),
        Rule("visual.conv1.weight", "vision/patch/kernel", patches(config.patch)),
        Rule("visual.positional_embedding", "vision/positions"),
        *_norm("visual.ln_pre", "vision/before"),
        *_norm("visual.ln_post", "vision/after"),
        *_openai_blocks("visual.transformer", "vision"),
        Rule("token_embedding.weight", "text/tokens"),
        Rule("positional_embedding", "text/positions"),
        *_norm("ln_final", "text/after"),
        *_openai_blocks("transformer", "text"),
    ]


def openai_config(weights: Arrays, *, vision_heads: int | None = None, text_heads: int | None = None) -> CLIPConfig:
    """Gives the configuration of a state dict of openai/CLIP; see `config`.

    Raises GenError for a width that is not published, where no heads are given, and a network that is no vision
    transformer.
    """

    def tower(name: str, heads: int | None) -> CLIPTowerConfig:
        hidden, width = weights[f"{name}.resblocks.0.mlp.c_fc.weight"].shape
        if heads is None and width % _HEAD_WIDTH:
            raise GenError(f"CLIP width {width} is not a published size; give vision_heads and text_heads")
        depth = depth_of(weights, name + ".resblocks.{i}.mlp.c_fc.weight")
        return CLIPTowerConfig(width, depth, heads or width // _HEAD_WIDTH, hidden)

    try:
        patch = weights["visual.conv1.weight"].shape[2]
        return CLIPConfig(
            vision=tower("visual.transformer", vision_heads),
            text=tower("transformer", text_heads),
            size=math.isqrt(weights["visual.positional_embedding"].shape[0] - 1) * patch,
            patch=patch,
            vocabulary=weights["token_embedding.weight"].shape[0],
            length=weights["positional_embedding"].shape[0],
            projection=weights["visual.proj"].shape[1],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise GenError(f"this is no vision transformer of CLIP: {error} is missing or misshaped; give a ViT") from None


OPENAI = Importer(
    name="openai-clip",
    signature=("logit_scale", "visual.ln_pre.weight", "text_projection"),
    config=openai_config,
    rules=openai_rules,
    generator=None,
    ignore=("input_resolution", "context_length", "vocab_size"),
)


def convert(source: Path, out: Path | None = None) -> str:
    """Reads a published CLIP and keeps it where evaluation looks for it; returns one line on it.

    Args:
      source: a CLIPModel file (.safetensors, .bin) or one of openai/CLIP (ViT-L-14-336px.pt).
      out: the .safetensors file to write; that of the model in the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    weights = read_weights(source)
    importer = OPENAI if all(name in weights for name in OPENAI.signature) else IMPORTER
    network, params, _ = importer.load(weights)
    name = f"clip-{model_name(network)}"
    out = cache_path(name) if out is None else out
    identity = store_weights(out, params, origin=source.name, network=network)
    return f"{name}: identity {identity}; written to {out}"


def convert_vocabulary(source: Path, out: Path | None = None) -> str:
    """Keeps CLIP's vocabulary where evaluation looks for it; returns one line on it.

    Args:
      source: ``bpe_simple_vocab_16e6.txt.gz`` of openai/CLIP, or the folder with vocab.json and merges.txt.
      out: the .json file to write; that of the per-user cache by default.

    Raises GenError when the file cannot be read, or holds something else.
    """
    vocabulary = Vocabulary.read(source)
    out = Vocabulary.place() if out is None else out
    vocabulary.save(out)
    return f"clip-vocabulary: {len(vocabulary.ids)} tokens, identity {vocabulary.fingerprint()}; written to {out}"
