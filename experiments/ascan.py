"""AsCAN-style models: convolution first, attention later, in a U-Net on latents (Kag et al. 2024).

The paper's layers, training recipe and sampler are not published: sizes and recipe here are ours (a linear flow trained
as SiT is, AdamW 1e-4, batch 256, EMA 0.9999), to compare placements of convolution, attention and scan blocks under
equal conditions. Data: a latent cache of ImageNet-1k at 256 px by the SD-VAE.

Expected: nothing may be expected of these configurations. The paper reports FID 2.23 at ImageNet-256 for its own
(as quoted by a public listing).
"""

from gen.diffusion.backbones.ascan import AsCANConfig, ascan
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.experiments import Recipe
from gen.experiments._latents import latent_recipe, smoke_recipe
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Heun
from gen.training.run import EngineConfig
from gen.training.sharding import MeshConfig

__all__ = ["PRESETS"]

SAMPLER = Sampler(Heun(), steps=50, guidance=ClassifierFree(1.5))


def _denoiser(network: AsCANConfig) -> Denoiser:
    return Denoiser(network, Linear(), Predict("velocity"))


def ascan_l(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """AsCAN-style L on ImageNet-256 latents, 400k steps on 8 devices (data: a latent cache)."""
    engine = EngineConfig(mesh=MeshConfig(fsdp=8), checkpoint_every=10_000, keep_every=100_000, log_every=100)
    return _recipe("ascan-l", "L", data, tokenizer, engine)


def ascan_b(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """AsCAN-style B on ImageNet-256 latents, 400k steps on one GPU (data: a latent cache)."""
    return _recipe("ascan-b", "B", data, tokenizer, None)


def _recipe(name: str, size: str, data: str, tokenizer: Loaded | None, engine: EngineConfig | None) -> Recipe:
    return latent_recipe(
        name,
        _denoiser(ascan(size, dtype="bfloat16")),
        data,
        tokenizer,
        sampler=SAMPLER,
        steps=400_000,
        batch=256,
        engine=engine,
    )


def ascan_smoke(data: str | None = None) -> Recipe:
    """A toy AsCAN-style network with all kinds of block, minutes on a laptop: 8x8 digits, or images at 32 px (data)."""
    network = AsCANConfig(
        (8, 8), 1, width=32, stages=("CC", "MT"), middle="T", groups=8, num_classes=10, remat="none", scan=False
    )
    sampler = Sampler(Heun(), steps=20, guidance=ClassifierFree(1.5))
    return smoke_recipe("ascan-smoke", _denoiser(network), data, sampler=sampler)


PRESETS = {"ascan-l": ascan_l, "ascan-b": ascan_b, "ascan-smoke": ascan_smoke}
