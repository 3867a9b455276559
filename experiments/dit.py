"""DiT: class-conditional diffusion transformers on latents (Peebles & Xie 2023).

Data: a latent cache of ImageNet-1k at 256 px, centre crops, by the SD-VAE (f8, 4 channels). Paper recipe: AdamW 1e-4
constant, no weight decay, batch 256, EMA 0.9999, label dropout 0.1, horizontal flips; hybrid loss with learned
variance on the linear 1000-step chain. The paper scales latents by 0.18215; here the cache's normaliser does that.

Expected (ImageNet-256, FID-50k against the ADM reference batch, 250 ancestral steps; table 4 and figure 6 of the
paper): XL/2 after 7M steps 9.62 unguided, 2.27 with scale 1.5 on three channels (`dit_xl2`); after 400k steps,
unguided, XL/2 19.5, L/2 23.3, B/2 43.5 (`dit_b2`), S/2 68.4. Not reproduced here yet.
"""

from gen.diffusion.backbones.dit import DiTConfig, dit
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import DDPMLoss
from gen.experiments import Recipe
from gen.experiments._latents import latent_recipe, smoke_recipe
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.grids import Respaced
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Ancestral
from gen.training.run import EngineConfig
from gen.training.sharding import MeshConfig

__all__ = ["PRESETS"]

SAMPLER = Sampler(Ancestral("learned"), Respaced(), 250, ClassifierFree(1.5, channels=3))


def _denoiser(network: DiTConfig) -> Denoiser:
    return Denoiser(network, DDPM("linear", 1000), Predict("eps", clock="index", learned_variance=True), DDPMLoss())


def dit_xl2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """DiT-XL/2 on ImageNet-256 latents, the paper's 7M steps (data: a latent cache)."""
    engine = EngineConfig(mesh=MeshConfig(fsdp=8), checkpoint_every=10_000, keep_every=400_000, log_every=100)
    return latent_recipe(
        "dit-xl2",
        _denoiser(dit("XL/2", dtype="bfloat16")),
        data,
        tokenizer,
        sampler=SAMPLER,
        steps=7_000_000,
        batch=256,
        engine=engine,
    )


def dit_b2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """DiT-B/2 on ImageNet-256 latents, 400k steps on one GPU (data: a latent cache)."""
    network = dit("B/2", dtype="bfloat16", remat="none", scan=False)
    return latent_recipe("dit-b2", _denoiser(network), data, tokenizer, sampler=SAMPLER, steps=400_000, batch=256)


def dit_smoke(data: str | None = None) -> Recipe:
    """A toy DiT, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    network = DiTConfig((8, 8), 1, 2, 64, 3, 4, num_classes=10, learned_variance=True, remat="none", scan=False)
    sampler = Sampler(Ancestral("learned"), Respaced(), 50, ClassifierFree(1.5))
    return smoke_recipe("dit-smoke", _denoiser(network), data, sampler=sampler)


PRESETS = {"dit-xl2": dit_xl2, "dit-b2": dit_b2, "dit-smoke": dit_smoke}
