"""Pictures of the pages of methods: what methods make of the embedded digits, and what measures say of them.

    python -m benchmarks.digits_figures backbones --count 600 --out docs/backbones.png
    python -m benchmarks.digits_figures tokens --runs runs/demo-tokens --out docs/token-generators.png
    python -m benchmarks.digits_figures measures --out docs/measures.png
    python -m benchmarks.digits_figures solvers --runs runs/demo/teacher --out docs/solvers.png
    python -m gen.experiments.compare_distillers runs/demo/teacher --updates 1000 --outdir runs/distillers
    python -m benchmarks.digits_figures distillers --runs runs/distillers --out docs/distillers.png

The first trains ``-smoke`` presets as they are (``--runs``, runs/digits unless given; started again it goes on where
it was), seed 0; tokens and distillers show what a ``gen demo --tokens`` and a comparison made. Nothing is tuned.
Distances are Frechet distances in the digits classifier's features to the 1,438 training images.
"""

import argparse
import base64
import dataclasses
import functools
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from benchmarks.pictures import SHOWN, plt, rows_of_images
from gen.data.sources import digits
from gen.experiments import find
from gen.experiments.demo import score_images
from gen.features.digits import DigitsExtractor
from gen.files import read_json
from gen.metrics.evaluate import Settings, evaluate
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays
from gen.plan import Plan
from gen.runs import Loaded, load
from gen.sampling.grids import Uniform
from gen.sampling.multistep import DPMSolver, UniPC
from gen.sampling.runge_kutta import RungeKutta
from gen.sampling.sde import EulerMaruyama
from gen.sampling.solvers import DDIM, Ancestral, EDMStochastic, Euler, Heun, Renoise
from gen.sampling.student_solvers import Anchored, Backstep
from gen.steps import Train
from gen.training.program import enable_compile_cache

Figures = dict[str, dict[str, float]]
Rows = dict[str, np.ndarray]

# the other toys take minutes to compile or to train on a CPU
BACKBONES = ("dit-smoke", "sit-smoke", "lightningdit-smoke", "edm-smoke")


def preset(name: str) -> Train:
    """Trains a preset as it is."""
    found = find(name)
    return Train(name, getattr(found.load(), found.function), about=found.line)


@functools.cache
def training() -> Any:
    """Statistics of the training images."""
    real = digits("train").arrays
    return make_reference("digits", from_arrays(real["image"], real["label"]), DigitsExtractor(), split="train")


def samples(run: Loaded, number: int) -> tuple[np.ndarray, dict[str, float]]:
    """Samples of the seeds 0 to `number` - 1, classes in turn, and their scores."""
    seeds = range(number)
    images = run.sample(seeds, batch=600)
    values = score_images(images, np.asarray(seeds) % 10, training(), DigitsExtractor(), seeds).values
    return images[:SHOWN], {name: values[name] for name in ("frechet_distance", "recall", "accuracy")}


def generated(made: Mapping[str, Loaded], number: int, out: Path) -> Figures:
    """A row of samples of each run."""
    found: Figures = {}
    rows: Rows = {"training digits": digits("train").arrays["image"][:SHOWN]}
    for name, run in made.items():
        images, found[name] = samples(run, number)
        found[name]["calls"] = run.generator.nfe
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
        told = f"{name}, {run.generator.nfe} call{'s' * (run.generator.nfe > 1)}\n"
        told += f"distance {found[name]['frechet_distance']:.2f}, recall {found[name]['recall']:.2f}"
        rows[told] = images
    rows_of_images(rows, out)
    return found


def backbones(runs: Path, number: int, out: Path) -> Figures:
    """Samples of a toy of each backbone."""
    made = Plan(runs, tuple(preset(name) for name in BACKBONES)).run()
    return generated({name: made[name] for name in BACKBONES}, number, out)


def tokens(runs: Path, number: int, out: Path) -> Figures:
    """Pictures and scores of the ``gen demo --tokens`` in the folder `runs`, from its page."""
    del number
    page = (runs / "report.html").read_text()
    strips = re.findall(r'<div class="label">([^<]*)</div><img src="data:image/png;base64,([^"]*)"', page)
    figure, axes = plt.subplots(len(strips), 1, figsize=(9, 0.55 * len(strips)))
    for axis, (name, strip) in zip(axes, strips, strict=True):
        axis.imshow(plt.imread(io.BytesIO(base64.b64decode(strip))), cmap="gray")
        axis.axis("off")
        axis.text(-10, 20, name, ha="right", va="center", fontsize=7)
    figure.subplots_adjust(left=0.18, right=0.995, top=0.99, bottom=0.01, hspace=0.1)
    figure.savefig(out, dpi=110, pil_kwargs={"optimize": True})
    files = read_json(runs / "scores" / "subjects.json")
    scores = {name: read_json(runs / "scores" / file)["values"] for name, file in files.items()}
    return {name: {key: values[key] for key in ("frechet_distance", "recall")} for name, values in scores.items()}


