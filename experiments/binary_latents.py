"""Tokens of bits: the binary autoencoder of binary latent diffusion, and Instella's 1D tokenizer.

Wang et al. 2023, "Binary Latent Diffusion", arXiv 2304.04820; Instella-T2I, arXiv 2506.21022.

Binary autoencoder. Data: any images at 256 px; the released C64 and C128 saw 600 M images of LAION. Recipe (official
code and commands): L1 and LPIPS, hinge PatchGAN with adaptive weight of at most 1 from step 400,001 (30,001 for one
domain), Adam 1.8e-5 (4.5e-6 for each image of a batch of 4 per GPU) on 8 GPUs, the tokenizer's rate a tenth after step
1.5 M, an average of decay 0.995 every tenth step (here 0.9995 in every one). No loss on the bits: the noise of their
draws keeps them in use. Official images lie in [0, 1] within LPIPS too; here LPIPS has the scale it was made for.

Instella's tokenizer. Its size is published (427.8 M parameters, 128 tokens of 64 bits, 512 px), its training is not,
beyond the kinds of its losses: reconstruction, perceptual, adversarial. The preset is that network under TA-TiTok's
losses and schedule, an assumption of ours.

Diffusion over the bits. Data: bits of LSUN churches (``gen encode RUN --data CHURCHES --out BITS``), or of ImageNet
with classes. Recipe (official code and commands): 64 levels of linear noise, the network says which bits were flipped,
the balanced focal loss of gamma 0 that the published commands train with, AdamW (0.9, 0.95), rate 2e-4 after 10,000
steps of warm-up, batch 64, an average; numbers of steps are not published. Official runs drop the class of a whole
batch at once, ours of each sample, with one in ten. The toy says the clean bits, under -log p (both are choices of the
official code): whether a bit was flipped is a product of its value and of what the others make of it, and in this
network, where bits begin at a twelfth of the size of positions, 800 steps are too few to learn it well.

Expected: generation on LSUN churches with C64 bits reaches FID 4.17 (64 steps; official README); neither source gives a
reconstruction score. The smoke presets are measured by the tests: digits come back better than blurred, and more than
half of the bits take both values; the diffusion's loss is below 0.8 times that of independent bits, and its digits are
of the class asked for.
"""

from typing import Any

from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler
from gen.autoregressive.binary_transformer import BinaryTransformerConfig
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
from gen.experiments._tokens import cache_of, classes_of, token_recipe
from gen.experiments._tokens import smoke_optim as toy_optim
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.discriminators import PatchGAN
from gen.runs import Loaded
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.binary import BinaryAutoencoderConfig
from gen.tokenizers.instella import InstellaConfig
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.quantizers.lfq import BSQ
from gen.tokenizers.titok import Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]

BERNOULLI = {"commitment": 0.0}  # drawn bits need no loss


def _autoencoder(tokenizer: BinaryAutoencoderConfig, lr: float, gan_start: int) -> AdversarialTask:
    return AdversarialTask(
        tokenizer=tokenizer,
        discriminator=PatchGAN(),
        optim=adam(lr, (0.9, 0.999)),
        discriminator_optim=adam(1.8e-5, (0.9, 0.999)),
        emas=(Constant(0.9995),),
        l1=1.0,
        l2=0.0,
        quantizer=BERNOULLI,
        terms=perceptual(1.0),
        gan_weight=1.0,
        adaptive=AdaptiveWeight(limit=1.0),
        gan_start=gan_start,
    )


def binary_ae_c64(data: str) -> Recipe:
    """The released binary autoencoder, 16x16 positions of 64 bits, 8.1M steps (data: images)."""
    return _released("binary-ae-c64", BinaryAutoencoderConfig(), data, 8_100_000)


def binary_ae_c128(data: str) -> Recipe:
    """The larger released one, 128 bits and a decoder three times as deep, 10.2M steps (data: images)."""
    tokenizer = BinaryAutoencoderConfig(quantizer=Binary(128, squashed_loss=True), decoder_blocks=6)
    return _released("binary-ae-c128", tokenizer, data, 10_200_000)


def _released(name: str, tokenizer: BinaryAutoencoderConfig, data: str, steps: int) -> Recipe:
    images, first = square_images(data, flip=True), 1_500_000
    stages = [
        Stage("autoencoder", _autoencoder(tokenizer, 1.8e-5, 400_001), first, 32, images),
        Stage("slow", _autoencoder(tokenizer, 1.8e-6, 0), steps - first, 32, images),
    ]
    return tokenizer_recipe(name, stages)


def binary_ae_one_gpu(data: str) -> Recipe:
    """The binary autoencoder C64 in bfloat16 on one GPU, 200k steps of 16 images (data: images)."""
    task = _autoencoder(BinaryAutoencoderConfig(dtype="bfloat16"), 5e-5, 50_000)
    stage = Stage("autoencoder", task, 200_000, 16, square_images(data, flip=True))
    return tokenizer_recipe("binary-ae-one-gpu", [stage])


