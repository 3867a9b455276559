"""RAEv2: a transformer on semantic latents that guides itself by an early head (arXiv 2605.18324).

Data: a latent cache of ImageNet-1k at 256 px by a representation autoencoder (16 x 16 x 1024, the sum of several layers
of DINOv3-L). Official recipe: data predictions as velocities clamped at t = 0.05, the same loss on the early head after
block 8, logit-normal times shifted by 8, batch 1024, 80 epochs, EMA 0.9995, clipping at 1; label dropout 0.1. The
official optimiser is a variant of Muon at 2e-4; here it is AdamW. Sampling: Euler, 100 steps on shifted times, internal
guidance 1.78 from t = 0.1 on; a guided step is one network call.

Expected (ImageNet-256, FID-50k; project page): 1.06 after 80 epochs, at most 2 without guidance after 35. Not
reproduced here yet.
"""

import dataclasses

from gen.diffusion.backbones.rae_v2 import RAEv2Config
from gen.diffusion.denoiser import Denoiser
from gen.experiments import Recipe
from gen.experiments._latents import adamw, latent_recipe, smoke_recipe
from gen.pretrained.rae_v2 import denoiser, generator, shift_of
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import Interval
from gen.sampling.internal_guidance import Internal
from gen.sampling.solvers import Euler
from gen.training.run import EngineConfig

__all__ = ["PRESETS", "small"]

PUBLISHED = RAEv2Config(dtype="bfloat16")
ONE_GPU = dataclasses.replace(PUBLISHED, width=768, depth=12, heads=12, head_width=1024, head_heads=16, early=4)


def _recipe(name: str, network: RAEv2Config, data: str, tokenizer: Loaded | None, steps: int, batch: int) -> Recipe:
    model, sampler = denoiser(network, shift_of(network)), generator(network).sampler
    engine = EngineConfig(checkpoint_every=5000, keep_every=25_000, log_every=100)
    optim = adamw(2e-4, betas=(0.9, 0.95), clip=1.0)
    return latent_recipe(
        name, model, data, tokenizer, sampler=sampler, steps=steps, batch=batch, optim=optim, engine=engine
    )


def rae_v2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """The published model on ImageNet-256 latents of 16 x 16 x 1024, 80 epochs (data: a latent cache)."""
    return _recipe("rae-v2", PUBLISHED, data, tokenizer, 100_000, 1024)


def rae_v2_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A model of a sixth of the size on the same latents, one GPU, 400k steps of 256 (data: a latent cache)."""
    return _recipe("rae-v2-gpu", ONE_GPU, data, tokenizer, 400_000, 256)


def small() -> Denoiser:
    """A toy of it on 8 x 8 digits."""
    network = RAEv2Config((8, 8), 1, 64, 4, 4, 64, 1, 4, 2, 4.0, 1, 1, num_classes=10, remat="none", scan=False)
    return denoiser(network, 1.0)


def rae_v2_smoke() -> Recipe:
    """A toy that guides itself, a minute on a laptop: 8x8 digits."""
    sampler = Sampler(Euler(), Uniform(), 25, Interval(Internal(1.5), 0.1))
    return smoke_recipe("rae-v2-smoke", small(), None, sampler=sampler)


PRESETS = {"rae-v2": rae_v2, "rae-v2-gpu": rae_v2_gpu, "rae-v2-smoke": rae_v2_smoke}
