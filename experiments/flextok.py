"""FlexTok: images as an ordered sequence of 1 to 256 tokens (Bachmann et al. 2025, arXiv 2502.13967).

Data: ImageNet-1k at 256 px (gen data convert), mirrored at random, and a KL autoencoder of factor 8 with 16 channels as
the tokenizer, whose latents are divided by the deviation that its normaliser says, where it has one. The authors
published neither training code nor all settings. From the released modules: FSQ 8-8-8-5-5-5, powers of two as numbers
of tokens, times by SD3's mode law with scale 0.25, Euler with APG. From the paper and public derivatives, not checked
against the authors: AdamW (0.9, 0.99), weight decay 0.05, warm-up and cosine, batch 2048, bfloat16, clipping at 1, EMA
0.998, 200 billion latent tokens; a rate of 5.62e-4 at width 256 under muP, taken here as 5.62e-4 * 256 / width;
an alignment of the second decoder block with DINOv2-L features of weight 1, which these runs have where gen convert
dinov2 has put its weights, and say so.

Expected (rFID on the 50k ImageNet validation images, 256 tokens): d18-d28 1.45, d18-d18 1.61, d12-d12 4.20 (paper; the
last two from memory). Not reproduced here yet. The smoke run's results are in `flextok_smoke`.
"""

import dataclasses
from typing import Any

import numpy as np

from gen.data.images import Images
from gen.data.sources import Digits
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._latents import small_images
from gen.features.dinov2 import DINOv2Extractor
from gen.runs import Loaded
from gen.tokenizers.flextok import FlexTokConfig, Pixels, euler_apg, flextok
from gen.tokenizers.flextok_train import Alignment, FlexTokTask
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.titok import Tower
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]


def _latent(name: str, size: str, data: str, tokenizer: Loaded, *, steps: int, batch: int) -> Recipe:
    first = tokenizer.tokenizer
    if not isinstance(first, KLVAEConfig):
        raise GenError(f"FlexTok works on the latents of a KL autoencoder, not of {type(first).__name__}; give its run")
    config = flextok(size, first=first, scaling=_scaling(tokenizer), dtype="bfloat16")
    alignment, frozen, origins = None, {"first": tokenizer.params["tokenizer"]}, {"first": tokenizer.origin}
    extractor = DINOv2Extractor()
    if extractor.path.exists():
        alignment, frozen["encoder"] = Alignment(extractor.network), extractor.load()
        origins["encoder"] = f"dinov2 {extractor.fingerprint()}"
    task = FlexTokTask(
        tokenizer=config,
        alignment=alignment,
        optim=OptimConfig(
            5.62e-4 * 256 / config.decoder.width,
            betas=(0.9, 0.99),
            weight_decay=0.05,
            schedule="cosine",
            warmup=5000,
            clip=1.0,
        ),
        emas=(Constant(0.998),),
    )
    stage = Stage("flextok", task, steps, batch, Images(data, first.image[0], flip=True, labels="none"))
    engine = EngineConfig(checkpoint_every=10_000, keep_every=100_000, log_every=100)
    print(f"alignment: {'none, for there are no weights of DINOv2' if alignment is None else origins['encoder']}")
    return Recipe(RunConfig(name, (stage,), origins, engine=engine), frozen=frozen)


def _scaling(tokenizer: Loaded) -> float:
    if "normalizer" not in tokenizer.params:
        return 1.0
    return float(1.0 / np.mean(tokenizer.params["normalizer"]["scale"]))


def flextok_d18_d28(data: str, tokenizer: Loaded) -> Recipe:
    """FlexTok d18-d28, the paper's largest (data: ImageNet at 256 px; tokenizer: a KL autoencoder, f8, 16 channels)."""
    return _latent("flextok-d18-d28", "d18-d28", data, tokenizer, steps=380_000, batch=2048)


def flextok_d18_d18(data: str, tokenizer: Loaded) -> Recipe:
    """FlexTok d18-d18 (data: ImageNet at 256 px; tokenizer: a KL autoencoder, f8, 16 channels)."""
    return _latent("flextok-d18-d18", "d18-d18", data, tokenizer, steps=380_000, batch=2048)


def flextok_d12_d12(data: str, tokenizer: Loaded) -> Recipe:
    """FlexTok d12-d12 on one GPU (data: ImageNet at 256 px; tokenizer: a KL autoencoder, f8, 16 channels)."""
    return _latent("flextok-d12-d12", "d12-d12", data, tokenizer, steps=400_000, batch=256)


def flextok_smoke(data: str | None = None) -> Recipe:
    """A toy FlexTok of pixels, two minutes on a laptop: 8x8 digits in 1 to 16 tokens, or images at 32 px (data)."""
    tower = Tower(64, 2, 4)
    config = FlexTokConfig(
        first=Pixels((8, 8, 1)),
        tokens=16,
        encoder=tower,
        decoder=dataclasses.replace(tower, depth=3),
        quantizer=FSQ((5, 5, 5)),
        length=8,
        frequencies=64,
        max_time=1.0,
        decoding=euler_apg(1.0, steps=10),
        remat="none",
        scan=False,
    )
    images: Any = Digits("train")
    if data is not None:
        images, _ = small_images(data)
        images = dataclasses.replace(images, labels="none")
        config = dataclasses.replace(config, first=Pixels((32, 32, 3)), patch=4)
    optim = OptimConfig(3e-3, betas=(0.9, 0.99), schedule="cosine", warmup=50, final=0.05, clip=1.0)
    task = FlexTokTask(tokenizer=config, optim=optim, emas=(Constant(0.99, warmup=True),), dropout=0.1)
    stage = Stage("flextok", task, 2500, 64, images)
    engine = EngineConfig(checkpoint_every=250, checkpoint_seconds=5.0, log_every=25)
    return Recipe(RunConfig("flextok-smoke", (stage,), engine=engine))


PRESETS = {
    "flextok-d18-d28": flextok_d18_d28,
    "flextok-d18-d18": flextok_d18_d18,
    "flextok-d12-d12": flextok_d12_d12,
    "flextok-smoke": flextok_smoke,
}
