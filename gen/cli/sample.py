"""``gen sample``."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.start import ALONE, Multihost, start
from gen.cli.train import Overrides
from gen.errors import GenError

__all__ = ["describe", "open_run", "parse_labels", "sample"]

Number = Annotated[float | None, tyro.conf.arg(metavar="X")]


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
    seeds: Annotated[str, tyro.conf.arg(metavar="SEEDS")] = "0-63",
    label: Annotated[str | None, tyro.conf.arg(name="class", metavar="K[,K...]")] = None,
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 64,
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    solver: Annotated[str | None, tyro.conf.arg(metavar="KIND")] = None,
    grid: Annotated[str | None, tyro.conf.arg(metavar="KIND")] = None,
    guidance: Annotated[float | None, tyro.conf.arg(aliases=["--cfg-scale"], metavar="W")] = None,
    guide: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    weights: Literal["ema", "raw"] = "ema",
    step: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    multihost: Multihost = ALONE,
    overrides: Overrides = (),
) -> None:
    """Makes images with a trained run. Image i depends on seed i and its class alone.

    The ending of --out decides the form: a folder of PNG files (000000.png ...), grid.png, .npz (arr_0 images, arr_1
    labels) or .zip. Interrupted and started again, it goes on where it was.

    Examples:
      gen sample runs/demo/student --out grid.png
      gen sample runs/demo/student --seeds 0-1796 --out samples.npz
      gen sample runs/demo/teacher --seeds 0-9 --class 7 --steps 10 --solver euler --cfg-scale 2 --out sevens/
      gen sample runs/edm2-s --guide runs/edm2-xs --cfg-scale 2.1

    Args:
      run: a run folder of a teacher or student.
      out: where to write; RUN/samples by default.
      seeds: FIRST-LAST, both included, or one number.
      label: one class for all, or several in turn; all classes in turn (seed mod number of classes) by default.
      batch: images at a time; changes nothing but speed and memory.
      steps: number of solver steps.
      solver: a solver from gen list solver, or dopri5, which chooses its steps itself.
      grid: a time grid from gen list grid.
      guidance: guidance scale; 1 is none.
      guide: autoguidance: the run of a weaker model of the same images, in place of the model without a class.
      weights: ema, the averaged weights, or raw.
      step: a kept checkpoint's step; the last by default.
      multihost: the job that this process belongs to.
    """
    from gen.cli.images import parse_seeds
    from gen.runs import labels_for
    from gen.sampling.generate import generate
    from gen.training.sharding import make_mesh

    wanted = parse_seeds(seeds)
    start(multihost)
    loaded = open_run(run, weights, step, sampler_overrides(steps, solver, grid, guidance) + overrides, guide)
    labels = labels_for(loaded.generator, _array(wanted), parse_labels(label, wanted)).get("label")
    print(describe(loaded))
    began = time.perf_counter()
    where = out or run / "samples"
    calls = generate(
        loaded.generator,
        loaded.params,
        seeds=wanted,
        labels=labels,
        rule="seed mod classes" if label is None else "given",
        out=where,
        batch=batch,
        mesh=make_mesh(),
    )
    seconds = time.perf_counter() - began
    if calls is not None:
        print(f"{calls.mean():.1f} network calls per image, measured ({calls.min()} to {calls.max()})")
    print(f"{len(wanted)} images in {seconds:.1f} s ({len(wanted) / seconds:.1f} images/s, compile included): {where}")


def sampler_overrides(
    steps: int | None, solver: str | None, grid: str | None, guidance: float | None
) -> tuple[tuple[str, str], ...]:
    """The sampler's short flags as overrides of the generator's configuration."""
    flags = {"sampler.solver": solver, "sampler.grid": grid, "sampler.steps": steps, "sampler.guidance.scale": guidance}
    return tuple((path, str(value)) for path, value in flags.items() if value is not None)


def open_run(
    run: Path, weights: Any, step: int | None, overrides: tuple[tuple[str, str], ...], guide: Path | None = None
) -> Any:
    """The loaded run with its generator's settings overridden, guided by the weaker run `guide` if there is one.

    Raises GenError for settings it does not have, and for a guide that is none.
    """
    from gen.cli.overrides import override
    from gen.config import KINDS, config_class, suggest
    from gen.runs import load

    known = {"solver": KINDS["solver"] | KINDS["adaptive"], "grid": KINDS["grid"]}
    for path, value in overrides:
        family = path.removeprefix("sampler.")
        if family in known and not value.startswith("{") and value not in known[family]:
            raise GenError(f"unknown {family} '{value}'; {suggest(value, known[family])}")
    loaded = load(run, weights=weights, step=step)
    if guide is not None:
        loaded = _guided(loaded, load(guide, weights=weights), overrides)
    generator = loaded.generator
    if overrides and not hasattr(generator, "sampler"):
        if overrides == (("sampler.steps", "1"),):
            return loaded
        raise GenError(
            f"{run} is a student trained to make images in one step; leave out --steps, --solver, --grid and --guidance"
        )
    solver = dict(overrides).get("sampler.solver", "")
    if solver in KINDS["adaptive"]:
        from gen.sampling.adaptive import AdaptiveGenerator

        if any(path == "sampler.steps" for path, _ in overrides):
            raise GenError(f"{solver} chooses its steps itself; leave out --steps, or set --sampler.solver.rtol")
        generator = AdaptiveGenerator.of(generator, config_class(solver)())
        overrides = tuple((p.removeprefix("sampler."), v) for p, v in overrides if p != "sampler.solver")
    changed = override(generator, overrides)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, generator=changed))


def _guided(loaded: Any, weak: Any, overrides: tuple[tuple[str, str], ...]) -> Any:
    """The run with autoguidance by the run `weak`. Raises GenError where the two do not go together."""
    from gen.sampling.guidance import Autoguidance

    generator = loaded.generator
    if not hasattr(generator, "sampler"):
        raise GenError(f"{loaded.path} makes images in one step, without guidance; leave out --guide")
    if not any(path.startswith("sampler.guidance") for path, _ in overrides):
        raise GenError("--guide without a guidance scale changes nothing; add --cfg-scale W, such as 2")
    shape = getattr(weak.generator, "shape", None)
    if shape != generator.shape:
        raise GenError(f"{weak.path} makes {shape}, {loaded.path} {generator.shape}; give a guide of the same images")
    sampler = dataclasses.replace(generator.sampler, guidance=Autoguidance(), guide=weak.denoiser)
    config = dataclasses.replace(loaded.config, generator=dataclasses.replace(generator, sampler=sampler))
    return dataclasses.replace(loaded, config=config, params={**loaded.params, "guide": weak.params["net"]})


def parse_labels(text: str | None, seeds: range) -> Any:
    """Labels of seeds: None for the default, one number for all, or several in turn. Raises GenError otherwise."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise GenError(f"class '{text}' is not a number; write --class 7, or several in turn: --class 3,5,8")
    numbers = [int(word) for word in words]
    return numbers[0] if len(numbers) == 1 else [numbers[seed % len(numbers)] for seed in seeds]


def describe(loaded: Any) -> str:
    """One line: what is sampled, with which weights and how many network calls."""
    kind = {"ema": "EMA", "raw": "raw"}[loaded.weights]
    calls = loaded.generator.nfe
    stated = f"{calls} network call{'s' * (calls != 1)} per image" if calls else "network calls measured"
    return f"{loaded.config.name}, step {loaded.step}, {kind} weights, {stated}"


def _array(seeds: range) -> Any:
    import numpy as np

    return np.arange(seeds.start, seeds.stop)
