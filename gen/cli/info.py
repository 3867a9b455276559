"""``gen info``."""

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import Switch, flag
from gen.cli.opening import Overrides, prepare
from gen.cli.overrides import mesh_overrides
from gen.config import fingerprint

__all__ = ["info", "leaves"]


def info(
    what: Annotated[str, tyro.conf.Positional, flag("PRESET|FILE.py:PRESET|RUN")],
    /,
    *,
    mesh: Annotated[str | None, flag("AXIS=N,...")] = None,
    devices: Annotated[int | None, flag("N")] = None,
    batch: Annotated[int | None, flag("N")] = None,
    batch_gpu: Annotated[int | None, flag("N")] = None,
    data: Annotated[str | None, flag("DATA")] = None,
    teacher: Annotated[Path | None, flag("RUN")] = None,
    tokenizer: Annotated[Path | None, flag("RUN")] = None,
    unconditional: Switch = False,
    target: Annotated[str | None, flag("NAME[:SHAPE]")] = None,
    overrides: Overrides = (),
) -> None:
    """Shows a preset or a run: parameters per network, memory per device, identities, and every setting's path.

    Allocates and compiles nothing, unless a target is named: then the memory of a step there is its compiler's figure,
    and no data are needed. Without the inputs that a preset needs, the paper, its recipe and the expected result.

    Examples:
      gen info dit-xl2
      gen info demo-tokenizer
      gen info dit-xl2 --data cache --mesh data=8,fsdp=4 --batch-gpu 8 --engine.memory_gib 80
      gen info dit-xl2 --target v5e:8x8
      gen info ./myexp.py:my-flow
      gen info runs/demo/student

    Args:
      what: a preset from gen list or of your own file, or a run folder.
      mesh: axis sizes of the mesh to calculate for: data (copies), fsdp (parts of the state), tensor (parts of layers).
      devices: number of devices to calculate for; the product of the mesh, or those of this machine, by default.
      batch: global batch size of every stage.
      batch_gpu: samples per device at a time, as for gen train.
      data: the data or latent cache, for presets that take one.
      teacher: the teacher's run folder, for presets that take one.
      tokenizer: the tokenizer's run folder, for presets that take one.
      unconditional: without classes, as for gen train.
      target: a TPU slice or GPUs to compile a step for, as for gen compile; its wheels must be installed.
    """
    if target is not None:
        _show_target(what, target, (mesh_overrides(mesh), overrides), batch, batch_gpu, (data, teacher, tokenizer))
        return
    if Path(what).is_dir():
        _show_run(Path(what), overrides)
        return
    from gen.experiments import find
    from gen.training.checks import dry_run

    axes = mesh_overrides(mesh)
    if mesh is not None and devices is None and all(int(size) > 0 for _, size in axes):
        devices = math.prod(int(size) for _, size in axes)
    inputs = {"data": data, "teacher": teacher, "tokenizer": tokenizer}
    preset = find(what)
    if any(inputs[name] is None for name in preset.required):
        _show_preset(what, preset)
        return
    recipe = prepare(what, inputs, (*axes, *overrides), {"batch": batch}, unconditional=unconditional)
    print(f"{recipe.config.name}  (configuration {fingerprint(recipe.config)})")
    dry_run(recipe.config, frozen=recipe.frozen, artifacts=recipe.artifacts, batch_gpu=batch_gpu, devices=devices)
    _show_settings(recipe.config)


def _show_target(
    what: str, target: str, changes: Any, batch: int | None, batch_gpu: int | None, given: tuple[Any, ...]
) -> None:
    """What a training step of a preset needs on a device that is not here."""
    from gen.training.targets import find_target
    from gen.training.targets import prepare as prepare_compilers

    found = find_target(target)
    prepare_compilers()
    from gen.cli.estimates import estimates
    from gen.training.budget import size_text

    names = ("data", "teacher", "tokenizer")
    inputs = {name: None if value is None else str(value) for name, value in zip(names, given, strict=True)}
    axes, overrides = changes
    _, made = estimates(
        what, found, inputs=inputs, overrides=(*axes, *overrides), batch=batch, batch_gpu=batch_gpu, say=print
    )
    for program, estimate in made:
        held = {name: size for name, size in dataclasses.asdict(program.held).items() if size}
        parts = {**held, "temporaries": estimate.temporaries}
        listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        print(
            f"'{program.name}': {listed}; {size_text(sum(parts.values()))} of the {size_text(found.chip.memory)} of a "
            f"{found.chip.title}"
        )


def _show_preset(what: str, preset: Any) -> None:
    """What its experiment file says of a preset, and the inputs without which there is no more to say."""
    flags = {"data": "--data DATA", "teacher": "--teacher RUN", "tokenizer": "--tokenizer RUN"}
    needs = " ".join(flags[name] for name in preset.required)
    print(f"{preset.name}: {preset.line}\n\n{inspect.getdoc(preset.load())}\n")
    if preset.optional:
        print(f"takes {' '.join(flags[name] for name in preset.optional)} as well")
    print(f"parameters, memory and settings: gen info {what} {needs}")


def _show_run(path: Path, overrides: tuple[tuple[str, str], ...]) -> None:
    """Parameters, weights and settings of a trained run."""
    from gen.cli.overrides import override
    from gen.nn.network import count
    from gen.runs import load, read_config

    config = override(read_config(path), overrides)
    print(f"{config.name}  (configuration {fingerprint(config)})")
    loaded = load(path)
    print(f"step {loaded.step}, {loaded.weights} weights")
    for role, tree in loaded.params.items():
        print(f"{role}: {count(tree):,} parameters")
    if loaded.config.sampler is not None:
        print(f"network calls per sample: {loaded.generator.nfe}")
    _show_settings(config, trained=True)


def _show_settings(config: Any, *, trained: bool = False) -> None:
    """Where frozen arrays and data come from; every setting with its path. Of a trained run the sampler's alone change.

    A run that is gone on with takes its preset's settings: gen train PRESET shows what it refuses.
    """
    for role, origin in config.frozen.items():
        print(f"frozen {role}: {origin}")
    for stage in config.stages:
        print(f"data of {stage.name}: {stage.data.identity()}")
    settings = leaves(config)
    if trained:
        changeable = [setting for setting in settings if setting[0].startswith("sampler")]
        settings = [setting for setting in settings if setting not in changeable]
        if changeable:
            print("\nhow it is sampled (gen sample and gen evaluate take --PATH VALUE):")
            for path, value in changeable:
                print(f"  {path} = {value}")
    print("\nhow it was trained:" if trained else "\nsettings (override with --PATH VALUE):")
    for path, value in settings:
        print(f"  {path} = {value}")


def leaves(config: Any) -> list[tuple[str, str]]:
    """Gives (path, JSON) of every setting, as overrides name them."""
    from gen.config import to_json

    def walk(value: Any, path: str) -> list[tuple[str, str]]:
        named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
        if named is None or not nested:
            return [(path, json.dumps(value))]
        head = [(path, value["kind"])] if path and isinstance(value, dict) and "kind" in value else []
        return head + [leaf for k, v in named if k != "kind" for leaf in walk(v, f"{path}.{k}" if path else str(k))]

    return walk(to_json(config), "")
