"""Knowledge distillation: regression on a teacher's stored samples (Luhman and Luhman 2021, arXiv 2101.02388).

Expected: FID 9.36 on CIFAR-10 with one call (as tables that quote the paper have it), blurry alone, a good start for
distribution matching. Not reproduced here yet. On the digits teacher of the demo: see docs/distillers.md.
"""

from typing import Any

from gen.distill.kd import KDTask
from gen.experiments import Recipe
from gen.experiments._students import student_data, student_recipe, student_times
from gen.experiments.dmd2 import learned_first, other
from gen.runs import Loaded
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]


def kd(teacher: Loaded, data: str, student: Any = None, *, updates: int = 3000, batch: int = 128) -> Recipe:
    """Any teacher: regression on stored pairs, a minute on a laptop for the demo's (data: pairs of the teacher)."""
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=20, final=0.01, clip=1.0)
    times = student_times(teacher.denoiser.process, 1)
    emas, source = (Constant(0.99, warmup=True),), student_data(data, teacher)
    task = KDTask(teacher=teacher.denoiser, student=other(teacher, student), times=times, optim=optim, emas=emas)
    begun = learned_first(teacher, student, source, updates, batch)
    first = [stage for stage in begun if stage.name == "scores"]  # regression is this very method
    return student_recipe("kd", teacher, (*first, Stage("regression", task, updates, batch, source)))


def kd_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Regression on CIFAR-10, 40k steps of 512, on one GPU (data: 500,000 or more pairs of the teacher)."""
    times = student_times(teacher.denoiser.process, 1)
    optim = OptimConfig(2e-4, warmup=500, clip=1.0)
    task = KDTask(teacher=teacher.denoiser, times=times, optim=optim, emas=(Constant(0.999, warmup=True),))
    stage = Stage("regression", task, 40_000, 512, student_data(data, teacher))
    return student_recipe("kd-cifar10", teacher, (stage,), engine=EngineConfig(checkpoint_every=2000))


def kd_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any teacher: regression for a few steps, which checks the path and not the quality (data: stored pairs)."""
    return kd(teacher, data, updates=20, batch=32)


PRESETS = {"kd": kd, "kd-cifar10": kd_cifar10, "kd-smoke": kd_smoke}
