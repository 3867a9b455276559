"""What the experiments of distillation share: a student's recipe, whose sizes and conditions are its teacher's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen.data.caches import Cache
from gen.data.images import Images
from gen.errors import GenError
from gen.experiments import Recipe
from gen.runs import Loaded
from gen.sampling.generator import FewSteps
from gen.sampling.records import Records
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["student_data", "student_recipe"]


def student_data(data: str | None, teacher: Loaded) -> Any:
    """Gives what a student is trained on.

    Args:
      data: teacher records, a latent cache, or images; None for what the teacher itself was trained on.

    Raises GenError where none is given and the teacher's run does not say (published weights).
    """
    if data is None:
        if not teacher.config.stages:
            raise GenError(f"{teacher.path} does not say what it was trained on; add --data DATA")
        return teacher.config.stages[-1].data
    if (Path(data) / "records.json").exists():
        return Records(data, teacher.origin)
    if (Path(data) / "cache.json").exists():
        return Cache(data)
    size = teacher.denoiser.network.shape[0]
    return Images(data, size, labels="class" if "label" in teacher.denoiser.network.conditions else "none")


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
    kept = {role: teacher.params[role] for role in ("tokenizer", "normalizer") if role in teacher.params}
    return Recipe(config, frozen=arrays, artifacts=kept)