SOLVERS: dict[str, tuple[Any, int]] = {  # with the number of steps that comes nearest to twelve calls
    "euler": (Euler(), 12),
    "heun": (Heun(), 6),
    "ddim, eta 1": (DDIM(1.0), 12),
    "ddpm-ancestral": (Ancestral(), 12),
    "edm-stochastic, churn 10": (EDMStochastic(10.0), 6),
    "dpm-solver": (DPMSolver(), 12),
    "dpm-solver, stochastic": (DPMSolver(stochastic=True), 12),
    "unipc": (UniPC(), 12),
    "runge-kutta, midpoint": (RungeKutta("midpoint"), 6),
    "euler-maruyama": (EulerMaruyama(), 12),
    "renoise": (Renoise(), 12),
    "anchored": (Anchored(), 12),
    "backstep": (Backstep(), 12),
}


def solvers(runs: Path, number: int, out: Path) -> Figures:
    """Samples of the flow in the folder `runs` by every solver at about twelve calls, on uniform times."""
    run = load(runs)
    changed = {
        name: run.with_sampler(run.config.sampler.changed(solver=solver, grid=Uniform(), steps=steps))
        for name, (solver, steps) in SOLVERS.items()
    }
    return generated(changed, number, out)


def distillers(runs: Path, number: int, out: Path) -> Figures:
    """Samples in one call of every student that a comparison in the folder `runs` has scored."""
    del number
    names = [folder.name.removesuffix("-scores") for folder in sorted(runs.glob("*-scores"))]
    found: Figures = {}
    rows: Rows = {}
    for name in names:
        subjects = read_json(runs / f"{name}-scores" / "subjects.json")
        scores = {key: read_json(runs / f"{name}-scores" / file)["values"] for key, file in subjects.items()}
        found[name] = {key: values["frechet_distance"] for key, values in scores.items()}
        if name != "teacher":
            first = scores[next(iter(scores))]
            told = f"{name}\ndistance {first['frechet_distance']:.2f}, recall {first['recall']:.2f}"
            rows[told] = load(runs / name).sample(range(SHOWN))
    order = sorted(rows, key=lambda told: float(told.split()[-3].rstrip(",")))
    rows_of_images({told: rows[told] for told in order}, out)
    return found


MEASURES = {
    "frechet_distance": "Frechet distance", "mind": "MIND", "vendi": "Vendi score", "accuracy": "accuracy",
    "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage",
}  # fmt: skip
STRENGTHS = np.linspace(0.0, 1.0, 6)


def worse() -> dict[str, Callable[[np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]]:
    """Ways of spoiling (images, labels) by a strength from 0 to 1."""
    rng = np.random.default_rng(0)

    def blurred(images: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        return ndimage.gaussian_filter(images.astype(np.float32), (0, 0.6 * strength, 0.6 * strength, 0)), labels

    def noisy(images: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        return images + 100 * strength * rng.standard_normal(images.shape), labels

    def fewer(images: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        kept = np.flatnonzero(labels < 10 - round(8 * strength))  # repeated, so that the number stays
        return images[np.resize(kept, len(images))], labels[np.resize(kept, len(images))]

    def repeated(images: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        kept = np.arange(len(images))[: round(len(images) * (1 - 0.95 * strength))]
        return images[np.resize(kept, len(images))], labels[np.resize(kept, len(images))]

    return {
        "blur, up to 0.6 pixels": blurred,
        "noise, up to 100 of 255 levels": noisy,
        "classes, from 10 down to 2": fewer,
        "different images, from all down to 5 %": repeated,
    }


def measures(runs: Path, number: int, out: Path) -> Figures:
    """One half of the digits, spoilt more and more, against the other half by every measure."""
    del runs, number
    parts = [digits(split).arrays for split in ("train", "test")]
    images, labels = (np.concatenate([part[name] for part in parts]) for name in ("image", "label"))
    order = np.random.default_rng(0).permutation(len(images))
    ours, theirs = order[: len(order) // 2], order[len(order) // 2 :]
    extractor = DigitsExtractor()
    real = make_reference("digits", from_arrays(images[theirs], labels[theirs]), extractor, split="half")
    settings = Settings(extra=("mind", "vendi"))
    found: Figures = {}
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
    for name, change in worse().items():
        lines: dict[str, list[float]] = {measure: [] for measure in MEASURES}
        for strength in STRENGTHS:
            changed, kept = change(images[ours], labels[ours], float(strength))
            rounded = np.clip(np.round(changed), 0, 255).astype(np.uint8)
            source = from_arrays(rounded, kept.astype(np.int32), rule="given")
            values = evaluate(dataclasses.replace(source, classes=10), real, extractor, settings).values
            for measure, line in lines.items():
                line.append(values[measure])
            found[f"{name}: {strength:.1f}"] = {measure: values[measure] for measure in MEASURES}
        for axis, (measure, line) in zip(axes.flat, lines.items(), strict=True):
            axis.plot(STRENGTHS, line, marker=".", label=name)
            axis.set_title(MEASURES[measure], fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    for axis in axes.flat[:2]:
        axis.set_yscale("log")
    handles, named = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, named, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(out, dpi=110)
    return found


PAGES: dict[str, Callable[[Path, int, Path], Figures]] = {
    "backbones": backbones,
    "tokens": tokens,
    "solvers": solvers,
    "distillers": distillers,
    "measures": measures,
}


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=PAGES)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1797, help="samples (1797)")
    options = parser.parse_args(arguments)
    enable_compile_cache()
    found = PAGES[options.page](options.runs, options.count, options.out)
    for name, values in found.items():
        print(f"{name:<45}" + "".join(f"{key} {value:.4g}   " for key, value in values.items()))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
