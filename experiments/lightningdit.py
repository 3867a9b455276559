"""LightningDiT: a faster DiT on VA-VAE latents (Yao, Yang & Wang 2025, "Reconstruction vs. Generation").

Data: the published latent shards of ImageNet-1k at 256 px (VA-VAE f16, 32 channels; a folder of
``latents_rank*_shard*.safetensors``), or a latent cache of one's own. Official recipe: XL/1 with RMSNorm, SwiGLU and
rotary positions, AdamW 2e-4 constant, betas (0.9, 0.95), batch 1024, EMA 0.9999, label dropout 0.1, logit-normal
times, velocity loss plus its direction (cosine) with weight 1.

Expected (ImageNet-256, FID-50k by the ADM evaluator, Euler with 249 steps shifted by 0.3; official README): after 80k
steps (64 epochs) 5.14 unguided and 2.11 guided (`lightningdit_xl1`); after 1M steps (800 epochs; uniform times from
600k steps on) 2.17 and 1.35 (`lightningdit_xl1_long`, scale 6.7 from official time 0.125 on, three channels).
The mean squared error of the 64-epoch run: 0.385 at 1k steps, 0.327 at 10k, 0.3045 at 80k. B/1 by users of the official
code: FID 7.30 at 70k steps, 4.44 at 120k (`lightningdit_b1`). Not reproduced here yet.
"""

import dataclasses

from gen.diffusion.backbones.lightningdit import LightningDiTConfig, lightningdit
from gen.diffusion.backbones.sit import parameterization
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import VelocityMatching
from gen.diffusion.process import Linear
from gen.diffusion.times import TimeSampler
from gen.experiments import Recipe
from gen.experiments._latents import adamw, latent_recipe, smoke_recipe
from gen.pretrained.lightningdit import guidance
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Euler, Heun

__all__ = ["PRESETS"]

OBJECTIVE = VelocityMatching(TimeSampler("logit-normal"), cosine=1.0)


def _denoiser(network: LightningDiTConfig) -> Denoiser:
    return Denoiser(network, Linear(), parameterization(network), OBJECTIVE)


def _recipe(
    name: str, size: str, data: str, tokenizer: Loaded | None, steps: int, scale: float, start: float
) -> Recipe:
    return latent_recipe(
        name,
        _denoiser(lightningdit(size, dtype="bfloat16")),
        data,
        tokenizer,
        sampler=Sampler(Euler(), Uniform(shift=1 / 0.3), 249, guidance(scale, start)),
        steps=steps,
        batch=1024,
        optim=adamw(2e-4, (0.9, 0.95)),
    )


def lightningdit_xl1(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LightningDiT-XL/1 on VA-VAE latents, 64 epochs (data: latent shards or a cache)."""
    return _recipe("lightningdit-xl1", "XL/1", data, tokenizer, 80_000, 10.0, 0.10)


def lightningdit_xl1_long(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LightningDiT-XL/1 on VA-VAE latents, 800 epochs (data: latent shards or a cache)."""
    recipe = _recipe("lightningdit-xl1-long", "XL/1", data, tokenizer, 600_000, 6.7, 0.125)
    (first,) = recipe.config.stages
    # clipping is the authors' advice for long runs (they report NaN after 200k steps without)
    task = dataclasses.replace(first.task, optim=adamw(2e-4, (0.9, 0.95), clip=1.0))
    uniform = dataclasses.replace(OBJECTIVE, times=TimeSampler())
    late = dataclasses.replace(task, denoiser=dataclasses.replace(task.denoiser, objective=uniform))
    stages = (
        dataclasses.replace(first, task=task),
        dataclasses.replace(first, name="uniform-times", task=late, steps=400_000),
    )
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, stages=stages))


def lightningdit_b1(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LightningDiT-B/1 on VA-VAE latents, 120k steps on one GPU (data: latent shards or a cache)."""
    return _recipe("lightningdit-b1", "B/1", data, tokenizer, 120_000, 10.0, 0.10)


def lightningdit_smoke(data: str | None = None) -> Recipe:
    """A toy LightningDiT, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    network = LightningDiTConfig((8, 8), 1, 2, 64, 3, 4, num_classes=10, remat="none", scan=False)
    sampler = Sampler(Heun(), Uniform(), 20, ClassifierFree(1.5))
    return smoke_recipe("lightningdit-smoke", _denoiser(network), data, sampler=sampler)


PRESETS = {
    "lightningdit-xl1": lightningdit_xl1,
    "lightningdit-xl1-long": lightningdit_xl1_long,
    "lightningdit-b1": lightningdit_b1,
    "lightningdit-smoke": lightningdit_smoke,
}
