"""Weights in the layout of diffusers: DiT under the names of its DiTTransformer2DModel, and folders with a config.json.

A pipeline folder holds ``transformer/`` and ``vae/``, each with a ``config.json`` and its weights. Every block of
diffusers' DiT has embedders of time and label of its own, all equal in converted networks: ours has one.

diffusers evaluates the time features at the frequencies 10000^(-k / 127), the official code at 10000^(-k / 128): the
published weights were trained with the latter, and we evaluate those.
"""

import dataclasses
import json
import re
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
from gen.pretrained.schedulers import read_scheduler

__all__ = ["IMPORTER", "Component", "component", "config", "is_folder", "rules"]

_STEM = "diffusion_pytorch_model"
_ENDS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
# settings of a component that our networks have no choice for: what a config.json may say
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "DiTTransformer2DModel": {
        "norm_type": ("ada_norm_zero",),
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "norm_elementwise_affine": (False,),
        "cross_attention_dim": (None,),
    },
    "AutoencoderKL": {"act_fn": ("silu",)},
}
_FIXED["Transformer2DModel"] = _FIXED["DiTTransformer2DModel"]
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
    """Gives the table of diffusers' names for a configuration."""
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
    """Gives the configuration of a state dict, from its shapes.

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


@dataclasses.dataclass(frozen=True)
class Component:
    """What the folder of one component holds.

    Attributes:
      weights: its state dict.
      file: where they stood: the file, or the index of several.
      entry: the folder that was taken where the pipeline has two ("transformer_ema"), else "".
      options: for its importer, from config.json.
      normalizer: of an autoencoder, the published one of its latents: "shift" and "scale" (C,) float32, raw latents
        are normalised * scale + shift; else None.
      scheduler: of a pipeline's network, the settings of its sampler (`gen.pretrained.schedulers`); else None.
    """

    weights: Arrays
    file: Path
    entry: str
    options: dict[str, Any]
    normalizer: dict[str, np.ndarray] | None
    scheduler: dict[str, Any] | None


def is_folder(path: Path) -> bool:
    """Tells whether `path` is a folder of diffusers: a pipeline, or one component of it."""
    return any(_settings(place) is not None for place in (path, path / "transformer", path / "transformer_ema"))


def _settings(folder: Path) -> dict[str, Any] | None:
    """The component's config.json; None where it is none of diffusers'."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "_class_name" in found else None


def component(folder: Path, key: str | None = None) -> Component:
    """Gives what a component's folder holds; of a pipeline, its network.

    Args:
      folder: a component, or a pipeline with ``transformer/``, beside which training scripts keep the averaged weights
        in ``transformer_ema/``: they are taken where they are.
      key: which of the two instead.

    Raises GenError when config.json or the weights are missing, the component is none that we know, or its settings
    describe another network than ours.
    """
    entry, pipeline = "", folder
    if _settings(folder) is None:
        places = [name for name in ("transformer_ema", "transformer") if _settings(folder / name) is not None]
        if not places or (key is not None and key not in places):
            raise GenError(
                f"{folder} has no {key or 'transformer'} with a config.json of diffusers; give a pipeline's folder"
            )
        entry = places[0] if key is None else key
        folder, entry = folder / entry, entry if len(places) > 1 else ""
    elif key is not None:
        raise GenError(f"{folder} is one component, without an entry '{key}'; leave out --key")
    settings = _settings(folder)
    assert settings is not None
    kind = settings["_class_name"]
    if kind not in _FIXED:
        raise GenError(f"{folder} holds a {kind}; expected a DiTTransformer2DModel or AutoencoderKL")
    for name, allowed in _FIXED[kind].items():
        if name in settings and settings[name] not in allowed:
            raise GenError(
                f"{folder} has {name} {settings[name]!r} in config.json; ours has {allowed[0]!r}: not this network"
            )
    file = _file(folder)
    weights = read_weights(file)
    if kind == "AutoencoderKL":
        return Component(
            weights, file, entry, {"groups": settings.get("norm_num_groups", 32)}, _normalizer(settings), None
        )
    told = {"size": settings.get("sample_size", 32), "heads": settings.get("num_attention_heads", 16)}
    return Component(weights, file, entry, told, None, read_scheduler(pipeline) if pipeline != folder else None)


def _normalizer(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """(z - mean) / std, then (z - shift_factor) * scaling_factor, as pipelines apply them before the network."""
    channels = int(settings.get("latent_channels", 4))
    mean = np.broadcast_to(np.asarray(settings.get("latents_mean") or 0.0, np.float64).reshape(-1), channels)
    deviation = np.broadcast_to(np.asarray(settings.get("latents_std") or 1.0, np.float64).reshape(-1), channels)
    shift, factor = settings.get("shift_factor") or 0.0, settings.get("scaling_factor") or 0.18215
    return {"shift": (mean + deviation * shift).astype(np.float32), "scale": (deviation / factor).astype(np.float32)}


def _file(folder: Path) -> Path:
    """The weights of a component: in full precision where the folder has several, whole or as the index of parts."""
    whole = [folder / f"{_STEM}{end}" for end in _ENDS if (folder / f"{_STEM}{end}").is_file()]
    if whole:
        return whole[0]
    parts = re.compile(r"-\d+-of-\d+")
    names = sorted(p.name for p in folder.glob(f"{_STEM}.*") if p.name.endswith(_ENDS) and not parts.search(p.name))
    variants = sorted({name.removeprefix(f"{_STEM}.").partition(".")[0] for name in names})
    if len(variants) > 1:
        raise GenError(f"{folder} has weights of the variants {', '.join(variants)}; leave the one that is meant there")
    if not names:
        raise GenError(f"{folder} has no {_STEM}.safetensors; give the folder with the weights")
    return folder / names[0]


IMPORTER = Importer(
    name="dit-diffusers",
    signature=("pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight", "proj_out_1.weight"),
    config=config,
    rules=rules,
    generator=dit.generator,
    ignore=("pos_embed.pos_embed",),  # computed; files of older versions hold it
)