def instella_tokenizer(data: str) -> Recipe:
    """Instella's 1D tokenizer, 128 tokens of 64 bits, under TA-TiTok's losses, 650k steps (data: images at 512 px)."""
    tokenizer = InstellaConfig(dtype="bfloat16", remat="full")
    optim = adam(1e-4, (0.9, 0.999), schedule="cosine", final=0.1, warmup=10_000, clip=1.0)
    task = AdversarialTask(
        tokenizer=tokenizer,
        discriminator=PatchGAN(),
        optim=optim,
        discriminator_optim=optim,
        emas=(Constant(0.999, warmup=True),),
        quantizer=BERNOULLI,
        terms=perceptual(1.0),
        gan_weight=0.1,
        gan_start=200_000,
    )
    stage = Stage("tokenizer", task, 650_000, 256, square_images(data, 512, flip=True))
    return tokenizer_recipe("instella-tokenizer", [stage])


def binary_diffusion_churches(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """Diffusion over C64 bits of LSUN churches, 171M parameters (data: bits; tokenizer: a binary autoencoder)."""
    sampler = BinarySampler(steps=64, temperature=0.9)
    return _diffusion("binary-diffusion-churches", 0, data, tokenizer, sampler)


def binary_diffusion_imagenet(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """The same with the classes of ImageNet (data: bits; tokenizer: a binary autoencoder)."""
    return _diffusion("binary-diffusion-imagenet", 1000, data, tokenizer, BinarySampler(steps=64, guidance=2.0))


def _diffusion(name: str, classes: int, data: str, tokenizer: Loaded | None, sampler: BinarySampler) -> Recipe:
    network = BinaryTransformerConfig(num_classes=classes, dtype="bfloat16")
    return token_recipe(
        name,
        BinaryDiffusion(network, levels=64, gamma=0.0),
        data,
        tokenizer,
        sampler=sampler,
        steps=1_000_000,
        batch=64,
        optim=OptimConfig(2e-4, betas=(0.9, 0.95), warmup=10_000),
        emas=(Constant(0.9999),),
    )


def binary_diffusion_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy of diffusion over bits, a minute on a laptop (data: bits of digits; tokenizer: `binary-ae-smoke`'s run)."""
    cache = cache_of(data, "bits")
    network = BinaryTransformerConfig(
        cache.shape, width=64, depth=3, heads=4, num_classes=classes_of(cache), scan=False
    )
    return token_recipe(
        "binary-diffusion-smoke",
        BinaryDiffusion(network, levels=64, target="bits"),
        data,
        tokenizer,
        sampler=BinarySampler(steps=16, guidance=1.5 if network.num_classes else 1.0),
        steps=800,
        batch=64,
        optim=toy_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


def binary_ae_smoke(data: str | None = None) -> Recipe:
    """A toy binary autoencoder, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    levels = (1, 2) if side == 8 else (1, 2, 2)
    tokenizer = BinaryAutoencoderConfig(
        (side, side, channels), Binary(8), 16, levels, 1, 1, 16, (), normed=False, groups=4
    )
    return _smoke("binary-ae-smoke", tokenizer, images, BERNOULLI)


def bsq_smoke(data: str | None = None) -> Recipe:
    """The same with binary spherical quantisation, whose entropies keep the bits in use."""
    images, side, channels = smoke_images(data)
    levels = (1, 2) if side == 8 else (1, 2, 2)
    tokenizer = BinaryAutoencoderConfig(
        (side, side, channels), BSQ(8), 16, levels, 1, 1, 16, (), normed=False, groups=4
    )
    return _smoke("bsq-smoke", tokenizer, images, {"commitment": 0.0, "entropy": 0.01})


def instella_smoke(data: str | None = None) -> Recipe:
    """A toy 1D tokenizer of bits, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    tower = Tower(64, 2, 4)
    tokenizer = InstellaConfig(
        (side, side, channels), side // 4, 8, tower, tower, (0,), (0,), (4, 6, 6), None, Binary(16), scan=False
    )
    return _smoke("instella-smoke", tokenizer, images, BERNOULLI, steps=1000)


def _smoke(name: str, tokenizer: Any, images: Any, quantizer: dict[str, float], steps: int = 400) -> Recipe:
    task = TokenizerTask(tokenizer, optim=smoke_optim(), emas=SMOKE_EMA, quantizer=quantizer)
    return tokenizer_recipe(name, [Stage("tokenizer", task, steps, 64, images)], smoke=True)


PRESETS = {
    "binary-ae-c64": binary_ae_c64,
    "binary-ae-c128": binary_ae_c128,
    "binary-ae-one-gpu": binary_ae_one_gpu,
    "instella-tokenizer": instella_tokenizer,
    "binary-diffusion-churches": binary_diffusion_churches,
    "binary-diffusion-imagenet": binary_diffusion_imagenet,
    "binary-diffusion-smoke": binary_diffusion_smoke,
    "binary-ae-smoke": binary_ae_smoke,
    "bsq-smoke": bsq_smoke,
    "instella-smoke": instella_smoke,
}
