"""SIMS: guidance away from a copy that was trained on the model's own samples (Alemohammad et al. 2024).

arXiv 2408.16333. The copy exaggerates the model's errors; D = D_copy + w (D - D_copy) with w = 1 + omega leads away
from them. That is autoguidance with the copy as the weaker model, at two calls a step. `plan` makes the samples, the
copy and the scores: the scale is chosen on some seeds and reported on others, beside the model with as many calls, and
beside Neon (arXiv 2510.03597), which moves the weights instead, theta + omega (theta - theta_copy), at the model's own
calls.

Samples whose classes have other shares than the data (``shares``) make a copy that prefers them: guidance away from it
steers the other way.

Expected (FID; a follow-up's tables): CIFAR-10 unconditional, EDM, 1.97 to 1.33 at twice the calls; FFHQ-64 2.39 to
1.04; ImageNet-512 with EDM2-S 2.56 to 1.73. Not reproduced here yet.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from gen.data.random import RANDOM
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._search import scored, tunable
from gen.experiments._students import latent_arrays, student_data
from gen.features.extractor import Extractor
from gen.metrics.protocol import Result
from gen.metrics.reference import Reference
from gen.plan import Plan
from gen.runs import Loaded
from gen.sampling.guidance import Autoguidance
from gen.sampling.records import Records
from gen.steps import Evaluate, MakeRecords, Train
from gen.training.ema import Constant, HalfLife
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "guided", "moved", "plan"]

SCALES = (1.2, 1.5, 2.0, 3.0)


def own(data: str, teacher: Loaded) -> Any:
    """Gives the model's samples at `data`. Raises GenError for data that it did not make."""
    if data != RANDOM and not (Path(data) / "records.json").exists():
        raise GenError(f"{data} holds no samples of {teacher.path}; make them with gen distill sims --pairs N")
    return student_data(data, teacher)


def auxiliary(
    name: str,
    teacher: Loaded,
    data: Any,
    *,
    optim: OptimConfig,
    average: Any,
    updates: int,
    batch: int,
    engine: EngineConfig | None = None,
) -> Recipe:
    """Gives the recipe of a copy of the model, trained on its own samples with its own loss."""
    denoiser = teacher.denoiser
    drops = 0.1 if denoiser.network.num_classes and denoiser.network.null_class else 0.0
    task = DenoiserTask(denoiser, dropout=drops, optim=optim, emas=(average,))
    config = RunConfig(
        name,
        (Stage("auxiliary", task, updates, batch, data),),
        {"start": teacher.origin},
        teacher.config.sampler,
        teacher.config.tokenizer,
        class_names=teacher.config.class_names,
        engine=engine or EngineConfig(checkpoint_every=100, log_every=20),
    )
    kept = latent_arrays(teacher)
    return Recipe(config, frozen={"start": teacher.params["net"]}, artifacts=kept)


def sims(teacher: Loaded, data: str, *, updates: int = 1000, batch: int = 128) -> Recipe:
    """Any diffusion or flow model: the copy that guides, a minute on a laptop (data: the model's own samples)."""
    optim = OptimConfig(1e-3, betas=(0.9, 0.99), warmup=20, clip=1.0)
    average = Constant(0.99, warmup=True)
    return auxiliary("sims", teacher, own(data, teacher), optim=optim, average=average, updates=updates, batch=batch)


