"""Presets that are not trained here: planned without data and runs, and compiled for devices that are not there."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gen.cli.opening import prepare
from gen.errors import GenError

__all__ = ["estimates", "planned"]


def planned(
    preset: str,
    inputs: Mapping[str, str | None],
    overrides: tuple[tuple[str, str], ...] = (),
    short: Mapping[str, Any] | None = None,
) -> Any:
    """Gives the recipe of a preset that is not to be trained here.

    Args:
      inputs: by name, None where not given: the path of the data, random where the preset needs some; run folders, or
        presets of runs, of which the shapes are taken. A teacher that takes a tokenizer has the one that is given.
      overrides, short: as for `gen.cli.opening.prepare`.
    """
    from gen.data.random import RANDOM
    from gen.experiments import find

    row = find(preset)
    given: dict[str, Any] = {name: value for name, value in inputs.items() if value is not None}
    if "data" in row.required:
        given.setdefault("data", RANDOM)
    if "tokenizer" not in row.required + row.optional and "teacher" in given:
        given.pop("tokenizer", None)  # the teacher's
    for name in {"teacher", "tokenizer"} & set(given):
        given[name] = _run(given[name], inputs)
    return prepare(preset, given, overrides, short)


def _run(what: str, inputs: Mapping[str, str | None]) -> Any:
    """The run folder `what`, or what the preset `what` would make."""
    if Path(what).is_dir():
        return Path(what)
    from gen.experiments import find
    from gen.runs import planned as run_of

    row = find(what)
    recipe = planned(what, {name: inputs.get(name) for name in ("tokenizer",) if name in row.required + row.optional})
    return run_of(recipe.config, recipe.frozen, recipe.artifacts)


def estimates(
    preset: str,
    target: Any,
    *,
    inputs: Mapping[str, str | None],
    overrides: tuple[tuple[str, str], ...] = (),
    batch: int | None = None,
    batch_gpu: int | None = None,
    kinds: Sequence[str] = ("train",),
    hlo: Path | None = None,
    quick: bool = False,
    say: Any = None,
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Compiles a preset for a target.

    Args:
      inputs: by name, None where not given.
      kinds: of programs (`gen.programs.KINDS`).
      quick: as in `gen.training.ahead.estimate`.
      say: takes a line for each program that is done.

    Returns:
      The run's configuration, and each program (`gen.programs.Traced`) with its `gen.training.ahead.Estimate`.

    Raises GenError for all that is wrong before anything is compiled, and for a program that does not fit its memory.
    """
    from gen.config import suggest
    from gen.programs import KINDS
    from gen.programs import programs as programs_of
    from gen.training.ahead import estimate
    from gen.training.budget import Memory, refuse
    from gen.training.sharding import make_mesh

    for kind in kinds:
        if kind not in KINDS:
            raise GenError(f"unknown program '{kind}'; {suggest(kind, KINDS)}")
    devices = target.devices()
    recipe = planned(preset, inputs, overrides, {"batch": batch})
    mesh = make_mesh(recipe.config.engine.mesh, devices)
    todo = programs_of(
        recipe.config, mesh, frozen=recipe.frozen, artifacts=recipe.artifacts, kinds=kinds, batch_gpu=batch_gpu
    )
    if say is not None:
        shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        say(f"{recipe.config.name} for {target.count} x {target.chip.title} ({target.name}), mesh {shape}")
    memory, sizes = recipe.config.engine.memory_gib, dict(mesh.shape)
    limit = target.chip.memory if memory is None else int(memory * 2**30)
    for program in todo:
        if program.held is not None:
            refuse(f"'{program.name}'", program.held, limit, sizes)

    def compiled(program: Any, traced: Any) -> Any:
        file = re.sub(r"\W+", "-", program.name)
        dump = None if hlo is None else hlo / f"{file}.hlo.txt"
        found = estimate(program.name, traced, target, dump, quick=quick)
        if say is not None:
            say(f"compiled '{program.name}' in {found.seconds:.0f} s")
        held = program.held or Memory(found.arguments, 0, 0, 0, 0)
        refuse(f"'{program.name}'", dataclasses.replace(held, temporaries=found.temporaries), limit, sizes)
        return program, found

    pool = ThreadPoolExecutor(os.cpu_count())  # tracing keeps to one thread, compiling does not
    try:
        running = [pool.submit(compiled, program, program.trace()) for program in todo]
        return recipe.config, [done.result() for done in running]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever fails does not wait for the others
