"""DDO: direct discriminative optimisation of a diffusion, flow or token model (Zheng et al. 2025, arXiv 2503.01103).

Rounds of self-play: samples of the model by its own sampler without guidance, a short run against them, and the tuned
model is the next reference. `rounds` is the plan of several; a preset is one round, on records that were made of a
teacher without guidance.

Expected (FID-50k without guidance; the official repository's README): EDM on CIFAR-10, unconditional, 1.97 to 1.38 in
12 rounds of 1.5M images, conditional 1.85 to 1.30 in 16; EDM2-S on ImageNet-64 1.58 to 0.97 in 24 rounds of 6.4M. alpha
and beta were swept in each round. VAR-d16 on ImageNet-256, without guidance 11.33 to 3.12 in two rounds of some 90
steps (its table 3). No public trainer exists; not reproduced here yet.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gen.autoregressive.base import TokenModel
from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.generator import TokenGenerator, WrittenTokens
from gen.data.alongside import Alongside
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import latent_arrays
from gen.finetune.ddo import DDOMethod, DDOTask, TokenDDOTask
from gen.plan import Plan
from gen.runs import Loaded
from gen.sampling.guidance import ClassifierFree
from gen.sampling.records import Records
from gen.steps import MakeRecords, Train
from gen.training.ema import Constant, HalfLife
from gen.training.engine import Hook
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "one_round", "rounds"]


def one_round(
    name: str,
    teacher: Loaded,
    fakes: Records,
    task: DDOMethod,
    *,
    updates: int,
    batch: int,
    engine: EngineConfig | None = None,
) -> Recipe:
    """Gives the recipe of one round, on what the teacher was trained on beside its own samples.

    Raises GenError for a teacher whose run does not say what that was.
    """
    if not teacher.config.stages:
        raise GenError(f"{teacher.path} does not say what it was trained on; train it here, or give its run's data")
    real = teacher.config.stages[-1].data
    if isinstance(real, Alongside):  # of a round before
        real = real.data
    stage = Stage("round", task, updates, batch, Alongside(real, fakes))
    several = bool(getattr(teacher.generator.subject, "scales", ()))  # such a model reads its tokenizer's codes
    codes = {"tokenizer": teacher.params["tokenizer"]} if several else {}
    config = RunConfig(
        name,
        (stage,),
        dict.fromkeys(("teacher", *codes), teacher.origin),
        teacher.config.sampler,
        teacher.config.tokenizer,
        class_names=teacher.config.class_names,
        engine=engine or EngineConfig(),
    )
    kept = latent_arrays(teacher)
    return Recipe(config, frozen={"teacher": teacher.params["net"], **codes}, artifacts=kept)


def ddo(teacher: Loaded, data: str, *, updates: int = 300, batch: int = 128) -> Recipe:
    """Any diffusion or flow model: one round of DDO, a minute on a laptop for the demo's (data: its own samples)."""
    task = DDOTask(
        teacher=teacher.denoiser,
        alpha=1.0,
        beta=60.0
        / math.prod(teacher.denoiser.network.shape),  # of the same size for any number of dimensions: 0.02 for CIFAR-10
        optim=OptimConfig(2e-4, betas=(0.9, 0.99), warmup=100, clip=1.0),
        emas=(Constant(0.99, warmup=True),),
    )
    return one_round("ddo", teacher, Records(data, teacher.origin), task, updates=updates, batch=batch)


def ddo_tokens(teacher: Loaded, data: str, *, updates: int = 200, batch: int = 128) -> Recipe:
    """Any model of tokens in one order: one round of DDO, a minute on a laptop for the demo's (data: its samples)."""
    model = teacher.generator.subject
    if not isinstance(model, TokenModel):
        raise GenError(f"{teacher.path} is a {type(model).__name__}; tune it with the preset 'ddo'")
    task = TokenDDOTask(
        teacher=model,
        beta=14.0 / model.length,  # of the same size for any number of tokens: 0.02 for VAR's 680
        optim=OptimConfig(1e-4, betas=(0.9, 0.99), warmup=50, clip=1.0),
        emas=(Constant(0.98, warmup=True),),
    )
    return one_round("ddo-tokens", teacher, Records(data, teacher.origin), task, updates=updates, batch=batch)


def ddo_cifar10(teacher: Loaded, data: str) -> Recipe:
    """One of the paper's rounds on CIFAR-10: 1.5M images in batches of 512 (data: 50k samples of the teacher)."""
    task = DDOTask(
        teacher=teacher.denoiser,
        alpha=4.0,
        optim=OptimConfig(1.5e-4, warmup=2930),
        emas=(HalfLife(250_000),),
    )
    engine = EngineConfig(checkpoint_every=200, keep_every=200)
    fakes = Records(data, teacher.origin)
    return one_round("ddo-cifar10", teacher, fakes, task, updates=2930, batch=512, engine=engine)


def ddo_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any diffusion or flow model: a few steps of DDO, which check the path and not the quality (data: its samples)."""
    return ddo(teacher, data, updates=20, batch=32)


def rounds(
    outdir: str | Path,
    teacher: Loaded,
    *,
    count: int = 4,
    samples: int = 50_000,
    recipe: Callable[..., Recipe] = ddo,
    hooks: Callable[[Any], Sequence[Hook]] | None = None,
) -> Plan:
    """Gives the plan of self-play: ``samples-0``, ``round-1``, ``samples-1`` ... in folders of `outdir`.

    Args:
      teacher: the first reference, sampled without its guidance in every round. A token model's recipe is
        `ddo_tokens`.
      count: rounds.
      samples: of each reference.
      recipe: a preset of this file, which makes a round of a teacher and the path of its records.
      hooks: scores during training (`gen.metrics.monitor`). Each round then gives its best checkpoint, by the metric
        that the recipe's ``engine.best`` names, and not its last one.
    """
    tokens = isinstance(teacher.generator, TokenGenerator)
    unguided = ConstantScale() if tokens else ClassifierFree()
    teacher = teacher.with_sampler(dataclasses.replace(teacher.config.sampler, guidance=unguided))
    make, about = WrittenTokens if tokens else None, "what the reference makes"
    steps: list[Any] = []
    for k in range(count):
        steps += [
            MakeRecords(f"samples-{k}", f"round-{k}", samples, make=make, about=about),
            Train(
                f"round-{k + 1}",
                functools.partial(_of_records, recipe),
                {"teacher": f"round-{k}", "fakes": f"samples-{k}"},
                hooks=hooks,
                best=hooks is not None,
                about="the model against its reference",
            ),
        ]
    return Plan(outdir, tuple(steps), given={"round-0": teacher})


def _of_records(recipe: Callable[..., Recipe], teacher: Loaded, fakes: Records) -> Recipe:
    return recipe(teacher, fakes.path)


PRESETS = {"ddo": ddo, "ddo-tokens": ddo_tokens, "ddo-cifar10": ddo_cifar10, "ddo-smoke": ddo_smoke}
