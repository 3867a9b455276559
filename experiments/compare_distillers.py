"""Distillers side by side: every method from the same teacher, at one, two and four network calls, on one page.

Each method is the preset that ``gen distill`` knows it by, with the settings that preset has for a small teacher; all
students see the same noise. Every step resumes where it was interrupted::

    gen demo --outdir demo
    python -m gen.experiments.compare_distillers demo/teacher

A teacher of handwritten digits is scored in the features of this package's own classifier, any other against
``--reference`` images in features of the ``[lite]`` network. Both rank these rows and compare with no paper's figures.

Expected: see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from gen.config import suggest
from gen.data.images import Images
from gen.data.loader import gathered
from gen.data.sources import digits
from gen.errors import GenError
from gen.experiments import Recipe, find
from gen.features.digits import DigitsExtractor
from gen.features.efficientnet_lite import EfficientNetLite
from gen.files import read_json, write_json
from gen.metrics.evaluate import evaluate
from gen.metrics.memorisation import memorisation
from gen.metrics.protocol import Result, combine
from gen.metrics.reference import Reference, make_reference
from gen.metrics.report import Report
from gen.metrics.sources import ImageSet, from_arrays
from gen.nn.conditions import class_count
from gen.nn.network import count
from gen.plan import Made, Plan
from gen.runs import Loaded, load
from gen.sampling.solvers import Euler, Heun
from gen.steps import Evaluate, MakeRecords, Train
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig

__all__ = ["CALLS", "HEAD", "METHODS", "Budget", "run", "table"]

CALLS = (1, 2, 4)  # at which students are scored, where they have them
TEACHER_STEPS = (1, 2, 4, 8, 16, 25, 50)  # of the teacher's solver
METHODS = (
    "kd", "dmd", "dmd2", "f-distill", "ladd", "multi-student", "reflow", "rfpp", "slimflow", "progressive-distillation",
    "guided-distillation", "consistency-distillation", "consistency-training", "ict", "ect", "tcm", "sct", "scd", "ctm",
    "meanflow", "shortcut",
)  # fmt: skip
BEGUN = ("dmd2", "f-distill", "ladd", "multi-student")  # begin with regression where their data are stored pairs
_TIMES = "training.json"


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything runs.

    Attributes:
      pairs: stored teacher pairs, for methods that regress on them.
      count: samples per score.
      sets: scores with different noise, of which the mean is shown.
      updates: training steps of each stage of a method; None for the preset's own.
    """

    pairs: int = 8192
    count: int = 1797
    sets: int = 3
    updates: int | None = None


SMOKE = Budget(pairs=128, count=300, sets=1, updates=4)


def run(
    teacher: str | Path,
    outdir: str | Path = "runs/compare-distillers",
    *,
    methods: Sequence[str] = METHODS,
    reference: str = "",
    budget: Budget = Budget(),
    seed: int = 0,
    redo: Sequence[str] = (),
) -> Made:
    """Runs the whole comparison; the same call again goes on where it was, with other methods too.

    Args:
      teacher: the run folder of a trained model that a solver samples.
      outdir: gets a folder for each step, and report.html.
      methods: presets that take a teacher, and nothing else or its stored pairs.
      reference: real images of the teacher's size; "" for the digits.
      budget: how much runs.
      seed: of data order and noise.
      redo: methods that are trained again, whose settings changed.

    Raises GenError for a method that is no such preset, a teacher of other images than the reference, and where the
    ``[lite]`` network is missing.
    """
    loaded = load(teacher)
    judge = _judge(loaded, reference)
    presets = {name: _method(name) for name in methods}
    enable_compile_cache()
    steps: list[Any] = []
    paired = [name for name, preset in presets.items() if name in BEGUN or "data" in preset.required]
    if paired:
        steps.append(MakeRecords("pairs", "teacher", budget.pairs, about="noise and what the teacher makes of it"))
    scores = functools.partial(_scores, judge, budget)
    options = {"count": budget.count, "sets": budget.sets, "reference": judge.real.identity}
    steps.append(Evaluate("teacher-scores", scores, {"teacher": "teacher"}, options, about="the teacher by steps"))
    for name, preset in presets.items():
        takes = {"teacher": "teacher"} | ({"pairs": "pairs"} if name in paired else {})
        recipe = functools.partial(_recipe, name, budget, seed)
        steps.append(_Student(name, recipe, takes, about=preset.line))
        steps.append(Evaluate(f"{name}-scores", scores, {"student": name}, options, about="in one, two and four calls"))
    page = functools.partial(_page, tuple(presets), judge, budget)
    return Plan(outdir, tuple(steps), given={"teacher": loaded}, page=page).run(redo)


