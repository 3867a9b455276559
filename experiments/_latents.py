"""What the class-conditional latent experiments share: data, previews, artifacts, engine."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen.data.caches import Cache
from gen.data.images import Images
from gen.data.loader import expect
from gen.data.random import RANDOM, Random
from gen.data.sources import Digits
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.pretrained.latent_shards import LatentShards
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.guidance import ClassifierFree
from gen.tokenizers.encode import expect_maker
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["adamw", "carried", "encoded_rows", "latent_recipe", "latents", "small_images", "smoke_recipe"]


def adamw(lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), clip: float = 0.0) -> OptimConfig:
    """The constant-rate AdamW of DiT and what followed it, without weight decay."""
    return OptimConfig(lr, betas=betas, clip=clip)


def latents(path: str, **shapes: tuple[int, ...]) -> Any:
    """The data at `path`: a latent cache, a folder of LightningDiT's published shards, or random arrays (``random``).

    Args:
      shapes: of a row, by name, as the model takes them, beside its label. Raises GenError for data of other ones.
    """
    if path == RANDOM:
        return Random({**shapes, "label": ()})
    sealed = (Path(path) / "cache.json").exists() or not list(Path(path).glob("*.safetensors"))
    found: Any = Cache(path) if sealed else LatentShards(path)
    expect(path, found.source(), **shapes)
    return found


def latent_recipe(
    name: str,
    denoiser: Denoiser,
    data: str,
    tokenizer: Loaded | None,
    *,
    sampler: Sampler,
    steps: int,
    batch: int,
    optim: OptimConfig | None = None,
    engine: EngineConfig | None = None,
    beside: Mapping[str, tuple[int, ...]] | None = None,
) -> Recipe:
    """A class-conditional model of the latents at `data`, averaged with decay 0.9999, label dropout 0.1.

    Args:
      data: see `latents`.
      beside: shapes of further arrays that the latents must have beside them, by name.
      tokenizer: decodes previews and samples; without it the run generates latents.
    """
    found = latents(data, latent=denoiser.network.shape, **(beside or {}))
    decoder: dict[str, Any] = {"normalizer": found.normalizer()}
    origins = {}
    if tokenizer is not None:
        expect_maker(found, tokenizer.tokenizer, tokenizer.params["tokenizer"])
        decoder["tokenizer"] = tokenizer.params["tokenizer"]
        origins["tokenizer"] = tokenizer.origin
    task = DenoiserTask(denoiser, optim=optim or adamw(), emas=(Constant(0.9999),))
    config = RunConfig(
        name,
        (Stage("teacher", task, steps, batch, found),),
        origins,
        sampler,
        None if tokenizer is None else tokenizer.tokenizer,
        engine=engine or EngineConfig(checkpoint_every=10_000, keep_every=100_000, log_every=100),
    )
    return Recipe(config, artifacts=decoder)


def encoded_rows(data: str) -> Mapping[str, np.ndarray]:
    """The arrays of the latent cache at `data`. Raises GenError when it has no encoder features beside the latents."""
    found = latents(data)
    rows = found.source().rows.arrays if isinstance(found, Cache) else {}
    if "encoder_0" not in rows:
        raise GenError(f"{data} has no encoder_0 beside its latents; make a cache with gen encode --align FILE")
    return rows


def smoke_recipe(
    name: str,
    denoiser: Denoiser,
    data: str | None,
    *,
    sampler: Sampler,
    steps: int = 400,
    batch: int = 64,
) -> Recipe:
    """The same on pixels: a smoke run of seconds to minutes on a laptop.

    Args:
      denoiser: for 8 x 8 digits.
      data: images of 32 x 32 pixels (`small_images`), cut into the largest patches that a token carries (`carried`);
        None for the embedded digits. The network has the classes of the data; without labels it is unconditional and
        unguided.
    """
    images: Any = Digits("train")
    if data is not None:
        images, classes = small_images(data)
        network = dataclasses.replace(
            denoiser.network, size=(32, 32), channels=3, patch=carried(denoiser.network.width, 3), num_classes=classes
        )
        denoiser = dataclasses.replace(denoiser, network=network)
        sampler = sampler if classes else dataclasses.replace(sampler, guidance=ClassifierFree())
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), clip=1.0)
    task = DenoiserTask(denoiser, optim=optim, emas=(Constant(0.99, warmup=True),))
    stage = Stage("teacher", task, steps, batch, images)
    engine = EngineConfig(checkpoint_every=100, log_every=20)
    return Recipe(RunConfig(name, (stage,), sampler=sampler, engine=engine))


def carried(width: int, channels: int) -> int:
    """Gives the side of the largest patch, a power of 2, whose numbers are no more than the `width` of its token.

    A velocity holds the noise of every pixel. Through a token that is narrower than its patch it does not pass, and
    samples stay noise however long the model trains.
    """
    return 1 << int(math.log2(width / channels) / 2)


def small_images(path: str) -> tuple[Images, int]:
    """The images of smoke runs, 32 x 32 pixels, and the number of their classes: 0 where they have no labels."""
    classes = 10 if path == RANDOM else Images(path, 32, labels="none").store.num_classes or 0
    return Images(path, 32, labels="class" if classes else "none"), classes
