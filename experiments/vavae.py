"""VA-VAE and its baseline (Yao, Yang & Wang 2025, "Reconstruction vs. Generation", arXiv 2501.01423).

Data: ImageNet-1k images at 256 px. Official recipe: the KL autoencoder f16 with 32 channels, batch 256, Adam 1e-4 with
betas (0.5, 0.9), float32, no average; L1 and LPIPS summed over pixels, KL 1e-6, PatchGAN with hinge losses and adaptive
weight 0.5 from batch 2,500 on; the term of the frozen encoder with adaptive weight 0.1 and margins 0.5 and 0.25. The
long run aligns strongly first (weight 0.5, no margins, 100 epochs) and then relaxes (15 epochs at 0.1, 15 with
margins). Published images were not standardised before the encoder, an oversight by its authors' account; here they
are. Official crops keep the shorter side at 256 pixels; ours (ADM's) vary it as well.

The encoder is DINOv2 ViT-L/14 (``gen convert dinov2 dinov2_vitl14_pretrain.pth``) or MAE ViT-L/16 (``gen convert mae
mae_pretrain_vit_large.pth``). Without LPIPS weights (``gen convert lpips``) a run says what it goes without.

Expected (ImageNet validation 256 px, paper, table 2; FID-10K of LightningDiT-B after 160 epochs without guidance):

| | rFID | PSNR | LPIPS | SSIM | generation |
|---|---|---|---|---|---|
| f16d32 plain (`vavae-ldm-f16d32`) | 0.26 | 28.59 | 0.089 | 0.80 | 22.62 |
| f16d32, MAE (`vavae-f16d32-mae`) | 0.28 | 28.33 | 0.091 | 0.80 | 19.89 |
| f16d32, DINOv2 (`vavae-f16d32`) | 0.28 | 27.96 | 0.096 | 0.79 | 15.82 |

The long run (`vavae-f16d32-long`, the released model) keeps rFID 0.28 and helps generation. Not reproduced here yet;
`vavae-smoke` is measured by the tests.
"""

import dataclasses
from typing import Any

import jax

from gen.experiments import Recipe
from gen.experiments._tokenizers import (
    SMOKE_EMA,
    Encoder,
    adam,
    encoder,
    perceptual,
    smoke_images,
    smoke_latents,
    smoke_optim,
    square_images,
    tokenizer_recipe,
)
from gen.features.dinov2 import dinov2
from gen.features.mae import mae
from gen.features.vit import ViTConfig
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.discriminators import PatchGAN
from gen.nn.network import Network
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.kl_vae import KLVAEConfig, kl_vae
from gen.tokenizers.vavae import VAVAETask, VisionFoundation
from gen.training.task import Stage

__all__ = ["PRESETS"]

EPOCH = 5_005  # batches of 256
OPTIM = adam(1e-4, (0.5, 0.9))
PUBLISHED = {"dinov2": dinov2("L"), "mae": mae("L")}
HINTS = {
    "dinov2": "get dinov2_vitl14_pretrain.pth from facebookresearch/dinov2 and run gen convert dinov2 FILE",
    "mae": "get mae_pretrain_vit_large.pth from facebookresearch/mae and run gen convert mae FILE",
}


def _found(name: str, path: str, data: str) -> Encoder:
    """The encoder with its positions resampled as timm does, through which the published runs read it."""
    found = encoder(name, path, HINTS[name], PUBLISHED[name], data)
    return dataclasses.replace(found, network=dataclasses.replace(found.network, antialias=True, offset=0.0))


def _settings(tokenizer: KLVAEConfig, gan_start: int, terms: tuple[Any, ...]) -> dict[str, Any]:
    """Latent diffusion's training of a KL autoencoder."""
    return {
        "tokenizer": tokenizer,
        "discriminator": PatchGAN(),
        "optim": OPTIM,
        "discriminator_optim": OPTIM,
        "l1": 1.0,
        "l2": 0.0,
        "kl": 1e-6,
        "terms": terms,
        "signed": True,
        "summed": True,
        "gan_weight": 0.5,
        "adaptive": AdaptiveWeight(),
        "gan_start": gan_start,
    }


