"""``gen sample``."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.opening import Overrides, describe, open_run
from gen.cli.start import ALONE, Multihost, start
from gen.errors import GenError

__all__ = ["parse_labels", "sample"]

Number = Annotated[float | None, tyro.conf.arg(metavar="X")]


def sample(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
    seeds: str = "0-63",
    label: Annotated[str | None, tyro.conf.arg(name="class", metavar="K[,K...]")] = None,
    batch: int = 64,
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
    from gen.nn.conditions import make_conditions
    from gen.sampling.generate import generate
    from gen.training.sharding import make_mesh

    wanted = parse_seeds(seeds)
    start(multihost)
    settings = {"steps": steps, "solver": solver, "grid": grid, "guidance": guidance}
    loaded = open_run(run, weights, step, settings=settings, overrides=overrides, guide=guide)
    given = {"label": parse_labels(label, wanted)}
    labels = make_conditions(loaded.generator.conditions, _array(wanted), given).get("label")
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


def parse_labels(text: str | None, seeds: range) -> Any:
    """Labels of seeds: None for the default, one number for all, or several in turn. Raises GenError otherwise."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise GenError(f"class '{text}' is not a number; write --class 7, or several in turn: --class 3,5,8")
    numbers = [int(word) for word in words]
    return numbers[0] if len(numbers) == 1 else [numbers[seed % len(numbers)] for seed in seeds]


def _array(seeds: range) -> Any:
    import numpy as np

    return np.arange(seeds.start, seeds.stop)
