"""A run under the names and conventions of a published system: one file, or the folder layout of diffusers.

What published code takes for granted (process, prediction, clock, sign, scale) must be what the run was trained with,
else the export is refused: such a file would mean another model. What it leaves to the caller (sampler, guidance, the
latents' normaliser, sizes that shapes do not tell) is written to the header of the file, and obeyed on the way back.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen import arrays
from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.errors import GenError
from gen.files import write_json
from gen.pretrained.rules import Importer
from gen.pretrained.schedulers import obeyed, scheduler_settings, write_scheduler
from gen.pretrained.systems import SYSTEMS, system
from gen.runs import Loaded
from gen.tokenizers.kl_vae import KLVAEConfig

__all__ = ["Described", "described", "export_file", "export_folder", "sampled_as", "system_of"]

_TOLD = ("network", "sampler", "normalizer")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Described:
    """What the header of a file says that we wrote; None or empty for what it does not say.

    Attributes:
      system: the published system whose names the file has.
      network: the configuration of the network.
      sampler: how the run was sampled.
      normalizer: "shift" and "scale" (C,) of the latents that the network works on.
    """

    system: str | None = None
    network: Any = None
    sampler: Any = None
    normalizer: dict[str, np.ndarray] | None = None


def described(path: Path) -> Described:
    """Gives what the header of a weights file says that `export_file` wrote; nothing for other files.

    Raises GenError for a header that was altered, or written by a version with other configurations.
    """
    metadata = arrays.metadata(path) if path.suffix == ".safetensors" else {}
    name = metadata.get("gen.system")
    if name is None:
        return Described()
    try:
        network, sampler, values = (json.loads(metadata.get(f"gen.{key}", "null")) for key in _TOLD)
        normalizer = None if values is None else {k: np.asarray(values[k], np.float32) for k in ("shift", "scale")}
    except (ValueError, TypeError, KeyError) as error:
        raise GenError(f"the header of {path} is damaged ({error}); export the run again") from None
    return Described(
        name,
        from_json(network, system(name).network, "gen.network"),
        None if sampler is None else from_json(sampler, Any, "gen.sampler"),
        normalizer,
    )


def system_of(loaded: Loaded, name: str | None) -> Importer:
    """Gives the system to export to: `name`, or a converted run's own. Raises GenError where neither says, or
    wrongly.
    """
    if name is None:
        name = loaded.config.name.partition(" ")[0]
        if name not in SYSTEMS:
            raise GenError(
                f"{loaded.path} was trained here; say the layout with --system (known: {', '.join(SYSTEMS)})"
            )
    importer = system(name)
    network = _network(loaded, importer)
    if not isinstance(network, importer.network):
        raise GenError(
            f"{loaded.path} holds a {type(network).__name__}, which {name} has no names for; give another --system"
        )
    return importer


def _network(loaded: Loaded, importer: Importer) -> Any:
    return loaded.tokenizer if importer.role == "tokenizer" else loaded.generator.network


def export_file(loaded: Loaded, importer: Importer, out: Path) -> int:
    """Writes the run's network to a .safetensors file under official names; returns the number of arrays.

    Raises GenError, by name, for conventions that published code does not have.
    """
    network = _network(loaded, importer)
    if importer.generator is not None:
        _same_conventions(loaded.generator.subject, importer.generator(network).subject, importer.name)
    weights = importer.save(network, loaded.params[importer.role])
    arrays.write(out, weights, _metadata(loaded, importer))
    return len(weights)


def _same_conventions(ours: Any, published: Any, name: str) -> None:
    """Raises GenError where a denoiser's process or parameterization differs; a token model has neither."""
    for field in {"process", "parameterization"} & to_json(published).keys():
        found, meant = to_json(getattr(ours, field)), to_json(getattr(published, field))
        wrong = [f"{field}.{key} {found.get(key)!r}" for key in {**meant, **found} if found.get(key) != meant.get(key)]
        if wrong:
            raise GenError(
                f"{name} files mean {json.dumps(meant)}, this run has {', '.join(sorted(wrong))}: read back or by "
                "published code it would be another model; keep the run folder, or train with the published conventions"
            )


def _metadata(loaded: Loaded, importer: Importer) -> dict[str, str]:
    found = {"format": "pt", "gen.system": importer.name, "gen.origin": loaded.origin}
    found["gen.network"] = json.dumps(to_json(_network(loaded, importer)))
    if importer.role == "net":
        found["gen.sampler"] = json.dumps(to_json(loaded.generator.sampler))
    if "normalizer" in loaded.params:
        values = {name: np.asarray(value).tolist() for name, value in loaded.params["normalizer"].items()}
        found["gen.normalizer"] = json.dumps(values)
    return found


