"""Multi-student distillation: one-step students for parts of the classes (Song et al. 2024, arXiv 2410.23274).

Distribution matching, then the same with a discriminator, for all students in one program. Students smaller than the
teacher are preceded by one that learns its denoised predictions, from which all of them start. Lay the students out on
groups of devices with --mesh student=K,data=-1.

Expected (FID on ImageNet-64, one call; the abstract of the paper): 1.20 with four students of the teacher's size; of
students with 42 % fewer parameters 2.88 (as summaries of the paper have it). No official code is public: the lengths
of the stages and the small network are this project's choice. Not reproduced here yet. On the digits teacher of the
demo: see docs/distillers.md.
"""

import dataclasses
from typing import Any, Literal

from gen.data.partitioned import Partitioned, class_means, clustered, contiguous, shuffled
from gen.distill.dmd2 import DMD2Task
from gen.distill.multi_student import MultiStudentTask, ScoreMatchingTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._heads import bottleneck_head
from gen.experiments._students import student_data, student_recipe, student_times
from gen.experiments.dmd2 import laptop, learned_first, official
from gen.runs import Loaded
from gen.sampling.router import Routed
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "divided"]

Way = Literal["contiguous", "shuffled", "clustered"]


def divided(teacher: Loaded, data: Any, students: int, way: Way = "contiguous") -> tuple[int, ...]:
    """Gives the student of each of the teacher's classes.

    Args:
      way: by number, by chance, or by clusters of the classes' mean records.

    Raises GenError for a teacher without classes.
    """
    classes = teacher.denoiser.network.num_classes
    if not classes:
        raise GenError(f"{teacher.path} has no classes to divide among students; give a class-conditional teacher")
    match way:
        case "contiguous":
            return contiguous(classes, students)
        case "shuffled":
            return shuffled(classes, students)
    source = data.source()
    return clustered(class_means(source, classes, "latent" if "latent" in source[0] else "image"), students)


def _recipe(
    name: str,
    teacher: Loaded,
    data: str | None,
    students: int,
    batch: int,
    stages: dict[str, tuple[DMD2Task, int]],
    *,
    way: Way = "contiguous",
    matched: tuple[Stage, ...] = (),
    engine: EngineConfig | None = None,
) -> Recipe:
    """A run of matching stages for all students, after the stage of a small one's start where there is one."""
    source = student_data(data, teacher)
    partition = divided(teacher, source, students, way)
    parted = Partitioned(source, partition)
    several = [
        Stage(stage, MultiStudentTask(task, partition), steps, students * batch, parted)
        for stage, (task, steps) in stages.items()
    ]
    return student_recipe(name, teacher, (*matched, *several), sampler=Routed(), engine=engine)


def multi_student(
    teacher: Loaded,
    data: str | None = None,
    student: Any = None,
    *,
    students: int = 2,
    way: Way = "contiguous",
    updates: int = 1000,
    batch: int = 64,
) -> Recipe:
    """Any teacher with classes: two students, matching and then a discriminator, minutes on a laptop for the demo's."""
    head = bottleneck_head(teacher.denoiser)
    stages = {
        "matching": (DMD2Task(**laptop(teacher, student)), updates),
        "adversarial": (DMD2Task(**laptop(teacher, student, **head)), max(1, updates // 4)),
    }
    matched = learned_first(teacher, student, student_data(data, teacher), updates, students * batch)
    return _recipe("multi-student", teacher, data, students, batch, stages, way=way, matched=matched)


def _paper(teacher: Loaded, **changes: Any) -> dict[str, tuple[DMD2Task, int]]:
    head = bottleneck_head(teacher.denoiser)
    return {
        "matching": (official(teacher, 2e-6, **changes), 200_000),
        "adversarial": (official(teacher, 5e-7, **head, **changes), 140_000),
    }


def multi_student_imagenet64(teacher: Loaded, data: str) -> Recipe:
    """Four students of the teacher's size on ImageNet-64 (teacher: EDM's ADM; data: images)."""
    return _recipe("multi-student-imagenet64", teacher, data, 4, 280, _paper(teacher), engine=_engine())


def multi_student_imagenet64_small(teacher: Loaded, data: str) -> Recipe:
    """Four students of three quarters of the width on ImageNet-64, after score matching (data: images)."""
    small = dataclasses.replace(teacher.denoiser, network=_narrower(teacher.denoiser.network))
    times = student_times(teacher.denoiser.process, 1)
    optim = OptimConfig(1e-4, warmup=5000, clip=10.0)
    matching = ScoreMatchingTask(teacher=teacher.denoiser, student=small, times=times, optim=optim)
    return _recipe(
        "multi-student-imagenet64-small",
        teacher,
        data,
        4,
        280,
        _paper(teacher, student=small),
        matched=(Stage("scores", matching, 400_000, 1024, student_data(data, teacher)),),
        engine=_engine(),
    )


def _narrower(network: Any) -> Any:
    return dataclasses.replace(network, width=network.width * 3 // 4)


def multi_student_cifar10(teacher: Loaded, data: str) -> Recipe:
    """Two students of the teacher's size on CIFAR-10, 5k steps of 128 images each, on one GPU (data: images)."""
    changes: dict[str, Any] = {"emas": (Constant(0.999, warmup=True),)}
    task = official(teacher, 5e-5, **bottleneck_head(teacher.denoiser), **changes)
    return _recipe("multi-student-cifar10", teacher, data, 2, 128, {"adversarial": (task, 5000)}, engine=_engine())


def multi_student_smoke(teacher: Loaded, data: str | None = None) -> Recipe:
    """Any teacher with classes: two students for a few steps, which checks the path and not the quality."""
    return multi_student(teacher, data, updates=20, batch=16)


PRESETS = {
    "multi-student": multi_student,
    "multi-student-imagenet64": multi_student_imagenet64,
    "multi-student-imagenet64-small": multi_student_imagenet64_small,
    "multi-student-cifar10": multi_student_cifar10,
    "multi-student-smoke": multi_student_smoke,
}


def _engine() -> EngineConfig:
    return EngineConfig(checkpoint_every=2000, log_every=100, preview_every=10_000)
