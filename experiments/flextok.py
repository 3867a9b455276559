"""FlexTok: images as an ordered sequence of 1 to 256 tokens (Bachmann et al. 2025, arXiv 2502.13967).

Data: ImageNet-1k images at 256 px, mirrored at random, and as the tokenizer a KL autoencoder of factor 8 with 16
channels (`flextok_vae_c16`, or the published one), whose latents are divided by the deviation that its normaliser says,
where it has one. The authors published neither training code nor all settings. From the released modules: FSQ
8-8-8-5-5-5, powers of two as numbers of tokens, times by SD3's mode law with scale 0.25, Euler with APG. From the paper
and public derivatives, not checked against the authors: AdamW (0.9, 0.99), weight decay 0.05, warm-up and cosine, batch
2048, bfloat16, clipping at 1, EMA 0.998, 200 billion latent tokens; a rate of 5.62e-4 at width 256 under muP, taken
here as 5.62e-4 * 256 / width; an alignment of the second decoder block with DINOv2-L features of weight 1, which these
runs have where gen convert dinov2 has put its weights, and say so.

`flextok-ar` writes the tokens, in order, with a class. Its data are tokens (``gen encode FLEXTOK --data IMAGENET``).
The recipe of the authors' models is not published beyond class dropout, next-token cross-entropy and sizes; ours is
LlamaGen's optimiser. They sample with guidance 1.5; the decoder draws 20 to 25 steps with guidance 7.5.

Expected (rFID on the 50k ImageNet validation images, 256 tokens): d18-d28 1.45, d18-d18 1.61, d12-d12 4.20 (paper; the
last two from memory); FID of samples of the largest class-conditional model 1.86 with 32 tokens (from memory). Not
reproduced here yet. What the toy gives stands at `flextok_smoke`.
"""

import dataclasses

import numpy as np

from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.flextok_ar import FlexTokARConfig
from gen.autoregressive.sampler import TokenSampler
from gen.data.random import RANDOM
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._tokenizers import SMOKE_EMA, adam, perceptual, smoke_images, square_images, tokenizer_recipe
from gen.experiments._tokenizers import encoder as foundation
from gen.experiments._tokens import adamw, cache_of, classes_of, smoke_optim, token_recipe
from gen.features.dinov2 import dinov2
from gen.features.weights import cache_path
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.discriminators import PatchGAN
from gen.runs import Loaded
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.flextok import FlexTokConfig, Pixels, euler_apg, flextok
from gen.tokenizers.flextok_train import Alignment, FlexTokTask
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.titok import Tower
from gen.training.ema import Constant
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]

HINT = "get dinov2_vitl14_pretrain.pth from facebookresearch/dinov2 and run gen convert dinov2 FILE"


def _latent(name: str, size: str, data: str, tokenizer: Loaded, encoder: str, *, steps: int, batch: int) -> Recipe:
    first = tokenizer.tokenizer
    if not isinstance(first, KLVAEConfig):
        raise GenError(f"FlexTok works on the latents of a KL autoencoder, not of {type(first).__name__}; give its run")
    config = flextok(size, first=first, scaling=_scaling(tokenizer), dtype="bfloat16")
    alignment, frozen, origins = None, {"first": tokenizer.params["tokenizer"]}, {"first": tokenizer.origin}
    if encoder or data == RANDOM or cache_path("dinov2").exists():
        found = foundation("dinov2", encoder, HINT, dinov2("L"), data)
        alignment, frozen["encoder"], origins["encoder"] = Alignment(found.network), found.params, found.origin
    else:
        print(f"trained without alignment, for there are no weights of DINOv2; {HINT}")
    optim = adam(
        5.62e-4 * 256 / config.decoder.width,
        (0.9, 0.99),
        weight_decay=0.05,
        schedule="cosine",
        warmup=5000,
        clip=1.0,
    )
    task = FlexTokTask(tokenizer=config, alignment=alignment, optim=optim, emas=(Constant(0.998),))
    stage = Stage("flextok", task, steps, batch, square_images(data, first.image[0], flip=True))
    engine = EngineConfig(checkpoint_every=10_000, keep_every=100_000, log_every=100)
    return Recipe(RunConfig(name, (stage,), origins, engine=engine), frozen=frozen)


def _scaling(tokenizer: Loaded) -> float:
    if "normalizer" not in tokenizer.params:
        return 1.0
    return float(1.0 / np.mean(tokenizer.params["normalizer"]["scale"]))


