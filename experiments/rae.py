"""RAE: a decoder for the features of a frozen encoder (Zheng et al. 2025, arXiv 2510.11690).

Data: ImageNet-1k images at 256 px. Official recipe of the decoder (stage 1): DINOv2-B with registers, whose final norm
has neither gain nor bias; AdamW 2e-4 with betas (0.9, 0.95), one epoch of warm-up, cosine to a tenth, batch 512, 16
epochs, EMA 0.9978; L1 and LPIPS, noise tau 0.8 on the latents, a discriminator from epoch 6 and its GAN term with
adaptive weight 0.75 from epoch 8 on. The official discriminator has heads on a frozen DINO ViT-S/8; here it is a
PatchGAN that looks at each image alone.

The encoder is a file of its own: model.safetensors of facebook/dinov2-with-registers-base, converted to where the
message of a missing file says.

Expected (ImageNet, rFID against the 50,000 validation images; readme and project page): decoder XL with tau 0.8 0.57
(`rae-xl`), tau 0 0.49, decoder B 0.58 (`rae-one-gpu`). Not reproduced here yet; `rae-smoke` is measured by the tests.
"""

import dataclasses

import jax

from gen.experiments import Recipe
from gen.experiments._tokenizers import (
    SMOKE_EMA,
    Encoder,
    adam,
    encoder,
    perceptual,
    smoke_images,
    smoke_optim,
    square_images,
    tokenizer_recipe,
)
from gen.features.dinov2 import dinov2
from gen.features.vit import ViTConfig
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.discriminators import PatchGAN
from gen.nn.network import Network
from gen.tokenizers.adversarial import AdversarialTask
from gen.tokenizers.rae import LatentNoise, RAEConfig, rae
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.trunk import Tower
from gen.training.ema import Constant
from gen.training.task import Stage

__all__ = ["PRESETS"]

EPOCH = 2_503  # batches of 512
HINT = (
    "get model.safetensors of facebook/dinov2-with-registers-base and run gen convert dinov2 model.safetensors "
    "--out {out}"
)


def _found(path: str, data: str) -> Encoder:
    """The encoder without gain and bias of its final norm, which the released decoders go without."""
    found = encoder("dinov2-with-registers-base", path, HINT, dinov2("B", registers=4), data)
    params = {name: tree for name, tree in found.params.items() if name != "norm"}
    return Encoder(dataclasses.replace(found.network, affine=False), params, found.origin)


def _recipe(name: str, size: str, data: str, path: str, batch: int, **changes: object) -> Recipe:
    found, epoch = _found(path, data), EPOCH * 512 // batch
    optim = adam(2e-4 * batch / 512, (0.9, 0.95), schedule="cosine", final=0.1, warmup=epoch)
    task = AdversarialTask(
        tokenizer=rae(size, encoder=found.network, **changes),
        discriminator=PatchGAN(norm="group"),
        optim=optim,
        discriminator_optim=optim,
        emas=(Constant(0.9978),),
        l1=1.0,
        l2=0.0,
        terms=perceptual(),
        gan_weight=0.75,
        adaptive=AdaptiveWeight(limit=1e4, eps=1e-6),
        gan_start=6 * epoch,
        gan_delay=2 * epoch,
        corruption=LatentNoise(0.8),
        train=("decoder/*",),
    )
    stage = Stage("decoder", task, 16 * epoch, batch, square_images(data, random_crop=True))
    start = {"start": {"encoder": found.params}}
    return tokenizer_recipe(name, [stage], frozen=start, origins={"start": found.origin})


def rae_xl(data: str, encoder: str = "") -> Recipe:
    """RAE: decoder XL on DINOv2-B with registers, 16 epochs (data: images)."""
    return _recipe("rae-xl", "XL", data, encoder, 512, remat="dots")


def rae_one_gpu(data: str, encoder: str = "") -> Recipe:
    """RAE: decoder B in bfloat16 on one GPU, 16 epochs of batch 128 (data: images)."""
    return _recipe("rae-one-gpu", "B", data, encoder, 128, dtype="bfloat16", remat="dots")


def rae_smoke(data: str | None = None) -> Recipe:
    """A toy RAE, a minute on a laptop: 8x8 digits, or images at 32 px (data); its encoder has random weights."""
    images, side, channels = smoke_images(data)
    patch = side // 4
    network = ViTConfig(size=4 * patch, patch=patch, width=64, depth=1, heads=2, hidden=128, affine=False)
    tokenizer = RAEConfig((side, side, channels), patch, network, Tower(64, 2, 4), 128, scan=False)
    task = TokenizerTask(
        tokenizer=tokenizer,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        l1=1.0,
        corruption=LatentNoise(0.2),
        train=("decoder/*",),
    )
    start = {"start": {"encoder": Network(network).init(jax.random.key(0))}}
    stage = Stage("decoder", task, 300, 64, images)
    return tokenizer_recipe(
        "rae-smoke", [stage], frozen=start, origins={"start": "random weights of seed 0"}, smoke=True
    )


PRESETS = {
    "rae-xl": rae_xl,
    "rae-one-gpu": rae_one_gpu,
    "rae-smoke": rae_smoke,
}
