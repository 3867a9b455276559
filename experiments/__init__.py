"""Experiments: one file per paper, each with presets (paper scale, one GPU, laptop) found by name.

A file lists its presets in one literal, ``PRESETS = {"name": function}``; the first line of a function's
docstring is what ``gen list`` shows, and its parameters name the inputs it takes: ``teacher`` and
``tokenizer`` (what `gen.load` gives), ``data`` (a path, str). Further parameters have defaults and are for
Python alone. The table is read from the source text, so
listing presets imports neither the experiments nor jax.
"""

import ast
import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen.config import suggest
from gen.errors import GenError

__all__ = ["INPUTS", "Preset", "Recipe", "build", "find", "presets"]

INPUTS = ("teacher", "tokenizer", "data")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset gives: everything that `gen.training.engine.train` needs.

    Attributes:
      config: a RunConfig.
      frozen: arrays of teachers and feature networks by role; each role stands in ``config.frozen`` with where
        it came from.
      artifacts: arrays that the run folder must hold to be usable alone (``tokenizer``, ``normalizer``).
    """

    config: Any
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    artifacts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes:
      name: what is typed.
      module, function: where it is made.
      line: one line for a list.
      required, optional: its inputs.
    """

    name: str
    module: str
    function: str
    line: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


def presets(folder: Path = Path(__file__).parent) -> dict[str, Preset]:
    """All presets by name, from the source text of the files in `folder`; runs none of it.

    Raises GenError for a file whose ``PRESETS`` is not a literal of strings and function names, and for a name used
    twice.
    """
    found: dict[str, Preset] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        for preset in _parse(path):
            if preset.name in found:
                raise GenError(f"preset '{preset.name}' stands in {found[preset.name].module} and {preset.module}")
            found[preset.name] = preset
    return found


def _parse(path: Path) -> list[Preset]:
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    table = next((v for name, v in map(_assigned, tree.body) if name == "PRESETS"), None)
    if table is None:
        return []
    rows = zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else [(None, None)]
    out = []
    for key, value in rows:
        named = isinstance(key, ast.Constant) and isinstance(value, ast.Name) and value.id in functions
        if not named or not isinstance(key, ast.Constant) or not isinstance(value, ast.Name):
            raise GenError(f"{path.name}: PRESETS must be a literal of names and functions of the same file")
        node = functions[value.id]
        line = (ast.get_docstring(node) or "").strip().partition("\n")[0]
        out.append(Preset(str(key.value), f"gen.experiments.{path.stem}", value.id, line, *_inputs(node, path)))
    return out


def _assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id, node.value
    return "", None


def _inputs(node: ast.FunctionDef, path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(required, optional) parameters of a preset function."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(plain, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    required = tuple(arg.arg for arg, default in pairs if default is None)
    for name in required:
        if name not in INPUTS:
            raise GenError(
                f"{path.name}: preset input '{name}' of {node.name}; expected {', '.join(INPUTS)}, or a default"
            )
    return required, tuple(arg.arg for arg, default in pairs if default is not None and arg.arg in INPUTS)


def find(name: str) -> Preset:
    """The row of preset `name`. Raises GenError, with the closest name, when there is none."""
    table = presets()
    if name not in table:
        raise GenError(f"unknown preset '{name}'; {suggest(name, table)} (gen list shows all)")
    return table[name]


def build(name: str, inputs: Mapping[str, Any]) -> Recipe:
    """The recipe of preset `name`; imports its module.

    Args:
      inputs: by name (`INPUTS`), only those that are given.
    Raises GenError for an unknown preset, an input it needs but was not given, or does not take.
    """
    preset = find(name)
    for wanted in preset.required:
        if wanted not in inputs:
            what = "PATH" if wanted == "data" else "RUN"
            raise GenError(f"preset '{name}' needs a {wanted}; add --{wanted} {what}")
    for given in inputs:
        if given not in preset.required + preset.optional:
            raise GenError(f"preset '{name}' takes no {given}; leave out --{given}")
    recipe: Recipe = getattr(importlib.import_module(preset.module), preset.function)(**inputs)
    return recipe
