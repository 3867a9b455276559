"""f-distill: distribution matching under an f-divergence (Xu et al. 2025, arXiv 2502.15681).

DMD2's networks and steps, with a head on the frozen teacher's features at the noised sample, whose logit gives each
sample its weight.

Expected (FID, one call, table 5 of the paper): CIFAR-10 class-conditional 1.92 with kl (2.13 with reverse KL, which is
DMD2 in that code), ImageNet-64 1.16 with js. Not reproduced here yet. On the digits teacher: docs/distillers.md.
"""

from typing import Any

from gen.diffusion.objectives import DataMatching
from gen.distill.discriminator import ApproximateR1
from gen.distill.f_distill import FDistillTask
from gen.experiments import Recipe
from gen.experiments._heads import bottleneck_head, every_block
from gen.experiments._students import student_data, student_recipe, student_times
from gen.experiments.dmd2 import laptop, learned_first
from gen.runs import Loaded
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]


def f_distill(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    updates: int = 1500,
    batch: int = 128,
    **changes: Any,
) -> Recipe:
    """Any teacher: f-distill with js, minutes on a laptop for the demo's (data: the teacher's, or its pairs)."""
    source = student_data(data, teacher)
    task = FDistillTask(**laptop(teacher, student, calls, **every_block(teacher.denoiser) | changes))
    first = learned_first(teacher, student, source, updates, batch, calls=calls)
    return student_recipe("f-distill", teacher, (*first, Stage("matching", task, updates, batch, source)))


def _official(teacher: Loaded, lr: float, **changes: Any) -> FDistillTask:
    optim = OptimConfig(lr, weight_decay=0.01, warmup=500, clip=10.0)
    settings: dict[str, Any] = {
        "teacher": teacher.denoiser,
        "times": student_times(teacher.denoiser.process, 1),
        "guidance": teacher.config.sampler.guidance,
        "fake_objective": DataMatching(),
        "optim": optim,
        "fake_optim": optim,
    }
    return FDistillTask(**(settings | bottleneck_head(teacher.denoiser) | changes))


def f_distill_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """f-distill on ImageNet-64 with js, 380k steps of 512 images (teacher: EDM's ADM; data: images)."""
    source = student_data(data, teacher)
    stages = (
        Stage("matching", _official(teacher, 2e-6, gan_weight=3e-3), 200_000, 512, source),
        Stage("longer", _official(teacher, 5e-7, gan_weight=3e-3), 180_000, 512, source),
    )
    return student_recipe("f-distill-imagenet64", teacher, stages, engine=EngineConfig(checkpoint_every=2000))


def f_distill_cifar10(teacher: Loaded, data: str) -> Recipe:
    """f-distill on CIFAR-10 with kl and R1, 60k steps of 2048 images (teacher: EDM's DDPM++; data: images)."""
    task = _official(teacher, 1e-4, divergence="kl", gan_weight=1e-3, r1=ApproximateR1(1.0))
    stage = Stage("matching", task, 60_000, 2048, student_data(data, teacher))
    return student_recipe("f-distill-cifar10", teacher, (stage,), engine=EngineConfig(checkpoint_every=2000))


def f_distill_smoke(teacher: Loaded, data: str | None = None) -> Recipe:
    """Any teacher: f-distill for a few steps, which checks the path and not the quality."""
    return f_distill(teacher, data, updates=20, batch=32)


PRESETS = {
    "f-distill": f_distill,
    "f-distill-imagenet64": f_distill_imagenet64,
    "f-distill-cifar10": f_distill_cifar10,
    "f-distill-smoke": f_distill_smoke,
}
