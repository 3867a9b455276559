"""EDM2: magnitude-preserving U-Nets on ImageNet-512 latents and ImageNet-64 (Karras et al. 2023, arXiv 2312.02696).

Data: for 512 px a latent cache of the SD-VAE (64 x 64 x 4); for 64 px an image folder or zip, centre crops. Recipe of
NVlabs/edm2: Adam (0.9, 0.99), batch 2048, the rate rising over 10 million images and then falling as
1 / sqrt(max(step / 70000, 1)) (64 px: 35000), no weight decay, no label dropout, dropout 0.1 from M on; power-function
averages of widths 0.05 and 0.10, of which any other is made after training (`gen.training.ema.posthoc_coefficients`)
from the kept checkpoints. Unlike theirs, a latent cache here has unit deviation instead of 0.5: every noise level of
the 512 px presets is twice the paper's, which is the same training.

Expected (FID-50k against the training set, 63 network calls, best average; table 2 of the paper and the repository):
512 px without guidance XS 3.53, S 2.56, M 2.25, L 2.06, XL 1.96, XXL 1.91; with an unconditional guide S 2.23
(scale 1.4), XXL 1.81 (1.2); with autoguidance (Karras et al. 2024, arXiv 2406.02507) S 1.34 (guide XS after 134
million images, scale 2.10), XXL 1.25 (2.05). 64 px: S 1.58, M 1.43, L 1.33, XL 1.33; autoguided S 1.01 (1.70). Not
reproduced here yet.
"""

import dataclasses
import math
from typing import Any

from gen.data.images import Images
from gen.data.sources import Digits
from gen.diffusion.backbones.edm2_unet import EDM2Config, edm2
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import EDMLoss, Uncertain
from gen.diffusion.process import EDM
from gen.diffusion.train import DenoiserTask
from gen.experiments import Recipe
from gen.experiments._latents import latents, small_images
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.grids import Karras
from gen.sampling.solvers import EDMStochastic
from gen.training.ema import PowerFunction
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.sharding import MeshConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]

BATCH = 2048
AVERAGES = (PowerFunction(0.05), PowerFunction(0.10))
# base rate by size (table 6 of the paper)
RATES = {"XS": 0.0120, "S": 0.0100, "M": 0.0090, "L": 0.0080, "XL": 0.0070, "XXL": 0.0065}


def _recipe(
    name: str,
    network: EDM2Config,
    data: Any,
    loss: EDMLoss,
    optim: OptimConfig,
    *,
    steps: int,
    batch: int,
    deviation: float = 0.5,
    sampling: int = 32,
    engine: EngineConfig,
    frozen: dict[str, Any] | None = None,
    decoder: Loaded | None = None,
) -> Recipe:
    """A run on data of the given standard deviation; noise levels are the paper's times deviation / 0.5."""
    unit = deviation / 0.5
    low, high = 0.002 * unit, 80.0 * unit
    objective = Uncertain(EDMLoss(loss.mean + math.log(unit), loss.std))
    denoiser = Denoiser(network, EDM(low, high, sigma_data=deviation), EDMPrecondition(), objective)
    sampler = Sampler(EDMStochastic(), Karras(7.0, low, high), sampling)
    task = DenoiserTask(denoiser, optim=optim, emas=AVERAGES, dropout=0.0)
    arrays = dict(frozen or {})
    origins = {}
    if decoder is not None:
        arrays["tokenizer"] = decoder.params["tokenizer"]
        origins = {"tokenizer": decoder.config.name, "normalizer": data.identity()}
    stage = Stage("teacher", task, steps, batch, data)
    tokenizer = None if decoder is None else decoder.tokenizer
    return Recipe(RunConfig(name, (stage,), origins, sampler, tokenizer, engine=engine), artifacts=arrays)


def _adam(rate: float, decay: int) -> OptimConfig:
    """The rate reaches its peak after 10 million images and falls after `decay` steps."""
    return OptimConfig(rate, betas=(0.9, 0.99), schedule="inverse-sqrt", warmup=10e6 / BATCH, knee=decay)


def _large(size: str, data: Any, *, mebi: int, decay: int, fsdp: int = 1, **options: Any) -> Recipe:
    """A published size trained on `mebi` x 2^20 images."""
    engine = EngineConfig(mesh=MeshConfig(fsdp=fsdp), checkpoint_every=4096, keep_every=32_768, log_every=100)
    steps = mebi * 2**20 // BATCH
    return _recipe(optim=_adam(RATES[size], decay), steps=steps, batch=BATCH, engine=engine, data=data, **options)


def _latent(size: str, data: str, tokenizer: Loaded | None, mebi: int, fsdp: int = 1) -> Recipe:
    network = edm2(size, dtype="bfloat16")
    found = latents(data, latent=network.shape)
    return _large(
        size,
        found,
        mebi=mebi,
        decay=70_000,
        fsdp=fsdp,
        name=f"edm2-{size.lower()}-512",
        network=network,
        loss=EDMLoss(-0.4, 1.0),
        deviation=1.0,
        frozen={"normalizer": found.normalizer()},
        decoder=tokenizer,
    )


def edm2_xs_512(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """EDM2-XS on ImageNet-512 latents, the guide and the size for one GPU (data: a latent cache)."""
    return _latent("XS", data, tokenizer, 2048)


def edm2_s_512(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """EDM2-S on ImageNet-512 latents, the paper's 2 Gi images (data: a latent cache)."""
    return _latent("S", data, tokenizer, 2048)


def edm2_xxl_512(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """EDM2-XXL on ImageNet-512 latents, the paper's 896 Mi images (data: a latent cache)."""
    return _latent("XXL", data, tokenizer, 896, fsdp=8)


def edm2_s_64(data: str) -> Recipe:
    """EDM2-S on ImageNet-64 pixels, the paper's 1 Gi images (data: images of 64 px)."""
    return _large(
        "S",
        Images(data, size=64, crop="adm"),
        mebi=1024,
        decay=35_000,
        name="edm2-s-64",
        network=edm2("S", channels=3, dtype="bfloat16"),
        loss=EDMLoss(-0.8, 1.6),
    )


def edm2_smoke(data: str | None = None) -> Recipe:
    """A toy EDM2, minutes on a laptop: 8x8 digits, or images at 32 px (data)."""
    network = EDM2Config(8, 1, 10, (32, 64), 1, (4,), 32, dropout=0.05, uncertainty=16)
    found: Any = Digits("train")
    if data is not None:
        found, classes = small_images(data)
        network = dataclasses.replace(
            network, size=32, channels=3, num_classes=classes, widths=(32, 32, 64), attention=(8,)
        )
    return _recipe(
        "edm2-smoke",
        network,
        found,
        EDMLoss(-0.8, 1.6),
        OptimConfig(0.01, betas=(0.9, 0.99), schedule="inverse-sqrt", warmup=20, knee=100),
        steps=300,
        batch=64,
        sampling=16,
        engine=EngineConfig(checkpoint_every=100, log_every=20),
    )


PRESETS = {
    "edm2-xs-512": edm2_xs_512,
    "edm2-s-512": edm2_s_512,
    "edm2-xxl-512": edm2_xxl_512,
    "edm2-s-64": edm2_s_64,
    "edm2-smoke": edm2_smoke,
}
