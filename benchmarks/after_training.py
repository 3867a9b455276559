"""What is had from a trained model without training it again, or by training little, on the demo's teachers.

    python -m benchmarks.after_training probes --seeds 0 1 2 --out runs/after
    python -m benchmarks.after_training search --out runs/after
    python -m benchmarks.after_training away --out runs/after
    python -m benchmarks.after_training few-parameters --out runs/after
    python -m benchmarks.after_training few-images --out runs/after

Each trains the tokenizer and the teacher of `gen demo --seed N` first, once (``OUT/teacherN``, a minute and a half of
CPU time), and goes on where it was when it is started again. Distances are Frechet distances in the digits features.

probes: accuracy on the held-out digits of linear probes of the teacher's blocks, and of raw pixels.
search: the best four time steps of the teacher, beside a uniform grid and Karras's.
away: the unguided teacher led away from a copy that was trained on its samples (SIMS), or from the same network after
500 updates (autoguidance), beside the teacher with as many calls, and with its classifier-free guidance.
few-parameters: a wider teacher of the digits 0 to 6 brought to 7, 8 and 9 by DiffFit, BitFit, LoRA and by all its
parameters.
few-images: the same teacher, DiffFit and all parameters, these at a third of the rate too, by ten images of each new
class; the distance is to all other images of these classes, and beside it is that of the ten themselves.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gen.data.sources import ArraySource, Digits, digits
from gen.diffusion.train import DenoiserTask
from gen.experiments import Recipe, autodiffusion, demo, difffit, features, sims
from gen.experiments._search import scored
from gen.features.digits import DigitsExtractor
from gen.finetune.adapt import AdaptTask
from gen.metrics.evaluate import evaluate
from gen.metrics.protocol import Result
from gen.metrics.reference import Reference, make_reference
from gen.metrics.sources import from_arrays
from gen.nn.network import count, param_shapes
from gen.plan import Plan
from gen.runs import Loaded, load
from gen.sampling.guidance import ClassifierFree
from gen.steps import Encode, Evaluate, Train
from gen.training.ema import Constant
from gen.training.program import enable_compile_cache
from gen.training.run import RunConfig
from gen.training.task import Stage

Figures = dict[str, float]  # of one seed, by what they are of
OLD, NEW = tuple(range(7)), (7, 8, 9)
WIDTH = 128  # of the teacher that gets new classes: biases are under 1 % of its parameters, and not at the demo's 64
BATCH = 64
WAYS = ("difffit", "bitfit", "lora", "full-tuning")
EACH = 10  # images of a class, where there are few
COUNT = 1797


def teacher(out: Path, seed: int) -> Loaded:
    """The teacher of `gen demo --seed N`, trained once."""
    steps = demo.plan(out, demo.Budget(), seed).steps[:3]
    made: Loaded = Plan(out / f"teacher{seed}", steps).run()["teacher"]
    return made


def reference(classes: tuple[int, ...] = (*OLD, *NEW)) -> Reference:
    """Statistics of the training images of these classes."""
    held = OfClasses(classes).source().arrays
    return make_reference("digits", from_arrays(held["image"], held["label"]), DigitsExtractor(), split="train")


def probes(out: Path, seed: int) -> Figures:
    """Accuracy on held-out digits by feature."""
    train, heldout = ((rows["image"], rows["label"]) for rows in (digits(s).arrays for s in ("train", "test")))
    found = features.table(teacher(out, seed), train, heldout, out / f"probes{seed}")
    return {name: values[0] for name, values in found.items()}


def search(out: Path, seed: int) -> Figures:
    """Distances of four steps: searched, uniform, Karras."""
    how = autodiffusion.SEARCHES["laptop"]
    how = dataclasses.replace(how, evolution=dataclasses.replace(how.evolution, seed=seed))
    extractor, file = DigitsExtractor(), out / f"four{seed}.json"
    return autodiffusion.search(teacher(out, seed), reference(), extractor, 4, file, how, batch=1024)


def away(out: Path, seed: int) -> Figures:
    """Distances of the unguided teacher, with twice the steps, led away from its copy and from an early network."""
    guided, held, extractor = teacher(out, seed), reference(), DigitsExtractor()
    base = guided.with_sampler(guided.config.sampler.changed(guidance=ClassifierFree()))
    found = distances(sims.plan(out / f"away{seed}", base, held, extractor).run()["scores"])
    steps: tuple[Any, ...] = (
        Encode("latents", "tokenizer", Digits("train"), about="the training images, encoded once"),
        Train(
            "early",
            functools.partial(demo._teacher, demo.Budget(teacher=500), seed),
            {"tokenizer": "tokenizer", "latents": "latents"},
        ),
    )
    given = {"tokenizer": load(guided.path.parent / "tokenizer")}
    early = Plan(out / f"early{seed}", steps, given=given).run()["early"]
    scale, value = next(
        (name.partition(", ")[2], value)
        for name, value in distances(sims.compared(base, early, reference=held, extractor=extractor)).items()
        if name.startswith("SIMS")
    )
    usual = scored(guided, held, extractor, range(COUNT, 2 * COUNT), batch=1024)
    return found | {f"autoguidance, {scale}": value} | distances({"model, its guidance of 1.15": usual})


@dataclasses.dataclass(frozen=True)
class OfClasses:
    """The training digits of some classes, which are counted from 0 in their order.

    Attributes:
      classes: the digits.
      each: so many of each, drawn with `seed`; None for all.
    """

    classes: tuple[int, ...]
    each: int | None = None
    seed: int = 0

    def chosen(self) -> np.ndarray:
        """Gives the rows of the training split."""
        label, draw = digits("train").arrays["label"], np.random.default_rng(self.seed)
        return np.concatenate([draw.permutation(np.flatnonzero(label == digit))[: self.each] for digit in self.classes])

    def source(self) -> ArraySource:
        """Gives the records by index."""
        rows = digits("train").arrays
        chosen = np.sort(self.chosen())
        label = np.searchsorted(self.classes, rows["label"][chosen]).astype(np.int32)
        return ArraySource(tuple(map(str, self.classes)), image=rows["image"][chosen], label=label)

    def others(self) -> dict[str, np.ndarray]:
        """Gives the images and labels of these classes, of both splits, that are not chosen."""
        train, test = digits("train").arrays, digits("test").arrays
        left = np.setdiff1d(np.flatnonzero(np.isin(train["label"], self.classes)), self.chosen())
        held = np.isin(test["label"], self.classes)
        return {name: np.concatenate([train[name][left], test[name][held]]) for name in ("image", "label")}

    def identity(self) -> str:
        """Gives the fingerprint of the content."""
        return self.source().identity()


def of_old_classes(seed: int, updates: int, tokenizer: Loaded, latents: Any) -> Recipe:
    """A teacher of the old classes, wider than the demo's."""
    network = dataclasses.replace(demo.TEACHER.network, width=WIDTH, num_classes=len(OLD))
    denoiser = dataclasses.replace(demo.TEACHER, network=network)
    task = DenoiserTask(denoiser, optim=demo._cosine(2e-3, updates), emas=(Constant(0.998, warmup=True),))
    stage, sampler = Stage("teacher", task, steps=updates, batch=BATCH, data=latents), demo.SAMPLER
    origins = {"tokenizer": tokenizer.origin}
    config = RunConfig("old-classes", (stage,), origins, sampler, tokenizer.tokenizer, engine=demo._engine(seed))
    kept = {"tokenizer": tokenizer.params["tokenizer"], "normalizer": latents.normalizer()}
    return Recipe(config, artifacts=kept)


