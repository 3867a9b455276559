"""``gen info``."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.train import Overrides

__all__ = ["info"]


def info(
    what: Annotated[str, tyro.conf.Positional],
    /,
    *,
    devices: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None,
    teacher: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
    overrides: Overrides = (),
) -> None:
    """Shows a preset or a run: parameters per network, memory per device, identities, and every setting's path.

    Allocates and compiles nothing.

    Examples:
      gen info demo-teacher --data runs/demo/cache
      gen info demo-teacher --data runs/demo/cache --devices 8 --engine.mesh.fsdp 8
      gen info runs/demo/student

    Args:
      what: a preset from gen list, or a run folder.
      devices: number of devices to calculate for; those of this machine by default.
      data: the data or latent cache, for presets that take one.
      teacher: the teacher's run folder, for presets that take one.
      tokenizer: the tokenizer's run folder, for presets that take one.
    """
    from gen.cli.overrides import override
    from gen.cli.train import prepare
    from gen.config import fingerprint
    from gen.training import engine

    if Path(what).is_dir():
        from gen.pretrained.load import read_config

        config, frozen = override(read_config(what), overrides), None
    else:
        recipe = prepare(what, {"data": data, "teacher": teacher, "tokenizer": tokenizer}, overrides)
        config, frozen = recipe.config, recipe.frozen
    print(f"{config.name}  (configuration {fingerprint(config)})")
    if frozen is None:
        _run(Path(what))
    else:
        engine.dry_run(config, frozen=frozen, devices=devices)
    for role, origin in config.frozen.items():
        print(f"frozen {role}: {origin}")
    for stage in config.stages:
        print(f"data of {stage.name}: {stage.data.identity()}")
    print("\nsettings (override with --PATH VALUE):")
    for path, value in _leaves(config):
        print(f"  {path} = {value}")


def _run(path: Path) -> None:
    """Parameters and weights of a trained run."""
    from gen.nn.network import count
    from gen.pretrained.load import load

    loaded = load(path)
    print(f"step {loaded.step}, {loaded.weights} weights")
    for role, tree in loaded.params.items():
        print(f"{role}: {count(tree):,} parameters")
    if loaded.config.generator is not None:
        print(f"network calls per sample: {loaded.generator.nfe}")


def _leaves(config: Any) -> list[tuple[str, str]]:
    """(path, JSON) of every setting, as overrides name them."""
    from gen.config import to_json

    def walk(value: Any, path: str) -> list[tuple[str, str]]:
        named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
        if named is None or not nested:
            return [(path, json.dumps(value))]
        head = [(path, value["kind"])] if path and isinstance(value, dict) and "kind" in value else []
        return head + [leaf for k, v in named if k != "kind" for leaf in walk(v, f"{path}.{k}" if path else str(k))]

    return walk(to_json(config), "")
