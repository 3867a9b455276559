"""l-DeTok: a tokenizer trained to denoise its latents (Yang et al. 2025, arXiv 2507.15856).

Data: ImageNet-1k images at 256 px, centre crops, mirrored at random. Official recipe: batch 1024, 200 epochs, AdamW
4e-4 with betas (0.9, 0.95) and weight decay 1e-4, warm-up over a quarter, cosine, clip 3, EMA 0.999; up to 70 % of the
patches hidden, noise of deviation 3; squared error on [0, 1], LPIPS (the release adds a tenth of a ConvNeXt's logits
and divides by 1.1), KL 1e-6, and from the middle on a hinge GAN term of constant weight 0.5. The decoder is then tuned
alone for 100 epochs, on clean latents, with a tenth of the perceptual term.

Expected (ImageNet 256, FID-50k of MAR trained on these latents, readme): MAR-B 1.61, and 1.55 with the tuned decoder;
MAR-L 1.43 and 1.32. Reconstruction figures are not published. Not reproduced here yet; `detok-smoke` is measured by the
tests.
"""

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
from gen.nn.discriminators import PatchGAN
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.detok import DeTokConfig, LatentDenoising, detok
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.trunk import Tower
from gen.training.ema import Constant
from gen.training.task import Stage

__all__ = ["PRESETS"]

IMAGES = 1_281_167


def _task(tokenizer: DeTokConfig, lr: float, warmup: int, gan_start: int, weight: float, **changes: Any) -> Any:
    optim = adam(lr, (0.9, 0.95), weight_decay=1e-4, schedule="cosine", warmup=warmup, clip=3.0)
    return AdversarialTask(
        tokenizer=tokenizer,
        discriminator=PatchGAN(norm="group"),
        optim=optim,
        discriminator_optim=optim,
        emas=(Constant(0.999),),
        kl=1e-6,
        terms=perceptual(weight),
        gan_weight=0.5,
        gan_start=gan_start,
        **changes,
    )


def _recipe(name: str, data: str, tokenizer: DeTokConfig, batch: int) -> Recipe:
    images, epoch = square_images(data, flip=True), -(-IMAGES // batch)
    rate = batch / 256
    first = _task(tokenizer, 1e-4 * rate, 50 * epoch, 100 * epoch, 1.0, corruption=LatentDenoising())
    second = _task(
        tokenizer, 5e-5 * rate, 5 * epoch, 0, 0.1, train=("from_code/*", "decoder/*", "head/*", "conv_out/*")
    )
    stages = [Stage("denoise", first, 200 * epoch, batch, images), Stage("decoder", second, 100 * epoch, batch, images)]
    return tokenizer_recipe(name, stages)


def detok_bb(data: str) -> Recipe:
    """l-DeTok BB, 200 epochs, and its decoder for 100 more (data: images)."""
    return _recipe("detok-bb", data, detok("B-B", remat="dots"), 1024)


def detok_one_gpu(data: str) -> Recipe:
    """l-DeTok SS in bfloat16 on one GPU, batch 256 (data: images)."""
    return _recipe("detok-one-gpu", data, detok("S-S", dtype="bfloat16", remat="dots"), 256)


def detok_smoke(data: str | None = None) -> Recipe:
    """A toy l-DeTok, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    tower = Tower(64, 2, 4)
    tokenizer = DeTokConfig((side, side, channels), side // 4, smoke_latents(side), tower, tower, scan=False)
    corruption = LatentDenoising(mask=0.3, gamma=1.0)
    denoise = TokenizerTask(tokenizer=tokenizer, optim=smoke_optim(), emas=SMOKE_EMA, l1=1.0, corruption=corruption)
    train = ("from_code/*", "decoder/*", "head/*", "conv_out/*")
    decoder = TokenizerTask(tokenizer=tokenizer, optim=smoke_optim(1e-3), emas=SMOKE_EMA, l1=1.0, train=train)
    stages = [Stage("denoise", denoise, 300, 64, images), Stage("decoder", decoder, 100, 64, images)]
    return tokenizer_recipe("detok-smoke", stages, smoke=True)


PRESETS = {
    "detok-bb": detok_bb,
    "detok-one-gpu": detok_one_gpu,
    "detok-smoke": detok_smoke,
}
