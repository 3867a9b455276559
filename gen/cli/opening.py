"""Runs as commands open them: loaded, with another sampler where asked; presets with their inputs and overrides."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import USUAL, Sampling
from gen.cli.labels import with_labels
from gen.errors import GenError

__all__ = ["Overrides", "describe", "open_run", "prepare"]

Overrides = Annotated[tuple[tuple[str, str], ...], tyro.conf.Suppress]


def open_run(
    run: Path,
    sampling: Sampling = USUAL,
    step: int | None = None,
    *,
    overrides: tuple[tuple[str, str], ...] = (),
) -> Any:
    """Loads a run that is sampled as the flags of a command say.

    Args:
      run: a run folder.
      sampling: the flags.
      step: as for `gen.load`.
      overrides: (path, text) pairs under "sampler.".

    Raises:
      GenError: settings that the run does not have, and a guide that is none.
    """
    from gen.cli.overrides import override
    from gen.config import config_class, members, suggest
    from gen.runs import load, read_config

    named = {name: getattr(sampling, name) for name in ("steps", "solver", "grid", "guidance")}
    given = {name: value for name, value in named.items() if value is not None}
    for path, _ in overrides:
        if not path.startswith("sampler."):
            raise GenError(f"--{path}: of a trained run only the sampler can be changed (--sampler.NAME VALUE)")
    read_config(run)  # its own kinds are known from here on
    adaptive = members("adaptive")
    searched = Path(given.pop("grid")) if str(given.get("grid")).endswith(".json") else None
    for family, known in (("solver", members("solver") | adaptive), ("grid", members("grid"))):
        if family in given and given[family] not in known:
            raise GenError(
                f"unknown {family} '{given[family]}'; {suggest(given[family], known)} (of your own file: --module FILE)"
            )
    loaded = load(run, weights=sampling.weights, step=step)
    if sampling.guide is not None:
        weak = load(sampling.guide, weights=sampling.weights)
        loaded = _guided(loaded, weak, bool(given.get("guidance")) or bool(overrides))
    if searched is not None:
        loaded = _on_grid(loaded, searched, given.get("steps"))
    if not given and not overrides:
        return loaded
    loaded.generator  # noqa: B018 - says what a run without one is
    sampler = loaded.config.sampler
    if given.get("solver") in adaptive:
        from gen.sampling.adaptive import AdaptiveSampler

        sampler = AdaptiveSampler.of(sampler.changed(), loaded.denoiser, config_class(given.pop("solver"))())
    kinds: dict[str, Any] = {name: config_class(given[name])() for name in ("solver", "grid") if name in given}
    loaded = loaded.with_sampler(sampler.changed(**{**given, **kinds}))
    return dataclasses.replace(loaded, config=override(loaded.config, overrides))


def _on_grid(loaded: Any, path: Path, steps: int | None) -> Any:
    """The run on the grid of a file that gen search wrote. Raises GenError for the grid of another model."""
    from gen.experiments._search import controls_of, process_of, tunable
    from gen.sampling.search import read_grid

    generator = tunable(loaded)
    grid = read_grid(path, controls_of(generator, loaded.params["net"]))
    sampler = generator.sampler.changed(grid=grid, steps=len(grid.times) - 1 if steps is None else steps)
    grid(process_of(generator), sampler.steps)
    return loaded.with_sampler(sampler)


def _guided(loaded: Any, weak: Any, scaled: bool) -> Any:
    """The run with autoguidance by the run `weak`, or with its teacher's hand in it.

    Raises GenError where the two do not go together.
    """
    from gen.distill.noise_decoder import NoiseDecoding
    from gen.sampling.guidance import Autoguidance

    if isinstance(loaded.config.sampler, NoiseDecoding):
        return _taught(loaded, weak)
    if not scaled:
        raise GenError("--guide without a guidance scale changes nothing; add --cfg-scale W, such as 2")
    ours, theirs = loaded.generator.shape, weak.generator.shape
    if ours != theirs:
        raise GenError(f"{weak.path} makes {theirs}, {loaded.path} {ours}; give a guide of the same images")
    sampler = dataclasses.replace(loaded.config.sampler.changed(guidance=Autoguidance()), guide=weak.denoiser)
    loaded = loaded.with_sampler(sampler)
    return dataclasses.replace(loaded, params={**loaded.params, "guide": weak.params["net"]})


def _taught(loaded: Any, teacher: Any) -> Any:
    """The student of a Distilled Decoding with its teacher. Raises GenError for another than its own."""
    stated, subject = loaded.config.frozen.get("teacher", teacher.origin), teacher.generator.subject
    if subject != loaded.generator.model or stated != teacher.origin:
        raise GenError(f"{teacher.path} ({teacher.origin}) is not the teacher of {loaded.path}; that is {stated}")
    loaded = loaded.with_sampler(loaded.config.sampler.guided_by(teacher.config.sampler))
    return dataclasses.replace(loaded, params={**loaded.params, "guide": teacher.params["net"]})


def describe(loaded: Any) -> str:
    """Gives one line: what is sampled, with which weights and how many network calls."""
    kind = {"ema": "EMA", "raw": "raw"}[loaded.weights]
    calls = loaded.generator.nfe
    stated = f"{calls} network call{'s' * (calls != 1)} per image" if calls else "network calls measured"
    return f"{loaded.config.name}, step {loaded.step}, {kind} weights, {stated}"


def prepare(
    preset: str,
    inputs: dict[str, Any],
    overrides: tuple[tuple[str, str], ...] = (),
    short: Mapping[str, Any] | None = None,
    *,
    unconditional: bool = False,
    start: Path | None = None,
) -> Any:
    """Gives the recipe of a preset with its inputs loaded and its settings overridden.

    Args:
      preset: a name, or FILE.py:PRESET.
      inputs: by name, None where not given: paths, of which runs are loaded with their EMA weights, or what `gen.load`
        gives; for ``student`` the name of a preset, whose network is fitted to the teacher.
      overrides: (path, text) pairs.
      short: settings under their short names: steps, batch, seed, profile ("FIRST-LAST"); None where not given.
      unconditional: whether the model loses its classes, the data their labels and the sampler its guidance.
      start: a run whose weights the first stage starts from, where they fit.

    Raises:
      GenError: an unknown preset, key or value; an input that is missing or no run.
    """
    from gen.cli.overrides import override
    from gen.experiments import build, find
    from gen.sampling.seeds import parse_range

    find(preset)
    given = {name: path for name, path in inputs.items() if path is not None}
    if set(given) - {"data"}:
        from gen.runs import load

        given = {name: load(found) if isinstance(found, Path) else found for name, found in given.items()}
    if "student" in given:
        from gen.experiments._students import student_network

        given["student"] = student_network(given["student"], given["teacher"])
    recipe = build(preset, given)
    stages = range(len(recipe.config.stages))
    paths = {
        "steps": [f"stages.{stages[-1]}.steps"],
        "batch": [f"stages.{i}.batch" for i in stages],
        "seed": ["engine.seed"],
        "profile": ["engine.profile"],
    }
    asked = {name: value for name, value in (short or {}).items() if value is not None}
    if "profile" in asked:
        window = parse_range(asked["profile"], "steps")
        asked["profile"] = [window.start, window.stop - 1]
    known = tuple((path, str(value)) for name, value in asked.items() for path in paths[name])
    without = _without_classes(preset, recipe.config) if unconditional else ()
    recipe = dataclasses.replace(recipe, config=override(recipe.config, [*known, *without, *overrides]))
    config = with_labels(recipe.config)
    if not config.class_names and "teacher" in given:
        config = dataclasses.replace(config, class_names=given["teacher"].config.class_names)
    recipe = dataclasses.replace(recipe, config=config)
    return recipe if start is None else _started(recipe, start)


def _without_classes(preset: str, config: Any) -> list[tuple[str, str]]:
    """The overrides that make a preset's model unconditional. Raises GenError where it has no classes of its own."""
    from gen.config import to_json

    stages = {f"stages.{i}": stage for i, stage in enumerate(config.stages) if stage.task.classes_at}
    if not stages:
        raise GenError(f"preset '{preset}' has no classes of its own to leave out; leave out --unconditional")
    found = [(f"{path}.task.{stage.task.classes_at}", "0") for path, stage in stages.items()]
    found += [(f"{path}.data.labels", "none") for path, stage in stages.items() if "labels" in to_json(stage.data)]
    guided = "guidance" in (to_json(config.sampler) or {})
    return [*found, ("sampler.guidance", "cfg")] if guided else found


def _started(recipe: Any, start: Path) -> Any:
    """The recipe that starts from the weights of the run `start`; says which arrays start afresh.

    Raises GenError for a run without such weights.
    """
    from gen.arrays import flatten
    from gen.nn.network import param_shapes
    from gen.runs import load

    source, role = load(start), recipe.config.stages[0].task.role
    if role not in source.params:
        raise GenError(f"{start} holds {', '.join(source.params)}; this preset starts from a '{role}': give such a run")
    wanted = flatten(param_shapes(recipe.config.stages[0].task.parts[0].network))
    given = {path: leaf.shape for path, leaf in flatten(source.params[role]).items()}
    fresh = [path for path, leaf in wanted.items() if given.get(path) != leaf.shape]
    text = f"; afresh: {', '.join(fresh)}" if fresh else ""
    print(f"starts from {len(wanted) - len(fresh)} of {len(wanted)} arrays of {start}{text}")
    config = dataclasses.replace(recipe.config, frozen={**recipe.config.frozen, "start": source.origin})
    return dataclasses.replace(recipe, config=config, frozen={**recipe.frozen, "start": source.params[role]})
