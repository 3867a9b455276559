"""Consistency models: distillation, training, improved training, easy tuning and truncated training.

Data: images at the model's size, or what the teacher was trained on. Published (FID-50k of one and of two steps):

| | CIFAR-10 | ImageNet-64 | source |
|---|---|---|---|
| CD (LPIPS) | 3.55 / 2.93 | 6.20 / 4.70 | arXiv 2303.01469 |
| CT (LPIPS) | 8.70 / 5.83 | 13.0 / 11.1 | arXiv 2303.01469 |
| iCT | 2.83 / 2.46 | 4.02 / 3.20 | arXiv 2310.14189 |
| ECT, 200k steps of 128 | 3.86 / 2.15 | | README of locuslab/ect |
| TCM | 2.46 / 2.05 | 2.88 / 2.31 (EDM2-S) | README of NVlabs/TCM |

None is reproduced here yet. Community reruns of iCT report 10 to 13 at smaller batches. LPIPS as the distance favours
FID, whose features see alike: report FD-DINOv2 as well. The figures of the laptop presets stand in docs/distillers.md.
"""

import dataclasses
from typing import Any

import numpy as np

from gen.data.images import Images, Labels
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig
from gen.diffusion.consistency_maps import consistency_map, data_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import Consistency, FlowMap
from gen.diffusion.process import EDM
from gen.distill.consistency import ConsistencyDistillationTask, ConsistencyTask, TruncatedTask
from gen.distill.distances import Norm, Perceptual, PseudoHuber
from gen.distill.pairs import Doubling, Fixed, GridPairs, LogLevels, Progressive, ShrinkingPairs
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
from gen.experiments.edm import ADM64, CIFAR
from gen.runs import Loaded
from gen.sampling.flowmaps import FlowMapSampler
from gen.tokenizers.losses import LPIPS, available, frozen_terms
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["LONG", "PRESETS", "perceptual"]

LONG = EngineConfig(checkpoint_every=2000, keep_every=50_000, log_every=100, preview_every=10_000)
AVERAGES = (Constant(0.9999), Constant(0.999), Constant(0.99994))
CIFAR_NCSN: Any = dataclasses.replace(
    CIFAR, embedding="fourier", noise=2, encoder="residual", taps=(1, 3, 3, 1), augment=0, dropout=0.0
)


def consistency_distillation(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 3000,
    batch: int = 128,
    points: int = 8,
) -> Recipe:
    """Consistency distillation of any teacher, minutes on a laptop for the digits (data: latents or images)."""
    task = ConsistencyDistillationTask(
        teacher=teacher.denoiser,
        flow_map=consistency_map(like_teacher(teacher, student)),
        guidance=guidance_of(teacher),
        pairs=GridPairs(Fixed(points)),
        distance=PseudoHuber(0.03),
        weight="uniform",
        **falling(1e-3, average=0.998),
    )
    return jumping_student("consistency-distillation", teacher, task, steps, batch, data, calls)


def consistency_training(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 3000,
    batch: int = 128,
) -> Recipe:
    """Consistency training on a growing grid from any teacher's weights, minutes on a laptop for the digits."""
    task = ConsistencyTask(
        flow_map=consistency_map(like_teacher(teacher, student)),
        pairs=GridPairs(Progressive(4, 32)),
        distance=Norm(),
        weight="uniform",
        target_decay=0.9,
        **falling_slowly(),
    )
    return jumping_student("consistency-training", teacher, task, steps, batch, data, calls)


def ict(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 3000,
    batch: int = 128,
) -> Recipe:
    """Improved consistency training from any teacher's weights, minutes on a laptop for the digits."""
    task = ConsistencyTask(
        flow_map=consistency_map(like_teacher(teacher, student)),
        pairs=GridPairs(Doubling(4, 32), mean=-0.4, std=1.6),
        distance=PseudoHuber(0.06),
        **falling_slowly(),
    )
    return jumping_student("ict", teacher, task, steps, batch, data, calls)


def ect(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 4000,
    batch: int = 128,
) -> Recipe:
    """Easy consistency tuning of any teacher, minutes on a laptop for the digits (data: latents or images)."""
    pairs = ShrinkingPairs(LogLevels(-0.4, 1.6), q=4.0, double=steps / 4)
    task = ConsistencyTask(
        flow_map=data_map(like_teacher(teacher, student)), pairs=pairs, distance=PseudoHuber(0.06), **falling_slowly()
    )
    return jumping_student("ect", teacher, task, steps, batch, data, calls)