def _method(name: str) -> Any:
    preset = find(name)
    if "teacher" not in preset.required or set(preset.required) - {"teacher", "data"}:
        raise GenError(
            f"'{name}' takes {' and '.join(preset.required) or 'nothing'}; a method takes a teacher, and pairs of it "
            f"as data: {suggest(name, METHODS)}"
        )
    return preset


def _recipe(name: str, budget: Budget, seed: int, teacher: Loaded, pairs: Any = None) -> Recipe:
    """The preset's recipe, whose steps the budget may shorten."""
    preset = find(name)
    inputs = {"teacher": teacher} | ({} if pairs is None else {"data": pairs.path})
    recipe: Recipe = getattr(preset.load(), preset.function)(**inputs)
    stages = recipe.config.stages
    if budget.updates is not None:
        stages = tuple(dataclasses.replace(stage, steps=min(stage.steps, budget.updates)) for stage in stages)
    every = max(1, sum(stage.steps for stage in stages) // 20)
    engine = EngineConfig(seed=seed, checkpoint_every=every, checkpoint_seconds=30.0, log_every=every, keep=1)
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, stages=stages, engine=engine))


@dataclasses.dataclass(frozen=True)
class _Student(Train):
    """`Train`, with the CPU time that it took: that of all threads of this process, compiling included."""

    def run(self, given: Mapping[str, Any], out: Path) -> None:
        place, began = out.with_name(f"{out.name}-{_TIMES}"), time.process_time()
        before = read_json(place)["cpu_seconds"] if place.exists() and out.exists() else 0.0
        try:
            super().run(given, out)
        finally:
            if jax.process_index() == 0:
                write_json(place, {"cpu_seconds": before + time.process_time() - began})


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What samples are compared with, and by which features."""

    real: ImageSet
    extractor: Any
    split: str

    @functools.cached_property
    def reference(self) -> Reference:
        return make_reference("the real images", self.real, self.extractor, split=self.split, batch=256)

    def score(self, images: np.ndarray, labels: Any, seeds: range) -> Result:
        source = from_arrays(images, labels, quantiser="round", rule="seed mod classes")
        named = dataclasses.replace(source, seeds=f"{seeds.start}-{seeds[-1]}")
        return evaluate(named, self.reference, self.extractor, batch=256)


def _judge(teacher: Loaded, reference: str) -> _Judge:
    """Digits by their classifier, other images by the features of the ``[lite]`` network."""
    shape = tuple(teacher.sample([0])[0].shape)
    if not reference:
        if shape != (8, 8, 1):
            raise GenError(f"{teacher.path} makes images {shape}; give real ones to compare with: --reference IMAGES")
        real = digits("train").arrays
        return _Judge(from_arrays(real["image"], real["label"], identity="digits, train"), DigitsExtractor(), "train")
    EfficientNetLite().fingerprint()
    images = Images(reference, shape[0], channels=shape[-1])
    rows = gathered(images.source(), np.arange(len(images.source())))
    found = from_arrays(rows["image"], rows.get("label"), identity=images.identity())
    return _Judge(found, EfficientNetLite(), "reference")


def _called(run: Loaded, calls: int) -> Loaded | None:
    """The student, sampled in `calls` calls; None where it cannot be."""
    try:
        found = run.with_sampler(run.config.sampler.changed(steps=calls))
        return found if found.generator.nfe == calls else None
    except GenError:
        return None


def _by_steps(teacher: Loaded) -> dict[str, Loaded]:
    """The teacher at several numbers of its solver's steps; one step is Euler's."""
    sampler = teacher.config.sampler
    return {
        f"{n} step{'s' * (n > 1)}": teacher.with_sampler(sampler.changed(steps=n, solver=Heun() if n > 1 else Euler()))
        for n in TEACHER_STEPS
    }


def _by_calls(student: Loaded) -> dict[str, Loaded]:
    found = {f"{n} call{'s' * (n > 1)}": _called(student, n) for n in CALLS}
    return {name: run for name, run in found.items() if run is not None}


def _scores(judge: _Judge, budget: Budget, teacher: Any = None, student: Any = None) -> dict[str, Result]:
    """The mean over several sets of noise, which are the same for the teacher and all students."""
    results = {}
    for name, run in (_by_steps(teacher) if student is None else _by_calls(student)).items():
        classes, found = class_count(run.generator.conditions), []
        for k in range(budget.sets):
            seeds = range(k * budget.count, (k + 1) * budget.count)
            labels = None if classes is None else (np.asarray(seeds) % classes).astype(np.int32)
            found.append(judge.score(run.sample(seeds, batch=256), labels, seeds))
        results[name] = combine(found)
    return results


HEAD = (
    "method", "M parameters", "updates", "CPU seconds",
    "distance, 1 call ↓", "2 calls ↓", "4 calls ↓", "recall, 1 call ↑", "accuracy, 1 call ↑", "over the teacher ↓",
)  # fmt: skip


def table(methods: Sequence[str], made: Made) -> list[list[Any]]:
    """Gives the page's rows under `HEAD`, one for each method, best first."""
    best = min(r.values["frechet_distance"] for r in made["teacher-scores"].values())
    rows = []
    for name in methods:
        student, scores = made[name], made[f"{name}-scores"]
        values = [scores[key].values if key in scores else {} for key in ("1 call", "2 calls", "4 calls")]
        distances = [v.get("frechet_distance") for v in values]
        over = None if distances[0] is None else distances[0] / best
        own = next(iter(student.config.exported()))
        sizes = [count(student.params[own]) / 1e6, student.step, _cpu_seconds(student)]
        rows.append([name, *sizes, *distances, values[0].get("recall"), values[0].get("accuracy"), over])
    return sorted(rows, key=lambda row: float("inf") if row[-1] is None else row[-1])