def sims_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any diffusion or flow model: a few steps of the copy, which check the path (data: the model's own samples)."""
    return sims(teacher, data, updates=20, batch=32)


def sims_cifar10(teacher: Loaded, data: str, *, batch: int = 512, updates: int = 31_250) -> Recipe:
    """The copy of EDM on CIFAR-10, 16M images on 8 GPUs, kept along the way (data: 50k samples of the teacher)."""
    engine = EngineConfig(checkpoint_every=1000, keep_every=updates // 16)
    settings: dict[str, Any] = {"optim": OptimConfig(1e-3), "average": HalfLife(500_000), "engine": engine}
    return auxiliary("sims-cifar10", teacher, own(data, teacher), updates=updates, batch=batch, **settings)


def sims_cifar10_gpu(teacher: Loaded, data: str) -> Recipe:
    """The same on one GPU, in batches of 128 (data: 50k samples of the teacher)."""
    return sims_cifar10(teacher, data, batch=128, updates=125_000)


def guided(teacher: Loaded, copy: Loaded, scale: float) -> Loaded:
    """Gives the model guided away from the copy with scale w = 1 + omega; 1 is the model alone."""
    sampler = dataclasses.replace(teacher.config.sampler.changed(guidance=Autoguidance(scale)), guide=copy.denoiser)
    found = teacher.with_sampler(sampler)
    return dataclasses.replace(found, params={**teacher.params, "guide": copy.params["net"]})


def moved(teacher: Loaded, copy: Loaded, omega: float) -> Loaded:
    """Gives the model with its weights moved away from the copy's: theta + omega (theta - theta_copy)."""
    net = jax.tree.map(lambda a, b: a + omega * (a - b), dict(teacher.params["net"]), dict(copy.params["net"]))
    return dataclasses.replace(teacher, params={**teacher.params, "net": net})


def compared(
    teacher: Loaded,
    copy: Loaded,
    *,
    reference: Reference,
    extractor: Extractor,
    scales: Sequence[float] = SCALES,
    count: int = 1797,
    batch: int = 1024,
) -> dict[str, Result]:
    """Gives scores by subject: the model, the model with twice the steps, the best of guidance and of moved weights.

    Scales are chosen on seeds 0 to `count` - 1; what is given is of the seeds that follow.

    Raises GenError for no scales.
    """
    if not scales:
        raise GenError("a choice among no scales; give some, such as 1.5 and 2")
    chosen, fresh = range(count), range(count, 2 * count)

    def distance(loaded: Loaded) -> float:
        return scored(loaded, reference, extractor, chosen, batch=batch).values["frechet_distance"]

    away = min(scales, key=lambda w: distance(guided(teacher, copy, w)))
    move = min(scales, key=lambda w: distance(moved(teacher, copy, w - 1.0)))
    longer = teacher.with_sampler(teacher.config.sampler.changed(steps=2 * teacher.config.sampler.steps))
    subjects = {
        "model": teacher,
        "model, twice the steps": longer,
        f"SIMS, scale {away:g}": guided(teacher, copy, away),
        f"Neon, omega {move - 1.0:g}": moved(teacher, copy, move - 1.0),
    }
    return {name: scored(loaded, reference, extractor, fresh, batch=batch) for name, loaded in subjects.items()}


def plan(
    outdir: str | Path,
    teacher: Loaded,
    reference: Reference,
    extractor: Extractor,
    *,
    samples: int = 8192,
    shares: tuple[float, ...] = (),
    recipe: Any = sims,
    scales: tuple[float, ...] = SCALES,
    count: int = 1797,
) -> Plan:
    """Gives the plan: ``samples`` of the model, the copy ``auxiliary``, and ``scores``.

    Args:
      teacher: the model; it is sampled by its own sampler. Guidance away from the copy takes the place of its own
        guidance: for a comparison of like with like give a model without.
      shares: of the classes among the samples; () for equal ones.
      recipe: a preset of this file.

    Raises GenError for a model that no solver samples.
    """
    tunable(teacher)
    options = {"scales": list(scales), "count": count, "reference": reference.fingerprint()}
    score = functools.partial(compared, reference=reference, extractor=extractor, scales=scales, count=count)
    steps = (
        MakeRecords("samples", "model", samples, shares=shares, about="what the model makes"),
        Train(
            "auxiliary",
            functools.partial(_of_records, recipe),
            {"teacher": "model", "samples": "samples"},
            about="a copy, trained on them",
        ),
        Evaluate("scores", score, {"teacher": "model", "copy": "auxiliary"}, options, about="guidance away from it"),
    )
    return Plan(outdir, steps, given={"model": teacher})


def _of_records(recipe: Any, teacher: Loaded, samples: Records) -> Recipe:
    found: Recipe = recipe(teacher, samples.path)
    return found


PRESETS = {
    "sims": sims,
    "sims-smoke": sims_smoke,
    "sims-cifar10": sims_cifar10,
    "sims-cifar10-gpu": sims_cifar10_gpu,
}
