"""Continuous-time consistency models, sCM: training (sCT) and distillation (sCD) under TrigFlow.

Published (FID-50k of one and of two steps; arXiv 2410.11081 and, for the recipes of the CIFAR-10 presets here, the
README of NVlabs/FastGen):

| | sCT | sCD |
|---|---|---|
| CIFAR-10 | 2.97 / 2.06; FastGen 3.23 | 3.66 / 2.52; FastGen 3.22 |
| ImageNet-64, XL | 2.04 / 1.48 | 2.44 / 1.66; FastGen's ADM recipe is ``scd-imagenet64`` |

None is reproduced here yet. FastGen takes the root mean square of the tangent and divides the loss by the number of
elements (``scaling`` mean); the paper takes the plain norm. The paper's networks embed the angle itself: a network of
EDM's preconditioning is one under TrigFlow exactly, with EDM's clock. The figures of the laptop presets stand in
docs/distillers.md.
"""

import dataclasses
from typing import Any

import numpy as np

from gen.diffusion.consistency_maps import trig_map
from gen.distill.pairs import LogLevels
from gen.distill.scm import SCDTask, SCMTask
from gen.experiments import Recipe
from gen.experiments._students import (
    falling,
    falling_slowly,
    guidance_of,
    jumping_student,
    like_teacher,
    student_data,
    student_recipe,
)
from gen.experiments.consistency import LONG
from gen.runs import Loaded
from gen.sampling.flowmaps import FlowMapSampler
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]


def scd(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 2000,
    batch: int = 128,
) -> Recipe:
    """Continuous-time consistency distillation of any teacher, minutes on a laptop for the digits."""
    task = SCDTask(
        teacher=teacher.denoiser, guidance=guidance_of(teacher), **_laptop(teacher, student, steps), **falling(1e-3)
    )
    return jumping_student("scd", teacher, task, steps, batch, data, calls)


def sct(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 4000,
    batch: int = 128,
) -> Recipe:
    """Continuous-time consistency training from any teacher's weights, minutes on a laptop for the digits."""
    task = SCMTask(**_laptop(teacher, student, steps), **falling_slowly())
    return jumping_student("sct", teacher, task, steps, batch, data, calls)


def _laptop(teacher: Loaded, student: Any, steps: int) -> dict[str, Any]:
    return {
        "flow_map": trig_map(like_teacher(teacher, student)),
        "levels": LogLevels(-1.0, 1.4),  # the paper's: with higher ones sCD stays far from the data
        "warmup": max(1, steps // 4),
        "weight_optim": OptimConfig(1e-2),
    }


RADAM = OptimConfig(1e-4, betas=(0.9, 0.99), rectified=True)
AVERAGES = (Constant(0.9999), Constant(0.9996), Constant(0.99995))


def _published(name: str, teacher: Loaded, data: str, task: Any, steps: int, batch: int, second: float) -> Recipe:
    """A run with the averages of FastGen, sampled in two steps with the second at a noise level."""
    process = task.flow_map.process
    times = (process.t_max, float(process.time_of(-2.0 * np.log(second))), 0.0)
    stage = Stage("student", task, steps, batch, student_data(data, teacher))
    return student_recipe(name, teacher, (stage,), sampler=FlowMapSampler(times, gamma=1.0), engine=LONG)


def _settings(teacher: Loaded, levels: LogLevels, optim: OptimConfig, dropout: float = 0.0) -> dict[str, Any]:
    network = dataclasses.replace(teacher.denoiser.network, dropout=dropout)
    return {
        "flow_map": trig_map(like_teacher(teacher, network)),
        "levels": levels,
        "scaling": "mean",
        "optim": optim,
        "weight_optim": optim,
        "emas": AVERAGES,
    }


def sct_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Continuous-time consistency training on CIFAR-10, FastGen's 350k steps of 512 (teacher: EDM; data: images)."""
    task = SCMTask(**_settings(teacher, LogLevels(-1.0, 1.4, low=0.002, high=800.0), RADAM, 0.2))
    return _published("sct-cifar10", teacher, data, task, 350_000, 512, 0.821)


def scd_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Continuous-time consistency distillation on CIFAR-10, FastGen's 500k steps of 512 (teacher: EDM)."""
    task = _distilled(teacher, LogLevels(-1.0, 1.4, low=0.002, high=800.0), RADAM)
    return _published("scd-cifar10", teacher, data, task, 500_000, 512, 0.821)


def scd_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """Continuous-time consistency distillation on CIFAR-10 in 10k steps of 128, one GPU (teacher: EDM)."""
    task = dataclasses.replace(_distilled(teacher, LogLevels(-1.0, 1.4), RADAM), warmup=2000)
    return _published("scd-cifar10-gpu", teacher, data, task, 10_000, 128, 0.821)


def scd_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """Continuous-time consistency distillation on ImageNet-64, FastGen's 600k steps of 1024 (teacher: EDM's ADM)."""
    optim = OptimConfig(7e-5, betas=(0.9, 0.99), eps=1e-11, schedule="inverse-sqrt", knee=35_000, clip=10.0)
    task = _distilled(teacher, LogLevels(-1.0, 1.6, low=0.002, high=80.0), optim)
    return _published("scd-imagenet64", teacher, data, task, 600_000, 1024, 1.1)


def _distilled(teacher: Loaded, levels: LogLevels, optim: OptimConfig) -> SCDTask:
    return SCDTask(teacher=teacher.denoiser, guidance=guidance_of(teacher), **_settings(teacher, levels, optim))


PRESETS = {
    "scd": scd,
    "sct": sct,
    "sct-cifar10": sct_cifar10,
    "scd-cifar10": scd_cifar10,
    "scd-cifar10-gpu": scd_cifar10_gpu,
    "scd-imagenet64": scd_imagenet64,
}
