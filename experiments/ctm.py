"""Consistency trajectory models, CTM: one network that jumps from any noise level to any lower one.

Published (FID-50k of one and two steps): CIFAR-10 conditional 1.73 / 1.63, unconditional 1.98 / 1.87; ImageNet-64
conditional 1.92 / 1.73 (abstract and tables of arXiv 2310.02279). None is reproduced here yet. The official second
stage trains against a projected discriminator on DeiT and EfficientNet features with augmentation of what it sees;
here it is RAE's and StyleGAN-T's, on the tokens of a DINO encoder (``gen.tokenizers.losses.EncoderTokens``). Its
weights are the user's: ``ctm-cifar10`` and ``ctm-imagenet64`` are the first stage, and ``adversarial_stage`` adds the
second from Python. The figures of the laptop preset stand in docs/distillers.md.
"""

import dataclasses
from typing import Any

from gen.arrays import flatten
from gen.diffusion.flowmap import jump_map
from gen.distill.ctm import CTMTask
from gen.distill.distances import Norm
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import falling, guidance_of, like_teacher, student_data, student_recipe
from gen.experiments.consistency import LONG, perceptual
from gen.nn.network import param_shapes
from gen.nn.token_discriminator import TokenDiscriminator
from gen.runs import Loaded
from gen.sampling.flowmaps import FlowMapSampler
from gen.tokenizers.losses import EncoderTokens
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "adversarial_stage", "last_layer"]


def last_layer(network: Any) -> str:
    """Gives the path of a network's last kernel, where the terms of the loss are weighed: that of the output, and in
    ADM's networks the last of the last block, as published. Raises GenError for a network without either.
    """
    paths = flatten(param_shapes(network))
    outputs = [f"dec/{network.size}x{network.size}_{name}/kernel" for name in ("block3/conv1", "aux_conv")]
    if getattr(network, "head_width", None) is None:
        outputs.reverse()
    found = next((path for path in ("final/kernel", "out_conv/kernel", *outputs) if path in paths), None)
    if found is None:
        raise GenError(f"{type(network).__name__} has no last layer that this preset knows; set the task's last_layer")
    return found


def ctm(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    calls: int = 1,
    *,
    steps: int = 1000,
    batch: int = 128,
    points: int = 9,
) -> Recipe:
    """A consistency trajectory model of any teacher, minutes on a laptop for the digits."""
    settings = falling(1e-3, average=0.995) | {"flow_map": jump_map(like_teacher(teacher, student))}
    task = _task(teacher, points, points - 1, Norm(), 0.95, settings)
    stage = Stage("student", task, steps, batch, student_data(data, teacher))
    return student_recipe("ctm", teacher, (stage,), sampler=FlowMapSampler(steps=calls))


def _task(teacher: Loaded, points: int, most: int, distance: Any, decay: float, settings: dict[str, Any]) -> CTMTask:
    return CTMTask(
        teacher=teacher.denoiser,
        guidance=guidance_of(teacher),
        points=points,
        most=most,
        distance=distance,
        last_layer=last_layer(settings["flow_map"].network),
        target_decay=decay,
        **settings,
    )


def _published(
    name: str, teacher: Loaded, data: str, points: int, steps: int, batch: int, averages: tuple[float, ...]
) -> Recipe:
    distance, frozen = perceptual()
    settings = {
        "flow_map": jump_map(teacher.denoiser),
        "optim": OptimConfig(4e-4, rectified=True),
        "emas": tuple(Constant(decay) for decay in averages),
    }
    task = _task(teacher, points, points - 1, distance, 0.999, settings)
    stage = Stage("trajectories", task, steps, batch, student_data(data, teacher))
    return student_recipe(name, teacher, (stage,), sampler=FlowMapSampler(), frozen=frozen, engine=LONG)


def ctm_cifar10(teacher: Loaded, data: str) -> Recipe:
    """CTM with its denoising term on CIFAR-10, 50k steps of 256 (teacher: EDM; data: images at 32 px)."""
    return _published("ctm-cifar10", teacher, data, 18, 50_000, 256, (0.999, 0.9999))


def ctm_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """CTM with its denoising term on CIFAR-10 in 5k steps of 128, one GPU (teacher: EDM; data: images at 32 px)."""
    return _published("ctm-cifar10-gpu", teacher, data, 18, 5000, 128, (0.999,))


def ctm_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """CTM with its denoising term on ImageNet-64, 50k steps of 1440 (teacher: EDM's ADM; data: images at 64 px)."""
    return _published("ctm-imagenet64", teacher, data, 40, 50_000, 1440, (0.999, 0.9999, 0.99994))


def adversarial_stage(recipe: Recipe, encoder: EncoderTokens, *, steps: int = 60_000, batch: int = 528) -> Recipe:
    """Gives a published recipe with its second stage: a discriminator on an encoder's tokens joins, taking turns.

    Half of the steps are the student's; the published runs make at least 30k of those.
    """
    first = recipe.config.stages[-1]
    judge = TokenDiscriminator(encoder.network.width, len(encoder.blocks) + 1)
    task = dataclasses.replace(first.task, discriminator=judge, seen=encoder)
    stages = (*recipe.config.stages, Stage("adversarial", task, steps, batch, first.data))
    origins = {**recipe.config.frozen, encoder.name: encoder.identity()}
    config = dataclasses.replace(recipe.config, stages=stages, frozen=origins)
    return dataclasses.replace(recipe, config=config, frozen={**recipe.frozen, encoder.name: encoder.load()})


PRESETS = {
    "ctm": ctm,
    "ctm-cifar10": ctm_cifar10,
    "ctm-cifar10-gpu": ctm_cifar10_gpu,
    "ctm-imagenet64": ctm_imagenet64,
}