def to_new_classes(preset: str, seed: int, updates: int, teacher: Loaded, latents: Any, rate: float = 1.0) -> Recipe:
    """A preset of `gen.experiments.difffit` on the new classes, 64 latents in a batch where there are so many."""
    batch = min(BATCH, len(latents.source()))
    made: Recipe = difffit.PRESETS[preset](teacher, latents.path, updates=updates, batch=batch)
    (stage,) = made.config.stages
    optim = dataclasses.replace(stage.task.optim, lr=stage.task.optim.lr * rate)
    stages = (dataclasses.replace(stage, task=dataclasses.replace(stage.task, optim=optim)),)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, stages=stages, engine=demo._engine(seed)))


def _base(seed: int) -> tuple[Any, ...]:
    """The steps to the teacher of the old classes."""
    return (
        Encode("old", "tokenizer", OfClasses(OLD), about="the digits 0 to 6"),
        Train("teacher", functools.partial(of_old_classes, seed, 2000), {"tokenizer": "tokenizer", "latents": "old"}),
    )


def few_parameters(out: Path, seed: int) -> Figures:
    """Distances of each way to the new classes, and the share of the parameters that it trains."""
    tokenizer = load(teacher(out, seed).path.parent / "tokenizer")
    takes = {"teacher": "teacher", "latents": "new"}
    steps = (
        *_base(seed),
        Encode("new", "tokenizer", OfClasses(NEW), about="the digits 7 to 9"),
        *(Train(way, functools.partial(to_new_classes, way, seed, 1000), takes) for way in WAYS),
        Evaluate("scores", functools.partial(scores, reference(NEW)), {way: way for way in WAYS}),
    )
    made = Plan(out / f"few{seed}", steps, given={"tokenizer": tokenizer}).run()
    shares = {f"{way}, % of the parameters": 100.0 * trained_share(made[way]) for way in WAYS}
    return distances(made["scores"]) | shares