def _aligned(
    name: str, data: str, which: str, path: str, tokenizer: KLVAEConfig, legs: list[tuple[str, int, VisionFoundation]]
) -> Recipe:
    """A run whose stages are (name, epochs, alignment without its encoder's network)."""
    found, settings, stages = _found(which, path, data), _settings(tokenizer, 2_500, perceptual()), []
    for title, epochs, alignment in legs:
        task = VAVAETask(**settings, alignment=dataclasses.replace(alignment, encoder=found.network))
        stages.append(Stage(title, task, epochs * EPOCH, 256, square_images(data, random_crop=True)))
        settings["gan_start"] = 0
    return tokenizer_recipe(name, stages, frozen={"encoder": found.params}, origins={"encoder": found.origin})


PAPER = VisionFoundation(ViTConfig())


def vavae_f16d32(data: str, encoder: str = "") -> Recipe:
    """VA-VAE f16d32 aligned with DINOv2, 50 epochs (data: images)."""
    return _aligned("vavae-f16d32", data, "dinov2", encoder, kl_vae("vavae-f16d32"), [("align", 50, PAPER)])


def vavae_f16d32_mae(data: str, encoder: str = "") -> Recipe:
    """VA-VAE f16d32 aligned with MAE, 50 epochs (data: images)."""
    return _aligned("vavae-f16d32-mae", data, "mae", encoder, kl_vae("vavae-f16d32"), [("align", 50, PAPER)])


def vavae_f16d32_long(data: str, encoder: str = "") -> Recipe:
    """VA-VAE f16d32 as released: aligned with DINOv2 in three stages, 130 epochs (data: images)."""
    strict = dataclasses.replace(PAPER, cosine_margin=0.0, distance_margin=0.0)
    legs = [
        ("strong", 100, dataclasses.replace(strict, weight=0.5)),
        ("relaxed", 15, strict),
        ("margins", 15, PAPER),
    ]
    return _aligned("vavae-f16d32-long", data, "dinov2", encoder, kl_vae("vavae-f16d32"), legs)


def vavae_ldm_f16d32(data: str) -> Recipe:
    """The baseline of VA-VAE: latent diffusion's f16d32 without alignment, 50 epochs (data: images)."""
    task = AdversarialTask(**_settings(kl_vae("vavae-f16d32"), 2_500, perceptual()))
    stage = Stage("autoencoder", task, 50 * EPOCH, 256, square_images(data, random_crop=True))
    return tokenizer_recipe("vavae-ldm-f16d32", [stage])


def vavae_one_gpu(data: str, encoder: str = "") -> Recipe:
    """VA-VAE f16d32 in bfloat16 on one GPU: batch 32, 10 epochs' images (data: images)."""
    tokenizer = kl_vae("vavae-f16d32", dtype="bfloat16", remat="full")
    recipe = _aligned("vavae-one-gpu", data, "dinov2", encoder, tokenizer, [("align", 50, PAPER)])
    (stage,) = recipe.config.stages
    stage = dataclasses.replace(stage, steps=10 * 8 * EPOCH, batch=32)
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, stages=(stage,)))


def vavae_smoke(data: str | None = None) -> Recipe:
    """A toy VA-VAE, a minute on a laptop: 8x8 digits, or images at 32 px (data); its encoder has random weights."""
    images, side, channels = smoke_images(data)
    levels = (1, 2) if side == 8 else (1, 2, 2)
    tokenizer = KLVAEConfig((side, side, channels), 16, levels, 1, smoke_latents(side), smoke_latents(side), groups=4)
    network = ViTConfig(size=8, patch=2, width=32, depth=1, heads=2, hidden=64)
    task = VAVAETask(
        **_settings(tokenizer, 200, ())
        | {
            "discriminator": PatchGAN(channels, 16, 1),
            "optim": smoke_optim(),
            "discriminator_optim": smoke_optim(1e-3),
            "emas": SMOKE_EMA,
            "alignment": dataclasses.replace(PAPER, encoder=network),
        }
    )
    weights = Network(network).init(jax.random.key(0))
    stage = Stage("align", task, 300, 64, images)
    return tokenizer_recipe(
        "vavae-smoke", [stage], frozen={"encoder": weights}, origins={"encoder": "random weights of seed 0"}, smoke=True
    )


PRESETS = {
    "vavae-f16d32": vavae_f16d32,
    "vavae-f16d32-mae": vavae_f16d32_mae,
    "vavae-f16d32-long": vavae_f16d32_long,
    "vavae-ldm-f16d32": vavae_ldm_f16d32,
    "vavae-one-gpu": vavae_one_gpu,
    "vavae-smoke": vavae_smoke,
}
