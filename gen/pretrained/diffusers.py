"""Weights in the layout of diffusers: DiT under the names of its DiTTransformer2DModel, and folders with a config.json.

A pipeline folder holds ``transformer/`` and ``vae/``, each with a ``config.json`` and its weights. Every block of
diffusers' DiT has embedders of time and label of its own, all equal in converted networks: ours has one.

diffusers evaluates the time features at the frequencies 10000^(-k / 127), the official code at 10000^(-k / 128): the
published weights were trained with the latter, and we evaluate those.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gen.diffusion.backbones.dit import DiTConfig
from gen.errors import GenError
from gen.pretrained import dit
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import (
    LINEAR,
    SAME,
    Arrays,
    Importer,
    Rule,
    Rules,
    Transform,
    depth_of,
    joined,
    linear,
    patches,
)

__all__ = ["IMPORTER", "component", "config", "is_folder", "rules"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_VECTORS = joined(3, SAME)


def _copies(count: int, inner: Transform) -> Transform:
    """One array of ours, stored once per block."""

    def load(*parts: np.ndarray) -> np.ndarray:
        if any(not np.array_equal(parts[0], part) for part in parts[1:]):
            raise GenError(
                "the blocks' embedders of time or label differ, as they do after training in diffusers; ours has one "
                "for all blocks: give weights that were converted from the official ones"
            )
        return inner.load(parts[0])

    return Transform(load, lambda a: inner.save(a) * count)


def rules(config: DiTConfig) -> Rules:
    """The table of diffusers' names for a configuration."""
    block = "transformer_blocks.{i}."
    own = [f"transformer_blocks.{i}.norm1.emb." for i in range(config.depth)]
    once: list[tuple[str, str, Transform]] = [
        (f"timestep_embedder.linear_{i}.{leaf}", f"time/fc{i}/{ours}", transform)
        for i in (1, 2)
        for leaf, ours, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]
    once.append(("class_embedder.embedding_table.weight", "label/embedding", SAME))
    qkv = [
        Rule(tuple(f"{block}attn1.to_{n}.{leaf}" for n in "qkv"), f"blocks/attn/qkv/{ours}", transform)
        for leaf, ours, transform in (("weight", "kernel", joined(3)), ("bias", "bias", _VECTORS))
    ]
    return [
        Rule("pos_embed.proj.weight", "patch/kernel", patches(config.patch)),
        Rule("pos_embed.proj.bias", "patch/bias"),
        *(Rule(tuple(p + name for p in own), ours, _copies(config.depth, kind)) for name, ours, kind in once),
        *linear(f"{block}norm1.linear", "blocks/ada"),
        *qkv,
        *linear(f"{block}attn1.to_out.0", "blocks/attn/proj"),
        *linear(f"{block}ff.net.0.proj", "blocks/mlp/fc1"),
        *linear(f"{block}ff.net.2", "blocks/mlp/fc2"),
        *linear("proj_out_1", "final_ada"),
        *linear("proj_out_2", "final"),
    ]


def config(weights: Arrays, *, size: int = 32, heads: int | None = None) -> DiTConfig:
    """The configuration of a state dict, from its shapes.

    Args:
      size: side of the latents (``sample_size``), which shapes do not tell.
      heads: attention heads, as for official files.

    Raises GenError when a needed array is missing or not shaped as in a DiT, or the heads are not known.
    """
    names = {
        "x_embedder.proj.weight": "pos_embed.proj.weight",
        "y_embedder.embedding_table.weight": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        "final_layer.linear.weight": "proj_out_2.weight",
        "blocks.0.mlp.fc1.weight": "transformer_blocks.0.ff.net.0.proj.weight",
    }
    for name in names.values():
        if name not in weights:
            raise GenError(f"this is not a DiT of diffusers: {name} is missing; give the file of its transformer")
    known: dict[str, np.ndarray] = {official: weights[name] for official, name in names.items()}
    patch = known["x_embedder.proj.weight"].shape[-1]
    known["pos_embed"] = np.zeros((1, (size // patch) ** 2, 0))
    blocks = depth_of(weights, "transformer_blocks.{i}.attn1.to_q.weight")
    known |= {f"blocks.{i}.attn.qkv.weight": known["pos_embed"] for i in range(blocks)}
    return dit.config(known, heads=heads)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder of diffusers: a pipeline, or one component of it."""
    return _settings(path) is not None or _settings(path / "transformer") is not None


def _settings(folder: Path) -> dict[str, Any] | None:
    """The component's config.json; None where it is none of diffusers'."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "_class_name" in found else None


def component(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray] | None]:
    """What a component's folder (a pipeline's ``transformer``) holds.

    Returns:
      its state dict; the options for its importer that its config.json tells; and, of an autoencoder, the published
      normaliser of its latents: "shift" and "scale" (C,) float32, raw latents are normalised * scale + shift.

    Raises GenError when config.json or the weights are missing, or the component is none that we know.
    """
    folder = folder / "transformer" if _settings(folder) is None else folder
    settings = _settings(folder)
    if settings is None:
        raise GenError(f"{folder} has no config.json of diffusers; give the folder of a pipeline or of its component")
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise GenError(f"{folder} has no {_WEIGHTS[0]}; give the folder with the weights")
    weights = read_weights(file)
    match settings["_class_name"]:
        case "DiTTransformer2DModel" | "Transformer2DModel":
            told = {"size": settings.get("sample_size", 32), "heads": settings.get("num_attention_heads", 16)}
            return weights, told, None
        case "AutoencoderKL":
            channels = int(settings.get("latent_channels", 4))
            normalizer = {
                "shift": np.full(channels, settings.get("shift_factor") or 0.0, np.float32),
                "scale": np.full(channels, 1.0 / (settings.get("scaling_factor") or 0.18215), np.float32),
            }
            return weights, {"groups": settings.get("norm_num_groups", 32)}, normalizer
    raise GenError(f"{folder} holds a {settings['_class_name']}; expected a DiTTransformer2DModel or AutoencoderKL")


IMPORTER = Importer(
    name="dit-diffusers",
    signature=("pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight", "proj_out_1.weight"),
    config=config,
    rules=rules,
    generator=dit.generator,
    ignore=("pos_embed.pos_embed",),  # computed; files of older versions hold it
)
