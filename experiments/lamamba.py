"""LaMamba-Diff: scans and window attention in a U-Net on latents (Fu, Chen & Yu 2024).

Data: a latent cache of ImageNet-1k at 256 px, centre crops and flips, by the SD-VAE (f8, 4 channels, the "mse"
variant). Recipe of the published code: DiT's loss and chain, AdamW 1e-4 constant with PyTorch's default weight decay
0.01 on everything, batch 256, EMA 0.9999, label dropout 0.1.

Expected (ImageNet-256, FID-50k, 250 ancestral steps with guidance on all channels; by a digest of the paper, whose
tables we could not check): XL 2.04 (`lamamba_xl`), and 3.01 at 512 px. Widths of the smaller sizes are ours, near
DiT's parameter counts; nothing is known of their scores. Not reproduced here yet.
"""

from gen.diffusion.backbones.lamamba import LaMambaConfig, lamamba
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
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.sharding import MeshConfig

__all__ = ["PRESETS"]

SAMPLER = Sampler(Ancestral("learned"), Respaced(), 250, ClassifierFree(1.5))
OPTIM = OptimConfig(1e-4, weight_decay=0.01)


def _denoiser(network: LaMambaConfig) -> Denoiser:
    return Denoiser(network, DDPM("linear", 1000), Predict("eps", clock="index", learned_variance=True), DDPMLoss())


def lamamba_xl(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LaMamba-Diff-XL on ImageNet-256 latents, the published script's 2.5M steps (data: a latent cache)."""
    engine = EngineConfig(mesh=MeshConfig(fsdp=8), checkpoint_every=10_000, keep_every=400_000, log_every=100)
    return latent_recipe(
        "lamamba-xl",
        _denoiser(lamamba("XL", dtype="bfloat16")),
        data,
        tokenizer,
        sampler=SAMPLER,
        steps=2_500_000,
        batch=256,
        optim=OPTIM,
        engine=engine,
    )


def lamamba_b(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LaMamba-Diff-B, a width of ours, on ImageNet-256 latents, 400k steps on one GPU (data: a latent cache)."""
    return latent_recipe(
        "lamamba-b",
        _denoiser(lamamba("B", dtype="bfloat16")),
        data,
        tokenizer,
        sampler=SAMPLER,
        steps=400_000,
        batch=256,
        optim=OPTIM,
    )


def lamamba_smoke(data: str | None = None) -> Recipe:
    """A toy LaMamba, minutes on a laptop: 8x8 digits, or images at 32 px (data)."""
    network = LaMambaConfig(
        (8, 8),
        1,
        width=16,
        depths=(1, 1, 1, 1),
        middle=1,
        extra=False,
        heads=(2, 2, 2, 2),
        window=4,
        num_classes=10,
        learned_variance=True,
        remat="none",
        scan=False,
    )
    sampler = Sampler(Ancestral("learned"), Respaced(), 50, ClassifierFree(1.5))
    return smoke_recipe("lamamba-smoke", _denoiser(network), data, sampler=sampler)


PRESETS = {"lamamba-xl": lamamba_xl, "lamamba-b": lamamba_b, "lamamba-smoke": lamamba_smoke}
