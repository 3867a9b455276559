"""``gen sample``."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import USUAL, SamplingFlags, flag
from gen.cli.opening import Overrides, describe, open_run
from gen.cli.start import ALONE, Multihost, start
from gen.errors import GenError

__all__ = ["parse_labels", "sample"]


def sample(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    out: Annotated[Path | None, flag("DIR|FILE")] = None,
    seeds: Annotated[str, flag("SEEDS")] = "0-63",
    label: Annotated[str | None, flag("K[,K...]", name="class")] = None,
    batch: Annotated[int, flag("N")] = 64,
    step: Annotated[int | None, flag("N")] = None,
    sampling: SamplingFlags = USUAL,
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
      gen sample runs/demo/student --seeds 0-9,20,30-39 --out some/
      gen sample runs/edm2-s --guide runs/edm2-xs --cfg-scale 2.1
      gen sample runs/mine --solver ralston --module ./mysolver.py

    Args:
      run: a run folder of a teacher or student.
      out: where to write; RUN/samples by default.
      seeds: ranges FIRST-LAST, both included, and single numbers, separated by commas; further seeds add to a folder.
      label: one class (its number, or its name where the run knows it) for all, or several in turn; all classes in
        turn (seed mod number of classes) by default.
      batch: images at a time; changes nothing but speed and memory.
      step: a kept checkpoint's step; the last by default.
      sampling: how each image is made.
      multihost: the job that this process belongs to.
    """
    import jax
    import numpy as np

    from gen.nn.conditions import make_conditions
    from gen.sampling.generate import generate
    from gen.sampling.sample_files import sample_form
    from gen.sampling.seeds import parse_seeds
    from gen.training.sharding import make_mesh

    start(multihost)
    wanted, where = parse_seeds(seeds), out or run / "samples"
    sample_form(where)
    loaded = open_run(run, sampling, step, overrides=overrides)
    given = {"label": parse_labels(label, wanted, loaded.config.class_names), **sampling.arrays()}
    made = make_conditions(loaded.generator.conditions, np.asarray(wanted), given)
    labels = made.pop("label", None)
    first = jax.process_index() == 0
    if first:
        print(describe(loaded))
    began = time.perf_counter()
    calls = generate(
        loaded.generator,
        loaded.params,
        seeds=wanted,
        labels=labels,
        cond=made,
        rule="seed mod classes" if label is None else "given",
        out=where,
        batch=batch,
        mesh=make_mesh(),
    )
    seconds = time.perf_counter() - began
    if calls is not None:
        print(f"{calls.mean():.1f} network calls per image, measured ({calls.min()} to {calls.max()})")
    if first:
        print(
            f"{len(wanted)} images in {seconds:.1f} s ({len(wanted) / seconds:.1f} images/s, compile included): {where}"
        )


def parse_labels(text: str | None, seeds: Sequence[int], names: Sequence[str] | None = None) -> Any:
    """Gives labels of seeds: None for the default, one number for all, or several in turn.

    Args:
      text: numbers or names of classes, separated by commas.
      seeds: seed s gets number s mod (how many there are).
      names: the names of the classes, in order, where they are known.

    Raises GenError for a word that is neither a number nor a known name.
    """
    if text is None:
        return None
    numbers = [_class(word.strip(), names) for word in text.split(",")]
    return numbers[0] if len(numbers) == 1 else [numbers[seed % len(numbers)] for seed in seeds]


def _class(word: str, names: Sequence[str] | None) -> int:
    from gen.config import suggest

    if names and word in names:
        return list(names).index(word)
    if word.isdecimal():
        return int(word)
    if names:
        raise GenError(f"no class is called '{word}'; {suggest(word, names)}")
    raise GenError(
        f"class '{word}' is not a number, and this run knows no names of its classes; write --class 7, or several in "
        "turn: --class 3,5,8"
    )
