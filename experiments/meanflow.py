"""MeanFlow and shortcut models: few-step generators from data alone, or from a teacher (arXiv 2505.13447, 2410.12557).

Data: latent caches of ImageNet-1k at 256 px by the SD-VAE (f8, 4 channels), or, for `meanflow` and `shortcut`, what the
teacher was trained on. With a teacher its guided velocity is learned in place of the samples' own, and the network
starts from its weights.

Expected (ImageNet-256, FID-50k against the ADM reference batch, one call, no guidance at sampling): MeanFlow-B/4 after
240 epochs 48.16 without guidance, 13.74 with omega 2, 11.35 with omega 1 and kappa 0.5 (official README), after the 80
epochs of `meanflow_b4` 18.70; XL/2 3.43 (table of the paper, from memory). Shortcut-XL/2 after 810k steps 10.6, with 4
calls 7.8, with 128 3.8; B/2 40.3, 28.3, 15.5 (`shortcut_b2`, official README). Not reproduced here yet. On the digits
teacher of the demo: see docs/distillers.md.
"""

from typing import Any

from gen.diffusion.backbones.dit import DiTConfig, dit
from gen.diffusion.denoiser import Predict
from gen.diffusion.flowmap import AverageVelocity, FlowMap
from gen.diffusion.meanflow import MeanFlowTask, average_map
from gen.diffusion.process import Linear
from gen.diffusion.shortcut import ShortcutTask
from gen.diffusion.times import TimeSampler
from gen.experiments import Recipe
from gen.experiments._latents import adamw, latents
from gen.experiments._students import guidance_of, student_data, student_recipe, student_times
from gen.runs import Loaded
from gen.sampling.flowmaps import FlowMapSampler
from gen.tokenizers.encode import expect_maker
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]

LAPTOP = OptimConfig(1e-3, betas=(0.9, 0.99), schedule="cosine", warmup=50, final=0.02, clip=1.0)
EPOCH = 1_281_167  # images of ImageNet


def meanflow(
    teacher: Loaded, data: str | None = None, calls: int = 1, *, updates: int = 3000, batch: int = 128
) -> Recipe:
    """Any teacher: MeanFlow of its guided velocity, minutes on a laptop for the demo's (data: the teacher's)."""
    task = MeanFlowTask(
        flow_map=average_map(teacher.denoiser),
        teacher=teacher.denoiser,
        guidance=guidance_of(teacher),
        dropout=0.0,
        times=TimeSampler(),
        instant=0.25,
        optim=LAPTOP,
        emas=(Constant(0.998, warmup=True),),
    )
    stage = Stage("meanflow", task, updates, batch, student_data(data, teacher))
    return student_recipe("meanflow", teacher, (stage,), sampler=_jumps(calls))


def shortcut(
    teacher: Loaded, data: str | None = None, calls: int = 1, *, updates: int = 4000, batch: int = 128
) -> Recipe:
    """Any teacher: a shortcut model of its guided velocity, minutes on a laptop for the demo's (data: its own)."""
    task = ShortcutTask(
        flow_map=average_map(teacher.denoiser, "halvings"),
        teacher=teacher.denoiser,
        guidance=guidance_of(teacher),
        dropout=0.0,
        every=2,
        biased=True,
        optim=LAPTOP,
        emas=(Constant(0.998, warmup=True),),
    )
    stage = Stage("shortcut", task, updates, batch, student_data(data, teacher))
    return student_recipe("shortcut", teacher, (stage,), sampler=_jumps(calls))


def _jumps(calls: int) -> FlowMapSampler:
    return FlowMapSampler((*student_times(Linear(), calls), 0.0))


def _latent_recipe(name: str, task: Any, data: str, tokenizer: Loaded | None, *, steps: int, batch: int) -> Recipe:
    """A flow map of the latents at `data`, without a teacher."""
    found = latents(data, latent=task.flow_map.network.shape)
    decoder: dict[str, Any] = {"normalizer": found.normalizer()}
    origins = {}
    if tokenizer is not None:
        expect_maker(found, tokenizer.tokenizer, tokenizer.params["tokenizer"])
        decoder["tokenizer"] = tokenizer.params["tokenizer"]
        origins["tokenizer"] = tokenizer.origin
    config = RunConfig(
        name,
        (Stage("flow-map", task, steps, batch, found),),
        origins,
        FlowMapSampler(),
        None if tokenizer is None else tokenizer.tokenizer,
        engine=EngineConfig(checkpoint_every=10_000, keep_every=100_000, log_every=100),
    )
    return Recipe(config, artifacts=decoder)


def _meanflow(
    name: str, network: DiTConfig, data: str, tokenizer: Loaded | None, epochs: int, **guided: float
) -> Recipe:
    optim, average = adamw(1e-4, (0.9, 0.95)), (Constant(0.9999),)
    task = MeanFlowTask(flow_map=FlowMap(network, Linear()), optim=optim, emas=average, **guided)
    return _latent_recipe(name, task, data, tokenizer, steps=epochs * EPOCH // 256, batch=256)


def meanflow_xl2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MeanFlow-XL/2 on ImageNet-256 latents, the paper's 240 epochs (data: a latent cache)."""
    network = dit("XL/2", learned_variance=False, times=2)
    return _meanflow("meanflow-xl2", network, data, tokenizer, 240, omega=0.2, kappa=0.92, guided_to=0.75)


def meanflow_b4(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MeanFlow-B/4 on ImageNet-256 latents, 80 epochs on one GPU (data: a latent cache)."""
    network = dit("B/4", learned_variance=False, times=2, remat="none", scan=False)
    return _meanflow("meanflow-b4", network, data, tokenizer, 80, omega=1.0, kappa=0.5)


def shortcut_b2(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A shortcut model, DiT-B/2, on ImageNet-256 latents, the paper's 810k steps (data: a latent cache)."""
    network = dit("B/2", learned_variance=False, times=2)
    parameterization = AverageVelocity("halvings", inner=Predict("velocity", "reversed", sign=-1))
    task = ShortcutTask(
        flow_map=FlowMap(network, Linear(sigma_min=1e-5), parameterization),
        optim=OptimConfig(1e-4, weight_decay=0.1),
        emas=(Constant(0.999),),
        scale=1.5,
    )
    return _latent_recipe("shortcut-b2", task, data, tokenizer, steps=810_000, batch=256)


def meanflow_smoke(teacher: Loaded, data: str | None = None) -> Recipe:
    """Any teacher: MeanFlow for a few steps, which checks the path and not the quality."""
    return meanflow(teacher, data, updates=20, batch=32)


PRESETS = {
    "meanflow": meanflow,
    "shortcut": shortcut,
    "meanflow-xl2": meanflow_xl2,
    "meanflow-b4": meanflow_b4,
    "shortcut-b2": shortcut_b2,
    "meanflow-smoke": meanflow_smoke,
}
