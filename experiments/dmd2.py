"""DMD2: one network call by distribution matching (Yin et al. 2024, arXiv 2405.14867); DMD (arXiv 2311.18828).

The teacher's network makes the student, the fake score and, with a head on its bottleneck, the discriminator; process,
latents, classes and guidance are the teacher's. Times follow from the process, so that EDM, DDPM and flow teachers are
distilled by the same presets.

Expected (FID-50k on ImageNet-64, one call, against EDM's statistics; the official repository's README): 2.61 without a
discriminator after 410k steps, 1.51 with one after 200k, 1.28 with one after 410k steps without and 140k more; DMD 2.62
(table 1 of its paper; on CIFAR-10, class-conditional, 2.66). The teacher has 2.32 with 511 calls. Not reproduced here
yet. On the digits teacher of the demo: see docs/distillers.md.
"""

import dataclasses
from typing import Any

from gen.distill.dmd2 import DMD2Task
from gen.distill.kd import KDTask
from gen.distill.multi_student import ScoreMatchingTask
from gen.experiments import Recipe
from gen.experiments._heads import bottleneck_head
from gen.experiments._students import student_data, student_recipe, student_times
from gen.runs import Loaded
from gen.sampling.records import Records
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["FALLING", "LAPTOP", "PRESETS", "laptop", "learned_first", "official", "other"]

FALLING = OptimConfig(5e-4, betas=(0.0, 0.99), schedule="cosine", warmup=50, final=0.05, clip=10.0)
LAPTOP: dict[str, Any] = {
    "ratio": 2,
    "optim": FALLING,
    "fake_optim": dataclasses.replace(FALLING, lr=1e-3),
    "emas": (Constant(0.99, warmup=True),),
}


def laptop(teacher: Loaded, student: Any = None, calls: int = 1, **changes: Any) -> dict[str, Any]:
    """Gives the settings of a matching task for the demo's teacher: high learning rates, averages of a hundred updates.

    Args:
      student: the student's network; None for the teacher's.
      calls: of the student for a sample.
      changes: further settings, which win.
    """
    settings = {
        "teacher": teacher.denoiser,
        "student": other(teacher, student),
        "times": student_times(teacher.denoiser.process, calls),
        "guidance": teacher.config.sampler.guidance,
    }
    return settings | LAPTOP | changes


def other(teacher: Loaded, student: Any) -> Any:
    """Gives the denoiser of a student with another network than its teacher's; None for the teacher's own."""
    return None if student is None else dataclasses.replace(teacher.denoiser, network=student)


def learned_first(
    teacher: Loaded, student: Any, source: Any, updates: int, batch: int, *, calls: int = 1
) -> tuple[Stage, ...]:
    """Gives the stages that a student begins with, before the method's own.

    Another network than the teacher's learns its scores; where the data are stored pairs of the teacher, students of
    one call learn them by regression (a third of the updates), as the one-step SDXL of DMD2 did.
    """
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=20, final=0.05, clip=1.0)
    settings: dict[str, Any] = {
        "teacher": teacher.denoiser,
        "student": other(teacher, student),
        "times": student_times(teacher.denoiser.process, calls),
        "optim": optim,
    }
    stages = []
    if student is not None:
        stages.append(Stage("scores", ScoreMatchingTask(**settings), 2 * updates, batch, source))
    if isinstance(source, Records) and calls == 1:
        stages.append(Stage("regression", KDTask(**settings), max(1, updates // 3), batch, source))
    return tuple(stages)


def official(teacher: Loaded, lr: float, **changes: Any) -> DMD2Task:
    """Gives the task with the official settings at one learning rate for both networks."""
    optim = OptimConfig(lr, weight_decay=0.01, warmup=500, clip=10.0)
    process = teacher.denoiser.process
    settings = {"teacher": teacher.denoiser, "times": student_times(process, 1), "optim": optim, "fake_optim": optim}
    return DMD2Task(**(settings | {"guidance": teacher.config.sampler.guidance} | changes))


def dmd2(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    updates: int = 1500,
    batch: int = 128,
    **changes: Any,
) -> Recipe:
    """Any teacher: DMD2 with a discriminator, minutes on a laptop for the demo's (data: as the teacher's, or pairs)."""
    source = student_data(data, teacher)
    task = DMD2Task(**laptop(teacher, student, calls, **bottleneck_head(teacher.denoiser) | changes))
    first = learned_first(teacher, student, source, updates, batch, calls=calls)
    return student_recipe("dmd2", teacher, (*first, Stage("matching", task, updates, batch, source)))


def dmd(teacher: Loaded, data: str) -> Recipe:
    """Any teacher: DMD, matching with regression on stored pairs and no discriminator (data: pairs of the teacher)."""
    task = DMD2Task(**laptop(teacher, ratio=1, regression=1.0))
    return student_recipe("dmd", teacher, (Stage("matching", task, 1000, 128, student_data(data, teacher)),))


def dmd2_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """DMD2 on ImageNet-64: 410k steps without a discriminator, 140k with one (teacher: EDM's ADM; data: images)."""
    source = student_data(data, teacher)
    stages = (
        Stage("matching", official(teacher, 2e-6), 410_000, 280, source),
        Stage("adversarial", official(teacher, 5e-7, **bottleneck_head(teacher.denoiser)), 140_000, 280, source),
    )
    return student_recipe("dmd2-imagenet64", teacher, stages, engine=_engine(2000))


def dmd2_imagenet64_scratch(teacher: Loaded, data: str) -> Recipe:
    """DMD2 on ImageNet-64 with a discriminator from the start, 200k steps (teacher: EDM's ADM; data: images)."""
    task = official(teacher, 2e-6, **bottleneck_head(teacher.denoiser))
    stage = Stage("adversarial", task, 200_000, 280, student_data(data, teacher))
    return student_recipe("dmd2-imagenet64-scratch", teacher, (stage,), engine=_engine(2000))


def dmd2_cifar10(teacher: Loaded, data: str) -> Recipe:
    """DMD2 on CIFAR-10, 12k steps of 256 images, some twenty minutes on one GPU (data: images at 32 px)."""
    changes = bottleneck_head(teacher.denoiser) | {"emas": (Constant(0.999, warmup=True),)}
    stage = Stage("adversarial", official(teacher, 5e-5, **changes), 12_000, 256, student_data(data, teacher))
    return student_recipe("dmd2-cifar10", teacher, (stage,), engine=_engine(1000))


def dmd2_smoke(teacher: Loaded, data: str | None = None) -> Recipe:
    """Any teacher: DMD2 for a few steps, which checks the path and not the quality."""
    return dmd2(teacher, data, updates=20, batch=32)


PRESETS = {
    "dmd2": dmd2,
    "dmd": dmd,
    "dmd2-imagenet64": dmd2_imagenet64,
    "dmd2-imagenet64-scratch": dmd2_imagenet64_scratch,
    "dmd2-cifar10": dmd2_cifar10,
    "dmd2-smoke": dmd2_smoke,
}


def _engine(every: int) -> EngineConfig:
    return EngineConfig(checkpoint_every=every, log_every=100, preview_every=5 * every)
