"""ViTok: a plain vision transformer as autoencoder (Hansen-Estruch et al. 2025, arXiv 2501.09755).

Data: images at 256 px (the paper mixes ImageNet-1k with a licensed set). Recipe of the release: S-B/16 with 16
channels, batch 1024, 100k steps, AdamW 4e-4 with betas (0.9, 0.95) and weight decay 1e-4, warm-up over 3 %, cosine to
1e-5, clip 1; squared error and a tenth of the absolute one on [-1, 1] (the release smooths the latter at 0.05), LPIPS,
and 1e-3 of the KL as a mean over latents. Second stage (paper): the encoder stays, the decoder is tuned against a
StyleGAN discriminator with hinge losses; its settings here follow the release's optional ones. Settings of its
averages are not published.

Expected (ImageNet validation, rFID, PSNR, SSIM; paper, table 2): S-B/16 at 256 px 0.50, 24.36, 0.747, after the first
stage alone 1.63, 26.1, 0.79 (`vitok-s-b-16`); S-L/16 0.46, 24.74, 0.758. Video (UCF-101, 16 frames of 128 px, rFVD and
PSNR): S-B/4x8 8.04, 30.11. Not reproduced here yet; `vitok-smoke` is measured by the tests.
"""

import dataclasses
import math
from typing import Any

from gen.experiments import Recipe
from gen.experiments._tokenizers import (
    SMOKE_EMA,
    adam,
    perceptual,
    smoke_images,
    smoke_latents,
    smoke_optim,
    square_images,
    tokenizer_recipe,
)
from gen.nn.discriminators import StyleGAN
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.trunk import Tower
from gen.tokenizers.vitok import ViTokConfig, vitok
from gen.training.task import Stage

__all__ = ["PRESETS"]

DECODER = ("from_code/*", "decoder/*", "unembed/*")


def _settings(tokenizer: ViTokConfig, batch: int, steps: int, terms: tuple[Any, ...]) -> dict[str, Any]:
    rate = batch / 256
    optim = adam(
        1e-4 * rate, (0.9, 0.95), weight_decay=1e-4, schedule="cosine", final=0.1 / rate, warmup=0.03 * steps, clip=1.0
    )
    return {
        "tokenizer": tokenizer,
        "optim": optim,
        "l2": 1.0,
        "l1": 0.1,
        "kl": 1e-3 / math.prod(tokenizer.spec.shape),
        "terms": terms,
        "signed": True,
    }


def _recipe(name: str, data: str, tokenizer: ViTokConfig, batch: int, steps: int) -> Recipe:
    images = square_images(data, random_crop=True, flip=True)
    settings = _settings(tokenizer, batch, steps, perceptual())
    rate = batch / 256
    second = AdversarialTask(
        **settings,
        discriminator=StyleGAN((tokenizer.image[0], tokenizer.image[-1])),
        discriminator_optim=dataclasses.replace(settings["optim"], lr=2e-5 * rate, warmup=0.025 * steps),
        gan_weight=0.1,
        gan_delay=round(5_000 / rate),
        gan_ramp=round(50_000 / rate),
        train=DECODER,
    )
    stages = [
        Stage("reconstruct", TokenizerTask(**settings), steps, batch, images),
        Stage("decoder", second, steps, batch, images),
    ]
    return tokenizer_recipe(name, stages)


def vitok_s_b_16(data: str) -> Recipe:
    """ViTok S-B/16 with 16 channels, both stages (data: images)."""
    return _recipe("vitok-s-b-16", data, vitok("S-B/16", dtype="bfloat16", remat="dots"), 1024, 100_000)


def vitok_s_l_16(data: str) -> Recipe:
    """ViTok S-L/16 with 16 channels, both stages (data: images)."""
    return _recipe("vitok-s-l-16", data, vitok("S-L/16", dtype="bfloat16", remat="dots"), 1024, 100_000)


def vitok_one_gpu(data: str) -> Recipe:
    """ViTok S-B/16 on one GPU: batch 256, both stages (data: images)."""
    return _recipe("vitok-one-gpu", data, vitok("S-B/16", dtype="bfloat16", remat="dots"), 256, 100_000)


def vitok_smoke(data: str | None = None) -> Recipe:
    """A toy ViTok, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    tower = Tower(64, 2, 4)
    tokenizer = ViTokConfig(
        (side, side, channels), side // 4, 1, smoke_latents(side), tower, tower, positions="2d", scan=False
    )
    settings = _settings(tokenizer, 64, 300, ()) | {"optim": smoke_optim(), "emas": SMOKE_EMA, "kl": 1e-6}
    second = AdversarialTask(
        **settings | {"optim": smoke_optim(1e-3)},
        discriminator=StyleGAN((side, channels), 1 / 16),
        discriminator_optim=smoke_optim(1e-3),
        gan_weight=0.001,
        gan_delay=20,
        gan_ramp=50,
        train=DECODER,
    )
    stages = [
        Stage("reconstruct", TokenizerTask(**settings), 300, 64, images),
        Stage("decoder", second, 100, 64, images),
    ]
    return tokenizer_recipe("vitok-smoke", stages, smoke=True)


PRESETS = {
    "vitok-s-b-16": vitok_s_b_16,
    "vitok-s-l-16": vitok_s_l_16,
    "vitok-one-gpu": vitok_one_gpu,
    "vitok-smoke": vitok_smoke,
}
