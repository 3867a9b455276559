"""Progressive and guided distillation (Salimans and Ho 2022, arXiv 2202.00512; Meng et al. 2022, arXiv 2210.03142).

Teacher: any diffusion or flow model; for guidance one with classes and a null label. Progressive distillation halves
the steps of a DDIM sampler stage by stage; guided distillation first makes one network of the guided teacher, for every
guidance scale, and halves that. Students are sampled by DDIM in the steps of their last stage.

Expected (FID-50k): progressive distillation on CIFAR-10, unconditional, 9.12, 4.51, 3.00 and 2.57 with 1, 2, 4 and 8
calls (from memory, but for the 3.0 of its abstract); a re-implementation on EDM has 8.34 and 5.58 with 1 and 2, and on
ImageNet-64 15.39, 8.95 and 6.77 with 1, 2 and 4 (arXiv 2303.01469, from memory). Of guided distillation no tables could
be checked: hold a student against its guided teacher. Not reproduced here yet. On the digits teacher of the demo: see
docs/distillers.md.
"""

from typing import Any

from gen.distill.guided_distillation import GuidedTask, guided_student
from gen.distill.progressive_distillation import ProgressiveTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import guidance_of, student_data, student_recipe
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import DDIM
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]

LAPTOP: dict[str, Any] = {
    "optim": OptimConfig(1e-3, betas=(0.9, 0.99), schedule="linear", warmup=20, clip=1.0),
    "emas": (Constant(0.99, warmup=True),),
}


def _halved(first: int, last: int) -> list[int]:
    """The students' steps, from `first` down to `last`, by halves.

    Raises GenError where halving does not lead there.
    """
    if last < 1 or first % last or (first // last) & (first // last - 1):
        raise GenError(f"{first} steps are not halved to {last}; expected one of their halves")
    steps = [first]
    while steps[-1] > last:
        steps.append(steps[-1] // 2)
    return steps


def _sampler(steps: int) -> Sampler:
    return Sampler(DDIM(), Uniform(), steps, ClassifierFree(1.0))


def _halvings(first: int, last: int, updates: int, batch: int, data: Any, **task: Any) -> tuple[Stage, ...]:
    """A stage for each halving; those of one and two steps are twice as long."""
    return tuple(
        Stage(f"{n}-steps", ProgressiveTask(steps=n, **task), updates * (2 if n <= 2 else 1), batch, data)
        for n in _halved(first, last)
    )


def progressive_distillation(
    teacher: Loaded,
    data: str | None = None,
    calls: int = 1,
    *,
    first: int = 8,
    updates: int = 600,
    batch: int = 128,
) -> Recipe:
    """Any teacher, unguided: DDIM steps halved to one, minutes on a laptop for the demo's (data: the teacher's)."""
    source = student_data(data, teacher)
    stages = _halvings(first, calls, updates, batch, source, teacher=teacher.denoiser, **LAPTOP)
    return student_recipe("progressive-distillation", teacher, stages, sampler=_sampler(calls))


def guided_distillation(
    teacher: Loaded,
    data: str | None = None,
    calls: int = 1,
    *,
    first: int = 8,
    updates: int = 600,
    batch: int = 128,
) -> Recipe:
    """Any guided teacher: one network for all guidance scales, then halved, minutes on a laptop for the demo's."""
    source, usual = student_data(data, teacher), getattr(guidance_of(teacher), "scale", 1.0)
    student = guided_student(teacher.denoiser, factor=1.0, usual=usual)
    shared: dict[str, Any] = {"teacher": teacher.denoiser, "student": student, "scales": (1.0, 2.0), **LAPTOP}
    stages = (
        Stage("guided", GuidedTask(**shared), 2 * updates, batch, source),
        *_halvings(first, calls, updates, batch, source, **shared),
    )
    return student_recipe("guided-distillation", teacher, stages, sampler=_sampler(calls))


def progressive_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Progressive distillation on CIFAR-10: 1024 steps halved to 1, 50k updates each (data: images at 32 px)."""
    optim = OptimConfig(5e-5, schedule="linear", clip=1.0)
    source = student_data(data, teacher)
    stages = _halvings(512, 1, 50_000, 128, source, teacher=teacher.denoiser, optim=optim)
    return student_recipe("progressive-cifar10", teacher, stages, sampler=_sampler(1), engine=_engine(5000))


def progressive_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """Progressive distillation on CIFAR-10: 16 steps halved to 1, an hour on one GPU (data: images at 32 px)."""
    optim = OptimConfig(1e-4, schedule="linear", warmup=100, clip=1.0)
    source = student_data(data, teacher)
    stages = _halvings(8, 1, 2500, 256, source, teacher=teacher.denoiser, optim=optim, emas=(Constant(0.999),))
    return student_recipe("progressive-cifar10-gpu", teacher, stages, sampler=_sampler(1), engine=_engine(1000))


def guided_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """Guided distillation on ImageNet-64, scales 1 to 5, 1024 steps halved to 1 (data: images at 64 px)."""
    student = guided_student(teacher.denoiser)
    shared: dict[str, Any] = {"teacher": teacher.denoiser, "student": student}
    source = student_data(data, teacher)
    constant, falling = OptimConfig(1e-4), OptimConfig(1e-4, schedule="linear", clip=1.0)
    stages = (
        Stage("guided", GuidedTask(**shared, optim=constant, emas=(Constant(0.9999),)), 100_000, 2048, source),
        *_halvings(512, 1, 50_000, 2048, source, **shared, optim=falling),
    )
    return student_recipe("guided-imagenet64", teacher, stages, sampler=_sampler(1), engine=_engine(5000))


def guided_smoke(teacher: Loaded, data: str | None = None) -> Recipe:
    """Any guided teacher: guided distillation for a few steps, which checks the path and not the quality."""
    return guided_distillation(teacher, data, first=2, updates=4, batch=32)


PRESETS = {
    "progressive-distillation": progressive_distillation,
    "guided-distillation": guided_distillation,
    "progressive-cifar10": progressive_cifar10,
    "progressive-cifar10-gpu": progressive_cifar10_gpu,
    "guided-imagenet64": guided_imagenet64,
    "guided-smoke": guided_smoke,
}


def _engine(every: int) -> EngineConfig:
    return EngineConfig(checkpoint_every=every, log_every=100, preview_every=2 * every)
