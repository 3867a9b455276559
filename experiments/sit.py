"""SiT and REPA: interpolants on DiT's network (Ma et al. 2024; Yu et al. 2025).

Data: a latent cache of ImageNet-1k at 256 px by the SD-VAE (f8, 4 channels). Recipe: DiT's (AdamW 1e-4 constant, batch
256, EMA 0.9999, label dropout 0.1) with linear path and velocity prediction. REPA adds 0.5 times the alignment of the
8th block with DINOv2 ViT-B/14 features of the clean image, which the cache must hold beside the latents as
``encoder_0`` (N, 256, 768; ``gen encode --align``), and clips gradients to 1; it uses no horizontal flips.

Expected (ImageNet-256, FID-50k against the ADM reference batch): SiT-XL/2 after 7M steps 8.3 (SDE) and 9.4 (ODE)
unguided; with scale 1.5 on three channels 2.06 (SDE 250, `sit_xl2`) and 2.15 (ODE) (official README); after 400k steps,
SDE, unguided: XL/2 17.2, L/2 18.8, B/2 33.0 (`sit_b2`), S/2 57.6 (table 1 of the paper). REPA-XL/2 after 4M steps:
1.42 with scale 1.8 for t <= 0.7 on all channels (`repa_xl2`, official README). Not reproduced here yet.
"""

import math

from gen.data.random import RANDOM
from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.sit import parameterization, sit
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import Aligned, VelocityMatching
from gen.diffusion.process import Linear
from gen.experiments import Recipe
from gen.experiments._latents import adamw, encoded_rows, latent_recipe, smoke_recipe
from gen.pretrained.sit import sampler
from gen.runs import Loaded
from gen.sampling.guidance import ClassifierFree, Interval
from gen.training.run import EngineConfig

__all__ = ["PRESETS"]


def _denoiser(network: DiTConfig) -> Denoiser:
    return Denoiser(network, Linear(), parameterization(network))


def sit_xl2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """SiT-XL/2 on ImageNet-256 latents, the paper's 7M steps (data: a latent cache)."""
    return latent_recipe(
        "sit-xl2",
        _denoiser(sit("XL/2", dtype="bfloat16")),
        data,
        tokenizer,
        sampler=sampler(guidance=ClassifierFree(1.5, channels=3)),
        steps=7_000_000,
        batch=256,
    )


def sit_b2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """SiT-B/2 on ImageNet-256 latents, 400k steps on one GPU (data: a latent cache)."""
    return latent_recipe(
        "sit-b2",
        _denoiser(sit("B/2", dtype="bfloat16", remat="none", scan=False)),
        data,
        tokenizer,
        sampler=sampler(),
        steps=400_000,
        batch=256,
    )


def repa_xl2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """SiT-XL/2 aligned with DINOv2 (REPA), 4M steps (data: a latent cache with encoder_0 beside the latents)."""
    features = (256, 768 if data == RANDOM else encoded_rows(data)["encoder_0"].shape[-1])
    network = AlignedConfig(sit("XL/2", dtype="bfloat16"), "block_7", features[1:])
    return latent_recipe(
        "repa-xl2",
        Denoiser(network, Linear(), Predict("velocity"), Aligned(VelocityMatching())),
        data,
        tokenizer,
        sampler=sampler(guidance=Interval(ClassifierFree(1.8), 0.0, 0.7)),
        steps=4_000_000,
        batch=256,
        optim=adamw(clip=1.0),
        beside={"encoder_0": features},
    )


def sit_smoke(data: str | None = None) -> Recipe:
    """A toy SiT, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    network = DiTConfig((8, 8), 1, 2, 64, 3, 4, num_classes=10, remat="none", scan=False)
    return smoke_recipe(
        "sit-smoke",
        _denoiser(network),
        data,
        sampler=sampler("sde", 50, ClassifierFree(1.5)),
    )


def repa_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy REPA, minutes on a laptop (data: any small latent cache with encoder_0 beside the latents)."""
    rows = encoded_rows(data)
    *size, channels = rows["latent"].shape[1:]
    tokens, width = features = rows["encoder_0"].shape[1:]
    patch = round((math.prod(size) / tokens) ** (1 / len(size)))
    classes = int(rows["label"].max()) + 1
    network = DiTConfig(tuple(size), channels, patch, 64, 3, 4, num_classes=classes, remat="none", scan=False)
    return latent_recipe(
        "repa-smoke",
        Denoiser(
            AlignedConfig(network, "block_1", (width,), 128), Linear(), Predict("velocity"), Aligned(VelocityMatching())
        ),
        data,
        tokenizer,
        sampler=sampler("sde", 50, ClassifierFree(1.5)),
        steps=400,
        batch=64,
        optim=adamw(2e-3, (0.9, 0.99), clip=1.0),
        beside={"encoder_0": features},
        engine=EngineConfig(checkpoint_every=100, log_every=20),
    )


PRESETS = {"sit-xl2": sit_xl2, "sit-b2": sit_b2, "repa-xl2": repa_xl2, "sit-smoke": sit_smoke, "repa-smoke": repa_smoke}