def few_images(out: Path, seed: int) -> Figures:
    """Distances of DiffFit and of all parameters by a few images to the others of their classes."""
    tokenizer = load(teacher(out, seed).path.parent / "tokenizer")
    base = Plan(out / f"few{seed}", _base(seed), given={"tokenizer": tokenizer}).run()["teacher"]
    few, extractor = OfClasses(NEW, EACH, seed), DigitsExtractor()
    others, takes = few.others(), {"teacher": "teacher", "latents": "new"}
    held = make_reference("others", from_arrays(others["image"], others["label"]), extractor)
    ways = {"difffit": ("difffit", 1.0), "full-tuning": ("full-tuning", 1.0), "slow-full-tuning": ("full-tuning", 0.3)}
    steps: tuple[Any, ...] = (
        Encode("new", "tokenizer", few, about=f"{EACH} of each of the digits 7 to 9"),
        *(
            Train(name, functools.partial(to_new_classes, way, seed, 1000, rate=rate), takes)
            for name, (way, rate) in ways.items()
        ),
        Evaluate("scores", functools.partial(scores, held), {name: name for name in ways}),
    )
    made = Plan(out / f"few-images{seed}", steps, given={"tokenizer": tokenizer, "teacher": base}).run()
    own = few.source().arrays
    themselves = evaluate(from_arrays(own["image"], own["label"]), held, extractor)
    return distances(made["scores"] | {"the images themselves": themselves})


def scores(held: Reference, **runs: Loaded) -> dict[str, Result]:
    """Scores of runs by name."""
    return {name: scored(run, held, DigitsExtractor(), range(COUNT), batch=1024) for name, run in runs.items()}


def trained_share(run: Loaded) -> float:
    """The parameters that a run of an adapter trains, over those of its network."""
    task: AdaptTask = run.config.stages[0].task
    return count(param_shapes(task.adapted)) / count(run.params["net"])


def distances(results: dict[str, Result]) -> Figures:
    """Distances by subject."""
    return {name: result.values["frechet_distance"] for name, result in results.items()}


WHAT: dict[str, Callable[[Path, int], Figures]] = {
    "probes": probes,
    "search": search,
    "away": away,
    "few-parameters": few_parameters,
    "few-images": few_images,
}


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/after"))
    options = parser.parse_args(arguments)
    enable_compile_cache()
    rows = {seed: WHAT[options.what](options.out, seed) for seed in options.seeds}
    (options.out / f"{options.what}.json").write_text(json.dumps(rows, indent=1))
    print(f"{'':<36}" + "".join(f"{f'seed {seed}':>10}" for seed in rows) + f"{'mean':>10}")
    for name in {name: None for row in rows.values() for name in row}:
        values = [row[name] for row in rows.values() if name in row]  # a chosen scale may be of one seed alone
        shown = "".join(f"{row[name]:>10.4f}" if name in row else f"{'-':>10}" for row in rows.values())
        print(f"{name:<36}{shown}{np.mean(values):>10.4f}")


if __name__ == "__main__":
    main()