def flextok_vae_c16(data: str) -> Recipe:
    """The first stage of FlexTok, a KL autoencoder f8 with 16 channels, by latent diffusion's recipe (data: images)."""
    task = AdversarialTask(
        tokenizer=KLVAEConfig(channels=16, inner=16),
        discriminator=PatchGAN(),
        optim=adam(1e-4, (0.5, 0.9)),
        discriminator_optim=adam(1e-4, (0.5, 0.9)),
        l1=1.0,
        l2=0.0,
        kl=1e-6,
        terms=perceptual(),
        signed=True,
        summed=True,
        gan_weight=0.5,
        adaptive=AdaptiveWeight(),
        gan_start=2_500,
    )
    stage = Stage("autoencoder", task, 250_000, 256, square_images(data, random_crop=True, flip=True))
    return tokenizer_recipe("flextok-vae-c16", [stage])


def flextok_d18_d28(data: str, tokenizer: Loaded, encoder: str = "") -> Recipe:
    """FlexTok d18-d28, the paper's largest (data: ImageNet at 256 px; tokenizer: a KL autoencoder, f8, 16 channels)."""
    return _latent("flextok-d18-d28", "d18-d28", data, tokenizer, encoder, steps=380_000, batch=2048)


def flextok_d18_d18(data: str, tokenizer: Loaded, encoder: str = "") -> Recipe:
    """FlexTok d18-d18 (data: ImageNet at 256 px; tokenizer: a KL autoencoder, f8, 16 channels)."""
    return _latent("flextok-d18-d18", "d18-d18", data, tokenizer, encoder, steps=380_000, batch=2048)


def flextok_d12_d12(data: str, tokenizer: Loaded, encoder: str = "") -> Recipe:
    """FlexTok d12-d12 on one GPU (data: ImageNet at 256 px; tokenizer: a KL autoencoder, f8, 16 channels)."""
    return _latent("flextok-d12-d12", "d12-d12", data, tokenizer, encoder, steps=400_000, batch=256)


def flextok_smoke(data: str | None = None) -> Recipe:
    """A toy FlexTok of pixels, two minutes on a laptop: 8x8 digits in 1 to 16 tokens, or images at 32 px (data).

    Measured on the 359 test digits with 1, 2, 4, 8 and 16 tokens (gen reconstruct --curve): PSNR 12.3, 14.0, 14.9,
    17.0 and 17.9 dB, where a Gaussian blur of one pixel has 13.4; Frechet distance of the digits classifier 2.25, 1.47,
    1.20, 1.09 and 0.95. All 125 codes are used. The one-step preview of 16 tokens has 19 dB.
    """
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
    images, side, channels = smoke_images(data)
    if side != 8:
        config = dataclasses.replace(config, first=Pixels((side, side, channels)), patch=side // 8)
    optim = adam(3e-3, (0.9, 0.99), schedule="cosine", warmup=50, final=0.05, clip=1.0)
    task = FlexTokTask(tokenizer=config, optim=optim, emas=SMOKE_EMA, dropout=0.1)
    stage = Stage("flextok", task, 2500, 64, images)
    engine = EngineConfig(checkpoint_every=250, checkpoint_seconds=5.0, log_every=25)
    return Recipe(RunConfig("flextok-smoke", (stage,), engine=engine))


def flextok_ar(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A decoder of about 1.1B parameters over FlexTok's 256 tokens (data: tokens of ImageNet; tokenizer: FlexTok)."""
    return token_recipe(
        "flextok-ar",
        FlexTokARConfig(dtype="bfloat16", remat="full"),
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(1.5)),
        steps=500_000,
        batch=1024,
        optim=adamw(),
        emas=(Constant(0.9999),),
    )


def flextok_ar_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy decoder, a minute on a laptop (data: tokens of digits; tokenizer: `flextok-smoke`'s run)."""
    cache = cache_of(data)
    model = FlexTokARConfig(cache.shape, cache.vocabulary, 64, 3, 4, 192, num_classes=classes_of(cache), scan=False)
    return token_recipe(
        "flextok-ar-smoke",
        model,
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(1.5 if model.num_classes else 1.0)),
        steps=800,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


PRESETS = {
    "flextok-vae-c16": flextok_vae_c16,
    "flextok-d18-d28": flextok_d18_d28,
    "flextok-d18-d18": flextok_d18_d18,
    "flextok-d12-d12": flextok_d12_d12,
    "flextok-smoke": flextok_smoke,
    "flextok-ar": flextok_ar,
    "flextok-ar-smoke": flextok_ar_smoke,
}