def _cpu_seconds(student: Loaded) -> float:
    return float(read_json(student.path.with_name(f"{student.path.name}-{_TIMES}"))["cpu_seconds"])


def _front(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The methods that no other beats in both CPU seconds and distance, by seconds."""
    points = sorted((row[3], row[4], row[0]) for row in rows if row[4] is not None)
    return [p[2] for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]


def _page(methods: tuple[str, ...], judge: _Judge, budget: Budget, made: Made) -> Report:
    """The table, the front of distance over cost, the teacher by steps, pictures from the same noise."""
    teacher, rows = made["teacher"], table(methods, made)
    page = Report(
        "Distillers side by side",
        f"{len(methods)} methods from the teacher {teacher.config.name}, sampled from the same noise.",
    )
    page.section(
        "Scores",
        f"Fréchet distances of {budget.sets} x {budget.count:,} samples in the features named below: they rank these "
        "rows and compare with no other table. The last column is the distance of one call over the teacher's at its "
        "best number of steps. Two and four calls are shown for students that have them.",
    )
    page.table(HEAD, rows, "CPU seconds: of all threads, for training after the teacher and its stored pairs.")
    points = {row[0]: (row[3], row[4]) for row in rows if row[4] is not None}
    page.points(
        points,
        f"Distance of one call over training cost. No method beats {', '.join(_front(rows))} in both.",
        x="CPU seconds",
        y="distance of one call",
    )
    steps = {int(name.split()[0]): result.values["frechet_distance"] for name, result in made["teacher-scores"].items()}
    page.section("The teacher by steps of its solver").curves(
        {"teacher": (list(steps), list(steps.values()))}, x="solver steps", y="distance", log=True, log_x=True
    )
    seeds = range(16)
    shown = _by_steps(teacher)
    pictures = {f"teacher, {name}": shown[name].sample(seeds) for name in ("1 step", "4 steps", "25 steps")}
    for name in methods:
        for calls, run in _by_calls(made[name]).items():
            pictures[f"{name}, {calls}"] = run.sample(seeds)
    page.section("The same noise throughout").pictures(pictures, "Every column starts from the same noise and class.")
    if isinstance(judge.extractor, DigitsExtractor):
        real, heldout = digits("train").arrays["image"], digits("test").arrays["image"]
        copies = [
            [name, 100 * memorisation(made[name].sample(range(budget.count), batch=256), real, heldout).share]
            for name in methods
        ]
        page.table(("method", "near-copies of training images, %"), copies)
    page.section("Protocol").protocol(made["teacher-scores"]["25 steps"].protocol)
    return page.text(f"All steps together took {sum(made.seconds.values()) / 60:.0f} minutes.")


def main(
    teacher: Annotated[str, tyro.conf.Positional],
    /,
    outdir: str = "runs/compare-distillers",
    methods: str = ",".join(METHODS),
    reference: str = "",
    seed: int = 0,
    updates: int | None = None,
    redo: str = "",
) -> None:
    """Compares distillers of the run TEACHER.

    METHODS are presets, separated by commas, and so are those to REDO. UPDATES shortens every stage to so many.
    """
    names, again = tuple(methods.split(",")), tuple(filter(None, redo.split(",")))
    try:
        budget = Budget(updates=updates)
        made = run(teacher, outdir, methods=names, reference=reference, budget=budget, seed=seed, redo=again)
    except GenError as error:
        raise SystemExit(f"error: {error}") from None
    for row in [HEAD, ["---"] * len(HEAD), *table(names, made)]:
        print("|", " | ".join(_text(cell) for cell in row), "|")
    print(f"open {Path(outdir) / 'report.html'}")


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    tyro.cli(main)
