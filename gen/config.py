"""Configurations: frozen dataclasses, to JSON and back by a short registered ``kind``.

Every configurable thing of the project (process, backbone, solver, tokenizer, task ...) is a frozen dataclass with a
row in the table of kinds (`gen.kinds`).
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from gen.errors import GenError
from gen.kinds import KINDS

__all__ = [
    "PLACE",
    "check_choices",
    "config_class",
    "fingerprint",
    "from_json",
    "installed",
    "kind_of",
    "kinds",
    "members",
    "suggest",
    "to_json",
]

# metadata of the field of a data configuration that says where the data lie, and nothing of what they are
PLACE = types.MappingProxyType({"place": True})


def kinds() -> dict[str, str]:
    """Gives all registered kinds: kind -> "module:Class". Imports nothing."""
    return {kind: target for family in (*KINDS.values(), *installed().values()) for kind, target in family.items()}


def members(family: str) -> dict[str, str]:
    """Gives the kinds of one family: kind -> "module:Class". Imports nothing."""
    return KINDS[family] | installed().get(family, {})


@functools.cache
def installed() -> dict[str, dict[str, str]]:
    """Kinds of installed packages: family -> kind -> "module:Class", from their entry points; imports none of them.

    Raises GenError for an entry point that is not called FAMILY.KIND, and for a kind that exists already.
    """
    found: dict[str, dict[str, str]] = {}
    for point in importlib.metadata.entry_points(group="gen.kinds"):
        family, _, kind = point.name.partition(".")
        source = f"the entry point '{point.name}' of {point.dist.name if point.dist else 'an installed package'}"
        if family not in KINDS or not kind:
            raise GenError(f"{source} is not called FAMILY.KIND; {suggest(family, KINDS)}")
        if any(kind in rows for rows in (*KINDS.values(), *found.values())):
            raise GenError(f"{source} gives the kind '{kind}' a second meaning; uninstall the package or rename it")
        found.setdefault(family, {})[kind] = point.value
    return found


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """Gives a clause for an error message that names the closest known name, or the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def config_class(kind: str) -> type:
    """Gives the dataclass registered as `kind`; imports its module. Raises GenError for an unknown kind."""
    table = kinds()
    if kind not in table:
        raise GenError(
            f"unknown kind '{kind}' in a configuration; {suggest(kind, table)} (a kind of your own: --module FILE)"
        )
    module, _, name = table[kind].partition(":")
    return typing.cast(type, getattr(importlib.import_module(module), name))


def kind_of(cls: type) -> str | None:
    """Gives the kind under which `cls` is registered, or None."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((kind for kind, where in kinds().items() if where == target), None)


def to_json(value: Any, *, places: bool = True) -> Any:
    """Gives a configuration as plain JSON values; registered dataclasses carry their ``kind``.

    Args:
      value: the configuration.
      places: whether it says where data lie. False leaves out the fields marked `PLACE`: a folder that was moved or
        copied holds the same data, which the data's own ``identity()`` tells.

    Raises TypeError for a value that has no JSON form (arrays, functions): configurations hold numbers,
    strings and other configurations only.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = kind_of(type(value))
        if "kind" in (f.name for f in dataclasses.fields(value)):
            raise TypeError(f"{type(value).__name__} has a field 'kind', the name of the tag; rename the field")
        head = {"kind": kind} if kind else {}
        fields = [f for f in dataclasses.fields(value) if f.init and (places or "place" not in f.metadata)]
        return head | {f.name: to_json(getattr(value, f.name), places=places) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): to_json(v, places=places) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v, places=places) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} does not belong in a configuration")


def from_json(data: Any, expected: Any = Any, where: str = "config") -> Any:
    """Rebuilds what `to_json` wrote, checked against the type annotation `expected`.

    `where` names the position for error messages. Lists become tuples where the annotation says so, ints
    become floats where a float is expected. Raises GenError for an unknown key, a missing key, an unknown
    kind or a value of the wrong type.
    """
    if isinstance(data, Mapping) and "kind" in data:
        cls = config_class(str(data["kind"]))
        _check_member(cls, expected, where)
        return _build(cls, {k: v for k, v in data.items() if k != "kind"}, where)
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        errors: list[str] = []
        for option in args:
            try:
                return from_json(data, option, where)
            except GenError as error:
                errors.append(str(error))
        raise GenError(errors[0] if len(errors) == 1 else "; or ".join(dict.fromkeys(errors)))
    if origin is typing.Literal:
        if data in args:
            return data
        raise GenError(f"{where} is {data!r}; expected one of {', '.join(map(repr, args))}")
    if origin in (tuple, list):
        if not isinstance(data, list | tuple):
            raise GenError(f"{where} is {data!r}; expected a list")
        variadic = origin is list or (len(args) == 2 and args[1] is Ellipsis)
        types_ = [args[0]] * len(data) if args and variadic else list(args) or [Any] * len(data)
        if len(types_) != len(data):
            raise GenError(f"{where} has {len(data)} entries; expected {len(types_)}")
        return origin(from_json(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(data, types_, strict=True)))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise GenError(f"{where} is {data!r}; expected an object")
        return {k: from_json(v, args[1] if args else Any, f"{where}.{k}") for k, v in data.items()}
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(data, Mapping):
            raise GenError(f"{where} is {data!r}; expected an object")
        return _build(expected, data, where)
    return _scalar(data, expected, where)


def _check_member(cls: type, expected: Any, where: str) -> None:
    options = typing.get_args(expected) or (expected,)
    concrete = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    all_concrete = concrete and len(concrete) == len([o for o in options if o is not type(None)])
    if all_concrete and not any(issubclass(cls, o) for o in concrete):
        names = " or ".join(o.__name__ for o in concrete)
        raise GenError(f"{where} is a {cls.__name__}; expected {names}")


def _build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise GenError(f"{where} has an unknown key '{key}' for {cls.__name__}; {suggest(key, fields)}")
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in data and (field.default, field.default_factory) == required:
            raise GenError(f"{where} lacks the key '{name}' that {cls.__name__} requires; add it")
    return cls(**{k: from_json(v, hints[k], f"{where}.{k}") for k, v in data.items()})


def _scalar(data: Any, expected: Any, where: str) -> Any:
    if expected is Any or not isinstance(expected, type) or getattr(expected, "_is_protocol", False):
        return tuple(data) if isinstance(data, list) else data
    if expected is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if expected is type(None) and data is None:
        return None
    if isinstance(data, expected) and not (isinstance(data, bool) and expected in (int, float)):
        return data
    raise GenError(f"{where} is {data!r}; expected {expected.__name__}")


def check_choices(config: Any) -> None:
    """Raises GenError where a field of a dataclass that is annotated by a Literal holds none of its values."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal:
            from_json(getattr(config, name), hint, f"{type(config).__name__}'s {name}")


def fingerprint(value: Any) -> str:
    """Gives the SHA-256 (16 hex digits) of a configuration's canonical JSON: equal configurations, equal text."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
