"""LADD: adversarial distillation on a teacher's own features, in latents (Sauer et al. 2024, arXiv 2403.12015).

A student, and heads on the frozen teacher; they take turns. The real data are best a teacher's guided samples
(records). Expected: the paper judges SD3-Turbo's four steps by preference and gives no one-step distance; the nearest,
adversarial distillation in the tables of arXiv 2502.15681, has FID 2.60 on CIFAR-10 and 1.88 on ImageNet-64. Not
reproduced here yet. On the digits teacher of the demo: see docs/distillers.md.
"""

import dataclasses
from typing import Any

from gen.diffusion.times import Levels
from gen.distill.discriminator import ApproximateR1
from gen.distill.ladd import LADDTask
from gen.experiments import Recipe
from gen.experiments._heads import every_block
from gen.experiments._students import student_data, student_recipe, student_times
from gen.experiments.dmd2 import FALLING, learned_first, other
from gen.runs import Loaded
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]


def ladd(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    updates: int = 3000,
    batch: int = 128,
    **changes: Any,
) -> Recipe:
    """Any teacher: LADD, minutes on a laptop for the demo's (data: the teacher's, or better its pairs)."""
    source = student_data(data, teacher)
    settings: dict[str, Any] = {
        "student": other(teacher, student),
        "times": student_times(teacher.denoiser.process, calls),
        # gradients of a discriminator that hardly tells the two apart are noise: a small rate, a long average
        "optim": dataclasses.replace(FALLING, lr=3e-5),
        "head_optim": dataclasses.replace(FALLING, lr=1e-3),
        "emas": (Constant(0.998, warmup=True),),
        "gan_levels": Levels(0.02, 0.98),
        "r1": ApproximateR1(0.1),
    }
    task = LADDTask(teacher=teacher.denoiser, **(settings | every_block(teacher.denoiser) | changes))
    first = learned_first(teacher, student, source, updates, batch, calls=calls)
    return student_recipe("ladd", teacher, (*first, Stage("adversarial", task, updates, batch, source)))


def ladd_imagenet256(teacher: Loaded, data: str) -> Recipe:
    """LADD in latents of ImageNet at 256 px: four steps, 100k updates of 512 (data: the teacher's guided samples)."""
    task = LADDTask(
        teacher=teacher.denoiser,
        times=student_times(teacher.denoiser.process, 4),
        optim=OptimConfig(1e-5, weight_decay=0.01, warmup=500, clip=10.0),
        head_optim=OptimConfig(2e-5, weight_decay=0.01, warmup=500, clip=10.0),
        r1=ApproximateR1(),
        **every_block(teacher.denoiser),
    )
    stage = Stage("adversarial", task, 200_000, 512, student_data(data, teacher))
    return student_recipe("ladd-imagenet256", teacher, (stage,), engine=EngineConfig(checkpoint_every=2000))


def ladd_smoke(teacher: Loaded, data: str | None = None) -> Recipe:
    """Any teacher: LADD for a few steps, which checks the path and not the quality."""
    return ladd(teacher, data, updates=20, batch=32)


PRESETS = {"ladd": ladd, "ladd-imagenet256": ladd_imagenet256, "ladd-smoke": ladd_smoke}
