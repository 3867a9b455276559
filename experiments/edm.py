"""EDM: pixel-space diffusion with the design choices of Karras et al. 2022.

Data: image zips, folders or shards at the model's size (CIFAR-10 at 32 px; FFHQ, AFHQv2, ImageNet at 64 px). Paper
recipe: Adam with a linear rise over 10M images, loss summed over pixels (here its mean with Adam's epsilon scaled
alike, which is the same update), non-leaking augmentation instead of flips, average with a half-life in images.

Expected (FID-50k against the training set, minimum of three sets of seeds): CIFAR-10 conditional 1.79 and unconditional
1.97 with 35 calls, ImageNet-64 1.36 with 511 calls (abstract of the paper); FFHQ-64 2.39 with 79 calls (tables that
quote the paper); AFHQv2-64 1.96 with 79 calls (from memory, not checked). Users who retrain unconditional CIFAR-10
report 2.04 to 2.08 (NVlabs/edm issue 16). Not reproduced here yet.
"""

import dataclasses
from typing import Any

from gen.data.edm_augment import EDMAugment
from gen.data.images import Images, Labels
from gen.data.sources import Digits
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import EDMLoss
from gen.diffusion.process import EDM
from gen.diffusion.train import DenoiserTask
from gen.experiments import Recipe
from gen.experiments._latents import small_images
from gen.sampling.edm_samplers import edm_sampler
from gen.sampling.generator import Sampler
from gen.training.ema import Constant, HalfLife
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["ADM64", "CIFAR", "PRESETS", "WIDE64"]

MILLION = 1_000_000
CIFAR = SongUNetConfig(32, augment=9, dropout=0.13)
NCSN: dict[str, Any] = {"embedding": "fourier", "noise": 2, "encoder": "residual", "taps": (1, 3, 3, 1)}
WIDE64 = SongUNetConfig(64, augment=9, mult=(1, 2, 2, 2), dropout=0.05)
ADM64 = DhariwalUNetConfig(dropout=0.1)


