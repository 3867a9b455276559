"""Tokens on a grid or in a pyramid: the convolutional tokenizers that token generators are trained on.

LlamaGen's VQ tokenizers (Sun et al. 2024, arXiv 2406.06525) and VAR's multi-scale one (Tian et al. 2024, arXiv
2404.02905). MaskGIT's VQGAN is trained by `titok-proxy` (gen.experiments.titok).

Data: ImageNet-1k images at 256 px; VAR's took OpenImages. LlamaGen's recipe (official code): 40 epochs at batch 128,
Adam 1e-4 with betas (0.9, 0.95) and no decay (a flag of 0.05 exists and is not passed on), clipping at 1, bfloat16. L2,
LPIPS, codebook 1 and commitment 0.25; from step 20,000 on a hinge PatchGAN with weight 0.5 and no adaptive weight. They
halve the discriminator's loss as well, which Adam undoes but for the clipping. Random crops and mirror images are ours.

The training of VAR's tokenizer was never released. The preset is its network (108.9 M parameters, 4096 codes of 32
channels, ten scales of 680 tokens) under LlamaGen's losses and schedule, an assumption of ours.

Expected (ImageNet validation, rFID; LlamaGen's README):

| | tokens | codes | rFID |
|---|---|---|---|
| `llamagen-vq16` | 16x16 | 16384 x 8 | 2.19 (PSNR 20.8 dB, SSIM 0.675) |
| `llamagen-vq8` | 32x32 | 16384 x 8 | 0.59 |

Not reproduced here yet; the smoke presets are measured by the tests. Without LPIPS weights (``gen convert lpips``) a
run says what it goes without.
"""

import dataclasses
from typing import Any

from gen.experiments import Recipe
from gen.experiments._tokenizers import (
    SMOKE_EMA,
    adam,
    perceptual,
    smoke_images,
    smoke_optim,
    square_images,
    tokenizer_recipe,
)
from gen.experiments.titok import SMOKE_CODES
from gen.nn.discriminators import PatchGAN
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.var_vqvae import VARVQVAEConfig, var_vqvae
from gen.tokenizers.vqgan import VQGANConfig, vqgan
from gen.training.task import Stage

__all__ = ["PRESETS"]

EPOCH = 10_009  # batches of 128


def _task(tokenizer: VQGANConfig, lr: float = 1e-4, gan_start: int = 20_000) -> AdversarialTask:
    """LlamaGen's losses."""
    optim = adam(lr, (0.9, 0.95), clip=1.0)
    return AdversarialTask(
        tokenizer=tokenizer,
        discriminator=PatchGAN(tokenizer.image[2]),
        optim=optim,
        discriminator_optim=optim,
        quantizer={"commitment": 0.25, "codebook": 1.0},
        terms=perceptual(1.0),
        gan_weight=0.5,
        gan_start=gan_start,
    )


def _paper(name: str, tokenizer: VQGANConfig, data: str) -> Recipe:
    images = square_images(data, random_crop=True, flip=True)
    return tokenizer_recipe(name, [Stage("tokenizer", _task(tokenizer), 40 * EPOCH, 128, images)])


def llamagen_vq16(data: str) -> Recipe:
    """LlamaGen's VQ-16, 16x16 tokens of 16384 codes, 40 epochs (data: images)."""
    return _paper("llamagen-vq16", vqgan("vq-16", dtype="bfloat16"), data)


def llamagen_vq8(data: str) -> Recipe:
    """LlamaGen's VQ-8, 32x32 tokens of 16384 codes, 40 epochs (data: images)."""
    return _paper("llamagen-vq8", vqgan("vq-8", dtype="bfloat16"), data)


def var_vqvae_256(data: str) -> Recipe:
    """VAR's multi-scale tokenizer, 680 tokens of 4096 codes, under LlamaGen's losses (data: images)."""
    return _paper("var-vqvae", dataclasses.replace(var_vqvae(256), dtype="bfloat16"), data)


def vqgan_one_gpu(data: str) -> Recipe:
    """VQ-16 in bfloat16 on one GPU, 300k steps of 32 images at half the rate (data: images)."""
    task = _task(vqgan("vq-16", dtype="bfloat16"), lr=5e-5, gan_start=60_000)
    images = square_images(data, random_crop=True, flip=True)
    return tokenizer_recipe("vqgan-one-gpu", [Stage("tokenizer", task, 300_000, 32, images)])


def _shape(side: int, channels: int) -> dict[str, Any]:
    """A toy network from images to maps of 4x4, of digits, or 8x8."""
    return {
        "image": (side, side, channels),
        "width": 16,
        "mult": (1, 2) if side == 8 else (1, 2, 2),
        "blocks": 1,
        "inner": 16,
        "groups": 4,
    }


def vqgan_smoke(data: str | None = None) -> Recipe:
    """A toy VQGAN, codes of length 1 as running averages, a minute on a laptop: 8x8 digits, or 32 px images (data)."""
    images, side, channels = smoke_images(data)
    codes = dataclasses.replace(SMOKE_CODES, normalize=True)
    return _smoke("vqgan-smoke", VQGANConfig(**_shape(side, channels), quantizer=codes), images)


def var_vqvae_smoke(data: str | None = None) -> Recipe:
    """A toy of VAR's tokenizer, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    scales = (1, 2, 4) if side == 8 else (1, 2, 4, 8)
    quantizer = Residual(256, 8, scales=scales, convolutions=2)
    return _smoke("var-vqvae-smoke", VARVQVAEConfig(**_shape(side, channels), quantizer=quantizer), images)


def _smoke(name: str, tokenizer: VQGANConfig, images: Any) -> Recipe:
    task = TokenizerTask(tokenizer, optim=smoke_optim(), emas=SMOKE_EMA)
    return tokenizer_recipe(name, [Stage("tokenizer", task, 600, 64, images)], smoke=True)


PRESETS = {
    "llamagen-vq16": llamagen_vq16,
    "llamagen-vq8": llamagen_vq8,
    "var-vqvae": var_vqvae_256,
    "vqgan-one-gpu": vqgan_one_gpu,
    "vqgan-smoke": vqgan_smoke,
    "var-vqvae-smoke": var_vqvae_smoke,
}
