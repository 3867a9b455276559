"""What the experiments of distillation share: a student's recipe, whose sizes and conditions are its teacher's."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen.data.caches import Cache
from gen.data.images import Images
from gen.data.random import RANDOM, Random
from gen.errors import GenError
from gen.experiments import Recipe, build, find
from gen.runs import Loaded
from gen.sampling.flowmaps import FlowMapSampler
from gen.sampling.generator import FewSteps
from gen.sampling.guidance import ClassifierFree
from gen.sampling.records import Records
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = [
    "falling",
    "falling_slowly",
    "guidance_of",
    "jumping_student",
    "latent_arrays",
    "like_teacher",
    "student_data",
    "student_network",
    "student_recipe",
    "student_times",
]


def latent_arrays(teacher: Loaded) -> dict[str, Any]:
    """Gives what leads from a teacher's latents to images, by role: its tokenizer's arrays and its normaliser."""
    return {role: teacher.params[role] for role in ("tokenizer", "normalizer") if role in teacher.params}


def falling(lr: float, *, warmup: int = 20, average: float = 0.98) -> dict[str, Any]:
    """Gives optimiser and average of a student that is trained for a minute: settings ``optim`` and ``emas``."""
    optim = OptimConfig(lr, betas=(0.9, 0.99), schedule="cosine", warmup=warmup, final=0.05, clip=1.0)
    return {"optim": optim, "emas": (Constant(average, warmup=True),)}


def falling_slowly() -> dict[str, Any]:
    """Gives `falling` for a student without a teacher: what data alone say is noisy, and is averaged for longer."""
    return falling(2e-4, average=0.999)


def guidance_of(teacher: Loaded) -> Any:
    """Gives the guidance that a teacher is sampled with; none where its sampler knows none."""
    return getattr(teacher.config.sampler, "guidance", ClassifierFree())


def like_teacher(teacher: Loaded, student: Any = None) -> Any:
    """Gives the teacher's Denoiser, with the network configuration `student` where that is given."""
    return teacher.denoiser if student is None else dataclasses.replace(teacher.denoiser, network=student)


def student_data(data: str | None, teacher: Loaded) -> Any:
    """Gives what a student is trained on.

    Args:
      data: teacher records, a latent cache, or images; ``random`` for arrays of the teacher's shapes, to plan a run;
        None for what the teacher itself was trained on.

    Raises GenError where none is given and the teacher's run does not say (published weights).
    """
    if data is None:
        if not teacher.config.stages:
            raise GenError(f"{teacher.path} does not say what it was trained on; add --data DATA")
        return teacher.config.stages[-1].data
    if data == RANDOM:
        network = teacher.denoiser.network
        label = {"label": ()} if "label" in network.conditions else {}
        return Random({"latent": network.shape, "noise": network.shape, **label})
    if (Path(data) / "records.json").exists():
        return Records(data, teacher.origin)
    if (Path(data) / "cache.json").exists():
        return Cache(data)
    network = teacher.denoiser.network
    size, channels = network.shape[0], network.shape[-1]
    return Images(data, size, channels=channels, labels="class" if "label" in network.conditions else "none")


def student_recipe(
    name: str,
    teacher: Loaded,
    stages: tuple[Stage, ...],
    *,
    sampler: Any = None,
    frozen: Mapping[str, tuple[str, Any]] | None = None,
    engine: EngineConfig | None = None,
) -> Recipe:
    """Gives the recipe of a student of `teacher`, which decodes with the teacher's tokenizer and normaliser.

    Args:
      sampler: how the student is sampled; None for the times that it was trained for (`FewSteps`).
      frozen: further frozen networks by role: where each came from, and its arrays.
    """
    further = dict(frozen or {})
    config = RunConfig(
        name,
        stages,
        {"teacher": teacher.origin} | {role: origin for role, (origin, _) in further.items()},
        sampler or FewSteps(),
        teacher.config.tokenizer,
        class_names=teacher.config.class_names,
        engine=engine or EngineConfig(),
    )
    arrays = {"teacher": teacher.params["net"]} | {role: arrays for role, (_, arrays) in further.items()}
    kept = latent_arrays(teacher)
    return Recipe(config, frozen=arrays, artifacts=kept)


def jumping_student(
    name: str, teacher: Loaded, task: Any, steps: int, batch: int, data: str | None, calls: int
) -> Recipe:
    """Gives the recipe of one stage of a student that jumps to the data, `calls` times with fresh noise between."""
    stage = Stage("student", task, steps, batch, student_data(data, teacher))
    return student_recipe(name, teacher, (stage,), sampler=FlowMapSampler(steps=calls, gamma=1.0))


def student_network(preset: str, teacher: Loaded) -> Any:
    """Gives the network of `preset` with the inputs and the conditions of `teacher`.

    Raises GenError for a preset of no denoiser or that needs more than data, and for a network that cannot have the
    teacher's size or conditions.
    """
    row, like = find(preset), teacher.denoiser.network
    if set(row.required) - {"data"}:
        raise GenError(
            f"preset '{preset}' needs {' and '.join(row.required)}; give a student that trains on data alone"
        )
    models = build(preset, {"data": RANDOM} if row.required else {}).config.exported()
    network = models["net"].config.network if "net" in models else None
    if network is None:
        raise GenError(f"preset '{preset}' trains no denoiser; give a student such as dit-b2 or edm-smoke")
    *sides, channels = like.shape
    whole = isinstance(network.size, int)
    if whole and (len(sides) != 2 or sides[0] != sides[1]):
        raise GenError(f"the network of '{preset}' takes square images, the teacher {like.shape}; give another student")
    fields = {field.name for field in dataclasses.fields(network)}
    changed = {"size": sides[0] if whole else tuple(sides), "channels": channels, "num_classes": like.num_classes}
    changed |= {"out_channels": channels} if "out_channels" in fields else {}
    try:
        fitted = dataclasses.replace(network, **changed)
    except GenError as error:
        raise GenError(f"the network of '{preset}' cannot have the teacher's {like.shape}: {error}") from None
    if fitted.shape != like.shape or fitted.conditions != like.conditions:
        raise GenError(
            f"the network of '{preset}' takes {fitted.shape} and {', '.join(fitted.conditions) or 'no condition'}, the "
            f"teacher {like.shape} and {', '.join(like.conditions) or 'no condition'}; give another student"
        )
    return fitted


def student_times(process: Any, calls: int) -> tuple[float, ...]:
    """Gives the times of a student of `calls` network calls: equally spaced on the process, from its noise end on.

    Raises GenError for fewer than one call.
    """
    if calls < 1:
        raise GenError(f"a student makes a sample in {calls} calls; expected at least 1")
    return tuple(float(process.at(np.float64(1.0 - i / calls))) for i in range(calls))