def _recipe(
    name: str,
    network: Any,
    data: Any,
    *,
    images: int,
    batch: int,
    lr: float,
    augment: float,
    half_life: float = MILLION / 2,
    rise: float = 10 * MILLION,
    sampler: Sampler | None = None,
    engine: EngineConfig | None = None,
) -> Recipe:
    """A run over `images` images in batches, augmented with probability `augment` (0 for none)."""
    pixels = network.size**2 * network.channels
    task = DenoiserTask(
        Denoiser(network, EDM(), EDMPrecondition(), EDMLoss()),
        optim=OptimConfig(lr, eps=1e-8 / pixels, warmup=rise / batch),
        emas=(HalfLife(half_life),),
        dropout=0.0,
        augment=EDMAugment(augment) if augment else None,
    )
    sampler = sampler or edm_sampler(18 if network.size <= 32 else 40)
    stage = Stage("teacher", task, images // batch, batch, data)
    engine = engine or EngineConfig(checkpoint_every=2000, keep_every=50_000, log_every=100, preview_every=10_000)
    return Recipe(RunConfig(name, (stage,), sampler=sampler, engine=engine))


def _images(path: str, network: Any) -> Images:
    labels: Labels = "class" if network.num_classes else "none"
    return Images(path, network.size, channels=network.channels, labels=labels)


def _cifar(name: str, network: SongUNetConfig, data: str) -> Recipe:
    return _recipe(name, network, _images(data, network), images=200 * MILLION, batch=512, lr=1e-3, augment=0.12)


def edm_cifar10(data: str) -> Recipe:
    """EDM's DDPM++ on CIFAR-10, unconditional, the paper's 200M images (data: images at 32 px)."""
    return _cifar("edm-cifar10", CIFAR, data)


def edm_cifar10_cond(data: str) -> Recipe:
    """EDM's DDPM++ on CIFAR-10, class-conditional, the paper's 200M images (data: images at 32 px)."""
    return _cifar("edm-cifar10-cond", dataclasses.replace(CIFAR, num_classes=10), data)


def edm_cifar10_ncsnpp(data: str) -> Recipe:
    """EDM's NCSN++ on CIFAR-10, unconditional, the paper's 200M images (data: images at 32 px)."""
    return _cifar("edm-cifar10-ncsnpp", dataclasses.replace(CIFAR, **NCSN), data)


def _faces(name: str, dropout: float, data: str) -> Recipe:
    network = dataclasses.replace(WIDE64, dropout=dropout)
    return _recipe(name, network, _images(data, network), images=200 * MILLION, batch=256, lr=2e-4, augment=0.15)


def edm_ffhq64(data: str) -> Recipe:
    """EDM's DDPM++ on FFHQ at 64 px, the paper's 200M images (data: images at 64 px)."""
    return _faces("edm-ffhq64", 0.05, data)


def edm_afhqv2_64(data: str) -> Recipe:
    """EDM's DDPM++ on AFHQv2 at 64 px, the paper's 200M images (data: images at 64 px)."""
    return _faces("edm-afhqv2-64", 0.25, data)


def edm_imagenet64(data: str) -> Recipe:
    """EDM's ADM on ImageNet at 64 px, the paper's 2500M images (data: images at 64 px)."""
    network = dataclasses.replace(ADM64, dtype="bfloat16", remat="full")
    sampler = edm_sampler(256, S_churn=40.0, S_min=0.05, S_max=50.0, S_noise=1.003)
    return _recipe(
        "edm-imagenet64",
        network,
        _images(data, network),
        images=2500 * MILLION,
        batch=4096,
        lr=1e-4,
        augment=0.0,
        half_life=50 * MILLION,
        sampler=sampler,
    )


def edm_cifar10_gpu(data: str) -> Recipe:
    """EDM's DDPM++ on CIFAR-10, class-conditional, 20M images on one GPU (data: images at 32 px)."""
    network = dataclasses.replace(CIFAR, num_classes=10, dtype="bfloat16")
    found = _images(data, network)
    return _recipe(
        "edm-cifar10-gpu", network, found, images=20 * MILLION, batch=256, lr=5e-4, augment=0.12, rise=MILLION
    )


def edm_smoke(data: str | None = None) -> Recipe:
    """A toy EDM, minutes on a laptop: 8x8 digits, or any images at 32 px (data)."""
    network = SongUNetConfig(8, 1, 1, num_classes=10, augment=9, width=16, mult=(1, 2), emb=2, blocks=1, attention=(4,))
    found: Any = Digits("train")
    if data is not None:
        found, classes = small_images(data)
        network = dataclasses.replace(
            network, size=32, channels=3, out_channels=3, num_classes=classes, mult=(1, 2, 2), attention=(8,)
        )
    recipe = _recipe(
        "edm-smoke",
        network,
        found,
        images=64 * 400,
        batch=64,
        lr=2e-3,
        augment=0.12,
        rise=64 * 20,
        engine=EngineConfig(checkpoint_every=100, log_every=20),
    )
    (stage,) = recipe.config.stages
    task = dataclasses.replace(stage.task, emas=(Constant(0.99, warmup=True),))
    return dataclasses.replace(
        recipe, config=dataclasses.replace(recipe.config, stages=(dataclasses.replace(stage, task=task),))
    )


PRESETS = {
    "edm-cifar10": edm_cifar10,
    "edm-cifar10-cond": edm_cifar10_cond,
    "edm-cifar10-ncsnpp": edm_cifar10_ncsnpp,
    "edm-ffhq64": edm_ffhq64,
    "edm-afhqv2-64": edm_afhqv2_64,
    "edm-imagenet64": edm_imagenet64,
    "edm-cifar10-gpu": edm_cifar10_gpu,
    "edm-smoke": edm_smoke,
}