def tcm(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 4000,
    batch: int = 128,
) -> Recipe:
    """Truncated consistency training of any teacher in two stages, minutes on a laptop for the digits."""
    first = ect(teacher, data, student, calls, steps=steps // 2, batch=batch)
    (stage,) = first.config.stages
    pairs = ShrinkingPairs(LogLevels(0.0, 1.2, 2.0, 1.0, 80.0), q=4.0, double=steps / 8, begun=steps // 2)
    task = TruncatedTask(
        flow_map=data_map(like_teacher(teacher, student)), pairs=pairs, distance=PseudoHuber(0.06), **falling_slowly()
    )
    stages = (
        dataclasses.replace(stage, name="whole"),
        Stage("truncated", task, steps - steps // 2, batch, stage.data),
    )
    return dataclasses.replace(first, config=dataclasses.replace(first.config, name="tcm", stages=stages))


def perceptual() -> tuple[Any, dict[str, tuple[str, Any]]]:
    """Gives LPIPS (VGG) and its weights where they are on this machine, else the mean squared difference."""
    terms, lines = available((LPIPS(),))
    print("\n".join(lines), end="\n" if lines else "")
    arrays, origins = frozen_terms(terms)
    frozen = {role: (origins[role], arrays[role]) for role in arrays}
    return (Perceptual(terms[0]) if terms else Norm()), frozen


def _rectified(lr: float) -> OptimConfig:
    return OptimConfig(lr, rectified=True)


def _images(path: str, network: Any) -> Images:
    labels: Labels = "class" if network.num_classes else "none"
    return Images(path, network.size, channels=network.channels, labels=labels)


def _published(
    name: str,
    flow_map: FlowMap,
    task: Any,
    data: str,
    steps: int,
    batch: int,
    times: tuple[float, ...],
    frozen: dict[str, tuple[str, Any]],
) -> Recipe:
    """A run from scratch, sampled at `times` with clipping."""
    stage = Stage("student", task, steps, batch, _images(data, flow_map.network))
    origins = {role: origin for role, (origin, _) in frozen.items()}
    sampler = FlowMapSampler(times, gamma=1.0, clip=True)
    config = RunConfig(name, (stage,), origins, sampler, engine=LONG)
    return Recipe(config, frozen={role: arrays for role, (_, arrays) in frozen.items()})


def _distilled(
    name: str, teacher: Loaded, data: str, points: int, decay: float | None, lr: float, steps: int, batch: int
) -> Recipe:
    distance, frozen = perceptual()
    flow_map = consistency_map(teacher.denoiser)
    task = ConsistencyDistillationTask(
        teacher=teacher.denoiser,
        flow_map=flow_map,
        pairs=GridPairs(Fixed(points)),
        distance=distance,
        weight="uniform",
        target_decay=decay,
        optim=_rectified(lr),
        emas=AVERAGES,
    )
    stage = Stage("student", task, steps, batch, student_data(data, teacher))
    sampler = FlowMapSampler(gamma=1.0, clip=True)
    return student_recipe(name, teacher, (stage,), sampler=sampler, frozen=frozen, engine=LONG)


def cd_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """Consistency distillation on ImageNet-64, the paper's 600k steps of 2048 (teacher: EDM's ADM; data: images)."""
    return _distilled("cd-imagenet64", teacher, data, 40, 0.95, 8e-6, 600_000, 2048)


def cd_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Consistency distillation on CIFAR-10, the paper's 800k steps of 512 (teacher: EDM; data: images at 32 px)."""
    return _distilled("cd-cifar10", teacher, data, 18, None, 4e-4, 800_000, 512)


def cd_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """Consistency distillation on CIFAR-10 in 10k steps of 256, one GPU (teacher: EDM; data: images at 32 px)."""
    return _distilled("cd-cifar10-gpu", teacher, data, 18, None, 4e-4, 10_000, 256)


def _trained(
    name: str, network: Any, data: str, curriculum: Any, decay: float, lr: float, steps: int, batch: int, second: float
) -> Recipe:
    distance, frozen = perceptual()
    flow_map = FlowMap(network, EDM(), Consistency())
    task = ConsistencyTask(
        flow_map=flow_map,
        pairs=GridPairs(curriculum),
        distance=distance,
        weight="uniform",
        target_decay=decay,
        optim=_rectified(lr),
        emas=AVERAGES,
    )
    return _published(name, flow_map, task, data, steps, batch, (80.0, second, 0.002), frozen)


def _point(index: int, points: int) -> float:
    """The level at a point of the grid, counted from the noise end as the official codes do."""
    return float(EDM().at(np.float64(1.0 - index / (points - 1))))


def ct_imagenet64(data: str) -> Recipe:
    """Consistency training on ImageNet-64, the paper's 800k steps of 2048, sampled in two (data: images at 64 px)."""
    network = dataclasses.replace(ADM64, dropout=0.0, dtype="bfloat16", remat="full")
    return _trained("ct-imagenet64", network, data, Progressive(2, 200), 0.95, 1e-4, 800_000, 2048, _point(106, 201))


def ct_cifar10(data: str) -> Recipe:
    """Consistency training on CIFAR-10, the paper's 800k steps of 512, sampled in two (data: images at 32 px)."""
    return _trained("ct-cifar10", CIFAR_NCSN, data, Progressive(2, 150), 0.9, 4e-4, 800_000, 512, 0.821)


def _improved(name: str, network: Any, data: str, average: float, steps: int, batch: int, second: float) -> Recipe:
    flow_map = FlowMap(network, EDM(), Consistency())
    task = ConsistencyTask(flow_map=flow_map, optim=_rectified(1e-4), emas=(Constant(average),))
    return _published(name, flow_map, task, data, steps, batch, (80.0, second, 0.002), {})


def ict_cifar10(data: str) -> Recipe:
    """Improved consistency training on CIFAR-10, the paper's 400k steps of 1024, sampled in two (data: images)."""
    network = dataclasses.replace(CIFAR_NCSN, dropout=0.3, frequencies=0.02)
    return _improved("ict-cifar10", network, data, 0.99993, 400_000, 1024, 0.821)


def ict_imagenet64(data: str) -> Recipe:
    """Improved consistency training on ImageNet-64, the paper's 800k steps of 4096, sampled in two (data: images)."""
    network: DhariwalUNetConfig = dataclasses.replace(ADM64, dropout=0.2, dtype="bfloat16", remat="full")
    return _improved("ict-imagenet64", network, data, 0.99997, 800_000, 4096, 1.526)


def _tuned(teacher: Loaded, name: str, data: str, pairs: ShrinkingPairs, steps: int, average: float) -> Recipe:
    denoiser = Denoiser(
        dataclasses.replace(teacher.denoiser.network, dropout=0.2), teacher.denoiser.process, EDMPrecondition()
    )
    flow_map = data_map(denoiser)
    task = ConsistencyTask(
        flow_map=flow_map, pairs=pairs, distance=PseudoHuber(0.0), optim=_rectified(1e-4), emas=(Constant(average),)
    )
    stage = Stage("student", task, steps, 128, student_data(data, teacher))
    sampler = FlowMapSampler((80.0, 0.821, denoiser.process.t_min), gamma=1.0)
    return student_recipe(name, teacher, (stage,), sampler=sampler, engine=LONG)


def ect_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Easy consistency tuning on CIFAR-10, 200k steps of 128, sampled in two (teacher: EDM; data: images at 32 px)."""
    return _tuned(teacher, "ect-cifar10", data, ShrinkingPairs(), 200_000, 0.9999)


def ect_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """Easy consistency tuning on CIFAR-10 in the authors' hour on one GPU: 8k steps of 128, sampled in two."""
    pairs = ShrinkingPairs(q=256.0, double=8000)
    return _tuned(teacher, "ect-cifar10-gpu", data, pairs, 8000, 0.9993)


def tcm_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Truncated consistency training on CIFAR-10: 350k steps of 512, 300k of 1024 (teacher: EDM; data: images)."""
    first = _tuned(teacher, "tcm-cifar10", data, ShrinkingPairs(limit=0.999, floor=1e-6), 350_000, 0.9999)
    (stage,) = first.config.stages
    whole = dataclasses.replace(stage.task, distance=PseudoHuber(1e-8))
    truncated = TruncatedTask(
        flow_map=whole.flow_map,
        pairs=ShrinkingPairs(
            LogLevels(0.0, 0.2, 0.01, 1.0, 80.0), limit=0.999, floor=1e-6, double=25_000, begun=350_000
        ),
        distance=PseudoHuber(1e-8),
        optim=_rectified(5e-5),
        emas=(Constant(0.9999),),
    )
    stages = (
        dataclasses.replace(stage, name="whole", task=whole, batch=512),
        Stage("truncated", truncated, 300_000, 1024, stage.data),
    )
    sampler = FlowMapSampler((80.0, 1.0, whole.flow_map.process.t_min), gamma=1.0)
    return dataclasses.replace(first, config=dataclasses.replace(first.config, stages=stages, sampler=sampler))


PRESETS = {
    "consistency-distillation": consistency_distillation,
    "consistency-training": consistency_training,
    "ict": ict,
    "ect": ect,
    "tcm": tcm,
    "cd-imagenet64": cd_imagenet64,
    "cd-cifar10": cd_cifar10,
    "cd-cifar10-gpu": cd_cifar10_gpu,
    "ct-imagenet64": ct_imagenet64,
    "ct-cifar10": ct_cifar10,
    "ict-cifar10": ict_cifar10,
    "ict-imagenet64": ict_imagenet64,
    "ect-cifar10": ect_cifar10,
    "ect-cifar10-gpu": ect_cifar10_gpu,
    "tcm-cifar10": tcm_cifar10,
}
