"""SlimFlow: one-step students smaller than their teacher (Zhu et al. 2024, arXiv 2407.12718).

Data: pairs of noise and sample of the teacher (``gen distill PRESET --teacher RUN --pairs N``); the second stage learns
from the same pairs.

Expected (FID-50k on CIFAR-10, unconditional, one call, EDM teacher, clean-fid's statistics; table 1 of the paper): 4.53
with 27.9M parameters, 5.02 with 15.7M (`slimflow_cifar10`); FFHQ-64 7.21 and 7.70; ImageNet-64 12.34 with 80.7M. Not
reproduced here yet. On the digits teacher of the demo: see docs/distillers.md.
"""

import dataclasses
from typing import Any

from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.distill.slimflow import AnnealingReflowTask, FlowGuidedTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import student_data, student_recipe
from gen.experiments._tokenizers import perceptual
from gen.pretrained.slimflow import denoiser
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Euler
from gen.tokenizers.losses import frozen_terms
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "SMALL", "slimmer"]

# of both stages: the first trains a flow, which a solver samples
ONE_STEP = Sampler(Euler(), Uniform(), 1, ClassifierFree(1.0))
# the published 15.7M student of 32 px images
SMALL = SongUNetConfig(32, width=96, mult=(1, 2, 2), blocks=2, attention=(16,), dropout=0.15)


def slimmer(teacher: Denoiser, student: Any = None) -> Denoiser:
    """Gives a flow of about half its teacher's parameters: a narrower transformer, or the teacher's U-Net with less
    width.

    Args:
      student: its network, where one was chosen.

    Raises GenError for other networks, of which the user is to choose a student.
    """
    network: Any = teacher.network
    width = 3 * getattr(network, "width", 0) // 4
    if student is not None:
        network = student
    elif isinstance(network, DiTConfig):  # the head width stays even, for rotary positions a multiple of 4
        step = 4 * network.heads
        network = dataclasses.replace(network, width=max(width // step, 1) * step)
    elif hasattr(network, "mult"):
        network = dataclasses.replace(network, width=width // 8 * 8)
    else:
        raise GenError(f"no smaller {type(network).__name__} is known; use a preset of your own with a student")
    clock = getattr(teacher.parameterization, "scale", 1.0) if teacher.process == Linear() else 999.0
    return Denoiser(network, Linear(), Predict("velocity", scale=clock))


def slimflow(
    teacher: Loaded,
    data: str,
    student: Any = None,
    *,
    annealing: int = 2500,
    distillation: int = 1500,
    batch: int = 128,
) -> Recipe:
    """Any teacher: a one-step student of half its size, minutes on a laptop for the demo's (data: pairs of it)."""
    found, own = student_data(data, teacher), slimmer(teacher.denoiser, student)
    shared: dict[str, Any] = {"teacher": teacher.denoiser, "student": own}
    rising = OptimConfig(3e-3, betas=(0.9, 0.99), warmup=50, clip=1.0)
    falling = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", final=0.02, clip=1.0)
    averages = (Constant(0.99, warmup=True),)
    first = AnnealingReflowTask(**shared, horizon=annealing // 2, optim=rising, emas=averages)
    second = FlowGuidedTask(**shared, optim=falling, emas=averages)
    stages = (
        Stage("annealing", first, annealing, batch, found),
        Stage("distillation", second, distillation, batch, found),
    )
    return student_recipe("slimflow", teacher, stages, sampler=ONE_STEP)


def _cifar10(
    name: str, teacher: Loaded, data: str, *, steps: tuple[int, int], batch: int, average: float, horizon: int
) -> Recipe:
    found, terms = student_data(data, teacher), perceptual(1.0)
    frozen, origins = frozen_terms(terms)
    shared: dict[str, Any] = {
        "teacher": teacher.denoiser,
        "student": denoiser(SMALL),
        "flip": True,
        "emas": (Constant(average, warmup=True),),
    }
    first = AnnealingReflowTask(**shared, horizon=horizon, optim=OptimConfig(2e-4, warmup=steps[0] // 160, clip=1.0))
    second = FlowGuidedTask(
        **shared, squared=0.0 if terms else 1.0, perceptual=next(iter(terms), None), optim=OptimConfig(2e-4, clip=1.0)
    )
    stages = (
        Stage("annealing", first, steps[0], batch, found),
        Stage("distillation", second, steps[1], batch, found),
    )
    further = {role: (origins[role], arrays) for role, arrays in frozen.items()}
    engine = EngineConfig(checkpoint_every=2000, log_every=100, preview_every=10_000)
    return student_recipe(name, teacher, stages, sampler=ONE_STEP, frozen=further, engine=engine)


def slimflow_cifar10(teacher: Loaded, data: str) -> Recipe:
    """SlimFlow's 15.7M student on CIFAR-10, the paper's 800k + 400k steps (data: pairs of an EDM teacher)."""
    steps = (800_000, 400_000)
    return _cifar10("slimflow-cifar10", teacher, data, steps=steps, batch=128, average=0.999999, horizon=300_000)


def slimflow_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """SlimFlow's 15.7M student on CIFAR-10, 16k + 8k steps on one GPU (data: pairs of an EDM teacher)."""
    steps = (16_000, 8_000)
    return _cifar10("slimflow-cifar10-gpu", teacher, data, steps=steps, batch=256, average=0.999, horizon=6_000)


def slimflow_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any teacher: SlimFlow for a few steps, which checks the path and not the quality (data: pairs)."""
    return slimflow(teacher, data, annealing=10, distillation=10, batch=32)


PRESETS = {
    "slimflow": slimflow,
    "slimflow-cifar10": slimflow_cifar10,
    "slimflow-cifar10-gpu": slimflow_cifar10_gpu,
    "slimflow-smoke": slimflow_smoke,
}