def export_folder(loaded: Loaded, importer: Importer, out: Path) -> int:
    """Writes the run in the folder layout of diffusers; returns the number of arrays.

    A DiT becomes a pipeline (``transformer``, ``scheduler``, and ``vae`` where the run has one), an autoencoder one
    component. Raises GenError for what the layout has no place for.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise GenError(f"{out} already holds something; give another --out")
    if importer.name == "sd-vae":
        return _write_autoencoder(loaded, out)
    if importer.name != "dit-diffusers":
        raise GenError(f"diffusers has no folder layout for {importer.name}; give an --out that ends in .safetensors")
    network = loaded.denoiser.network
    settings = _dit_settings(network)
    assert importer.generator is not None
    there = obeyed(importer.generator(network), scheduler_settings(loaded.generator))
    _same_conventions(loaded.generator.subject, there.subject, importer.name)
    weights = importer.save(network, loaded.params["net"])
    write_scheduler(out, loaded.generator)
    arrays.write(out / "transformer" / _WEIGHTS, weights, _metadata(loaded, importer))
    write_json(out / "transformer" / "config.json", settings)
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    index["scheduler"] = ["diffusers", str(scheduler_settings(loaded.generator)["_class_name"])]
    count = len(weights)
    if "tokenizer" in loaded.params:
        count += _write_autoencoder(loaded, out / "vae")
        index["vae"] = ["diffusers", "AutoencoderKL"]
    write_json(out / "model_index.json", index)
    return count


def _dit_settings(network: DiTConfig) -> dict[str, Any]:
    """The config.json of a DiTTransformer2DModel. Raises GenError for a DiT that it cannot describe."""
    plain = dataclasses.replace(
        network, num_classes=max(network.num_classes, 1), null_class=True, mlp_ratio=4.0, times=1
    )
    square = len(network.size) == 2 and network.size[0] == network.size[-1]
    if plain != network or not square:
        raise GenError(
            "diffusers' DiT is square and class-conditional with a null class, an MLP ratio of 4 and one time; export "
            "this network as --system dit to a .safetensors file"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": network.width // network.heads,
        "dropout": 0.0,
        "in_channels": network.channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": network.heads,
        "num_embeds_ada_norm": network.num_classes,
        "num_layers": network.depth,
        "out_channels": network.channels * (2 if network.learned_variance else 1),
        "patch_size": network.patch,
        "sample_size": network.size[0],
        "upcast_attention": False,
    }


def _write_autoencoder(loaded: Loaded, out: Path) -> int:
    importer, network = system("sd-vae"), loaded.tokenizer
    if not isinstance(network, KLVAEConfig) or network.inner != network.channels:
        raise GenError(
            f"diffusers has no layout for this {type(network).__name__}; export the network alone (.safetensors)"
        )
    settings = _autoencoder_settings(network) | _latents(loaded.params.get("normalizer"))
    weights = importer.save(network, loaded.params["tokenizer"])
    arrays.write(out / _WEIGHTS, weights, _metadata(loaded, importer))
    write_json(out / "config.json", settings)
    return len(weights)


def _autoencoder_settings(network: KLVAEConfig) -> dict[str, Any]:
    levels = range(len(network.mult))
    down = ["AttnDownEncoderBlock2D" if i in network.attention else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if i in network.decoder_attention else "UpDecoderBlock2D" for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(network.widths),
        "down_block_types": down,
        "in_channels": network.image[-1],
        "latent_channels": network.channels,
        "layers_per_block": network.blocks,
        "mid_block_add_attention": network.middle_attention,
        "norm_num_groups": network.groups,
        "out_channels": network.image[-1],
        "sample_size": network.image[0],
        "up_block_types": up[::-1],
        "use_quant_conv": network.quant_conv,
        "use_post_quant_conv": network.quant_conv,
    }


def _latents(normalizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that say how latents are scaled before the network; nothing for an autoencoder alone."""
    if normalizer is None:
        return {}
    shift, scale = (np.asarray(normalizer[name], np.float64) for name in ("shift", "scale"))
    if (scale == scale[0]).all() and (shift == 0.0).all():
        return {"scaling_factor": round(float(1.0 / scale[0]), 7)}
    return {"latents_mean": shift.tolist(), "latents_std": scale.tolist(), "scaling_factor": 1.0}


def sampled_as(generator: Any, held: Described) -> Any:
    """Gives the generator with the sampler of a file's header, where it says one."""
    return generator if held.sampler is None else dataclasses.replace(generator, sampler=held.sampler)
