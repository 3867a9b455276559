"""Overrides of a configuration by path, typed by the configuration itself."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from gen.config import from_json, kinds, suggest, to_json
from gen.errors import GenError

__all__ = ["mesh_overrides", "override"]

AXES = ("data", "fsdp", "tensor", "student")  # as in gen.training.sharding, which imports jax


def override(config: Any, assignments: Iterable[tuple[str, str]]) -> Any:
    """Replaces some of the values of `config`.

    Args:
      config: a registered configuration.
      assignments: (path, text) pairs: ``("stages.0.task.lr", "3e-4")``. A list entry is named by its position or,
        where the entries have names, by its name. The text is JSON (``3e-4``, ``true``, ``[1, 2]``), plain text for a
        string, or a registered kind to replace a whole component by that kind's defaults (``solver euler``).

    Raises GenError for an unknown key, with the closest known one, and for a value of the wrong type.
    """
    data = to_json(config)
    for path, text in assignments:
        _refuse_given(config, path.split("."), path)
        data = _assign(data, path.split("."), text, path)
    return from_json(data, type(config))


def mesh_overrides(text: str | None) -> tuple[tuple[str, str], ...]:
    """Gives the overrides that ``data=8,fsdp=4`` stands for; axes not named get 1. Raises GenError for other text."""
    if text is None:
        return ()
    sizes = dict.fromkeys(AXES, "1")
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if axis not in sizes or not equals or not size.lstrip("-").isdigit():
            raise GenError(
                f"--mesh '{text}' is not like data=8,fsdp=4; axes are {', '.join(AXES)}, sizes whole numbers"
            )
        sizes[axis] = size
    return tuple((f"engine.mesh.{axis}", size) for axis, size in sizes.items())


def _refuse_given(value: Any, path: list[str], full: str) -> None:
    """Raises GenError for a path through a field that says what another run says (its metadata has "given")."""
    for head in path:
        if isinstance(value, tuple | list):
            value = value[_index([to_json(v) for v in value], head, full)]
            continue
        fields = {field.name: field for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
        if head not in fields:
            return
        role = fields[head].metadata.get("given")
        if role is not None:
            raise GenError(
                f"--{full}: the {role} is what its own run says, and cannot be changed here; change it where it is "
                f"trained, or give another one (--{role} RUN)"
            )
        value = getattr(value, head)


def _assign(data: Any, path: list[str], text: str, full: str) -> Any:
    if not path:
        return _value(data, text)
    head, rest = path[0], path[1:]
    if isinstance(data, dict):
        known = [k for k in data if k != "kind"]
        if head not in known:
            raise GenError(f"--{full}: unknown key '{head}'; {suggest(head, known)}")
        return data | {head: _assign(data[head], rest, text, full)}
    if isinstance(data, list):
        at = _index(data, head, full)
        return [*data[:at], _assign(data[at], rest, text, full), *data[at + 1 :]]
    raise GenError(f"--{full}: nothing lies under '{head}': the value before it is {data!r}; shorten the path")


def _index(data: list[Any], head: str, full: str) -> int:
    names = [str(v["name"]) if isinstance(v, dict) and "name" in v else str(i) for i, v in enumerate(data)]
    if head in names:
        return names.index(head)
    if head.isdecimal() and int(head) < len(data):
        return int(head)
    raise GenError(f"--{full}: no entry '{head}'; {suggest(head, names)} (or 0 to {len(data) - 1})")


def _value(old: Any, text: str) -> Any:
    try:
        new = json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        new = text
    if isinstance(new, str) and new in kinds() and isinstance(old, dict | None):
        return {"kind": new}
    return text if isinstance(old, str) and new is not None else new
