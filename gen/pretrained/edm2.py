"""Official EDM2 weights (NVlabs/edm2): names, shapes and the official sampler."""

import dataclasses
import re
from typing import Any

import numpy as np

from gen.diffusion.backbones.edm2_unet import EDM2Config, Layer
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import EDMLoss, Uncertain
from gen.diffusion.process import EDM
from gen.errors import GenError
from gen.pretrained.rules import CONV, LINEAR, Arrays, Importer, Rule, Rules, depth_of
from gen.sampling.edm_samplers import edm_sampler
from gen.sampling.generator import DiffusionGenerator
from gen.tokenizers.base import Affine

__all__ = ["IMPORTER", "NORMALIZER", "config", "generator", "rules"]

# the SD-VAE's raw latents <-> what the 512 px networks are trained on (training/encoders.py of NVlabs/edm2)
NORMALIZER = Affine(
    np.array([5.81, 3.25, 0.12, -2.15], np.float32), np.array([4.17, 4.62, 3.71, 3.28], np.float32) / np.float32(0.5)
)


def rules(config: EDM2Config) -> Rules:
    """Gives the table of official names for a configuration. Raises GenError for networks with two times."""
    if config.times != 1:
        raise GenError("EDM2 files have no place for a second time; import or export a network with times=1")
    rows = [
        Rule("unet.out_gain", "out_gain"),
        *_fourier("unet.emb_fourier", "emb_fourier"),
        Rule("unet.emb_noise.weight", "emb_noise/kernel", LINEAR),
        Rule("unet.out_conv.weight", "out_conv/kernel", CONV),
    ]
    if config.num_classes:
        rows.append(Rule("unet.emb_label.weight", "emb_label/kernel", LINEAR))
    for side, plan in (("enc", config.encoder_plan()), ("dec", config.decoder_plan())):
        for layer in plan:
            rows += _layer(layer, f"unet.{side}.{layer.name}", f"{side}/{layer.name}")
    if config.uncertainty:
        rows += _fourier("logvar_fourier", "logvar_fourier")
        rows.append(Rule("logvar_linear.weight", "logvar_linear/kernel", LINEAR))
    return rows


def _fourier(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.{name}", f"{ours}/{name}") for name in ("freqs", "phases")]


def _layer(layer: Layer, official: str, ours: str) -> list[Rule]:
    if layer.name.endswith("_conv"):
        return [Rule(f"{official}.weight", f"{ours}/kernel", CONV)]
    convolutions = ["conv_res0", "conv_res1"]
    convolutions += ["conv_skip"] if layer.inputs != layer.outputs else []
    convolutions += ["attn_qkv", "attn_proj"] if layer.heads else []
    return [
        Rule(f"{official}.emb_gain", f"{ours}/emb_gain"),
        Rule(f"{official}.emb_linear.weight", f"{ours}/emb_linear/kernel", LINEAR),
        *(Rule(f"{official}.{name}.weight", f"{ours}/{name}/kernel", CONV) for name in convolutions),
    ]


def config(weights: Arrays, *, head_width: int = 64) -> EDM2Config:
    """Gives the configuration of a state dict, from its names and shapes.

    Args:
      head_width: channels per attention head; shapes do not tell, 64 in all published networks.

    Raises GenError when a needed array is missing or not shaped as in an EDM2 network.
    """
    try:
        sizes = sorted({int(m[1]) for m in map(re.compile(r"unet\.enc\.(\d+)x").match, weights) if m}, reverse=True)
        top = f"unet.enc.{sizes[0]}x{sizes[0]}"
        widths = tuple(weights[f"unet.enc.{s}x{s}_block0.conv_res1.weight"].shape[0] for s in sizes)
        emb, noise = weights["unet.emb_noise.weight"].shape
        return EDM2Config(
            size=sizes[0],
            channels=weights[f"{top}_conv.weight"].shape[1] - 1,
            num_classes=weights["unet.emb_label.weight"].shape[1] if "unet.emb_label.weight" in weights else 0,
            widths=widths,
            noise=0 if noise == widths[0] else noise,
            emb=0 if emb == max(widths) else emb,
            blocks=depth_of(weights, f"{top}_block{{i}}.conv_res0.weight"),
            attention=tuple(s for s in sizes if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in weights),
            head_width=head_width,
            uncertainty=weights["logvar_linear.weight"].shape[1] if "logvar_linear.weight" in weights else 0,
        )
    except (KeyError, IndexError) as error:
        raise GenError(f"this is not an EDM2 network: {error} is missing or misshaped; give an official file") from None


def generator(config: EDM2Config, steps: int = 32, guidance: Any = None) -> DiffusionGenerator:
    """Gives the official sampler: Heun's method on the rho grid, 63 network calls.

    Networks of 4 channels work on latents of the SD-VAE, normalised by `NORMALIZER`.

    Args:
      guidance: none by default; published scores use `gen.sampling.guidance.Autoguidance`, or an unconditional network
        as the guide.
    """
    sampler = edm_sampler(steps)
    if guidance is not None:
        sampler = dataclasses.replace(sampler, guidance=guidance)
    # noise levels of the published runs (train_edm2.py): on latents, and on pixels
    loss = EDMLoss(-0.4, 1.0) if config.channels == 4 else EDMLoss(-0.8, 1.6)
    denoiser = Denoiser(config, EDM(), EDMPrecondition(), Uncertain(loss) if config.uncertainty else loss)
    return DiffusionGenerator(denoiser, sampler)


IMPORTER = Importer(
    name="edm2",
    signature=("unet.out_gain", "unet.emb_fourier.freqs", "unet.emb_noise.weight"),
    config=config,
    rules=rules,
    generator=generator,
    normalizer=NORMALIZER,
)
