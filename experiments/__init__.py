"""Experiments: one file per paper, each with presets (paper scale, one GPU, laptop) found by name.

A user's own file, anywhere, works the same way: its presets are called ``FILE.py:PRESET``.

A file lists its presets in one literal, ``PRESETS = {"name": function}``; the first line of a function's
docstring is what ``gen list`` shows, and its parameters name the inputs it takes: ``teacher`` and
``tokenizer`` (what `gen.load` gives), ``data`` (a path, str); of students also ``student`` (the configuration of
their network) and ``calls`` (how many network calls make a sample). Further parameters have defaults and are for
Python alone. The table is read from the source text, so
listing presets imports neither the experiments nor jax.
"""

import ast
import dataclasses
import importlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen import own
from gen.config import suggest
from gen.errors import GenError
from gen.files import reading

__all__ = ["INPUTS", "Preset", "Recipe", "build", "file_kinds", "file_presets", "find", "is_file", "presets"]

INPUTS = ("teacher", "tokenizer", "data", "student", "calls")
NEEDED = {
    "teacher": "a teacher; add --teacher RUN",
    "tokenizer": "a tokenizer; add --tokenizer RUN",
    "data": "training data; add --data DATA",
    "student": "a network for the student; add --student PRESET",
    "calls": "the number of network calls of a sample; add --calls N",
}


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
      name: what it is called in its file's table.
      module, function: where it is made: the name of a module, or the path of a user's own file.
      line: one line for a list.
      required, optional: its inputs.
    """

    name: str
    module: str | Path
    function: str
    line: str
    required: tuple[str, ...]
    optional: tuple[str, ...]

    def load(self) -> types.ModuleType:
        """The module that makes it, imported."""
        return own.import_file(self.module) if isinstance(self.module, Path) else importlib.import_module(self.module)


def presets(folder: Path = Path(__file__).parent) -> dict[str, Preset]:
    """All presets by name, from the source text of the files in `folder`; runs none of it.

    Raises GenError for a file whose ``PRESETS`` is not a literal of strings and function names, and for a name used
    twice.
    """
    found: dict[str, Preset] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        for preset in _parse(path, f"gen.experiments.{path.stem}"):
            if preset.name in found:
                raise GenError(f"preset '{preset.name}' stands in {found[preset.name].module} and {preset.module}")
            found[preset.name] = preset
    return found


def file_presets(file: Path, *, required: bool = True) -> dict[str, Preset]:
    """Reads the presets of a user's own file by name, from its source text; runs none of it.

    Raises GenError when there is no such file, it does not parse, or it has no ``PRESETS`` where they are required.
    """
    if not file.is_file():
        beside = [str(file.with_name(path.name)) for path in sorted(file.parent.glob("*.py"))]
        known = suggest(str(file), beside) if beside else "give the path of a Python file with a PRESETS table"
        raise GenError(f"there is no file {file}; {known}")
    found = {preset.name: preset for preset in _parse(file, file)}
    if not found and required:
        raise GenError(
            f'{file} has no presets; end it with PRESETS = {{"my-flow": my_flow}}, where my_flow is a function of the '
            "file that gives a Recipe"
        )
    return found


def file_kinds(file: Path) -> list[tuple[str, str, str]]:
    """Reads the (family, kind, class) of each kind that a user's own file registers, from its source text.

    Only lines ``KINDS["family"]["kind"] = f"{__name__}:Class"`` of the file itself are seen; a file that is absent has
    none. Raises GenError for a file that does not parse.
    """
    found = []
    for node in _tree(file).body if file.is_file() else ():
        match node:
            case ast.Assign(
                targets=[
                    ast.Subscript(
                        value=ast.Subscript(value=ast.Name(id="KINDS"), slice=ast.Constant(value=family)),
                        slice=ast.Constant(value=kind),
                    )
                ],
                value=value,
            ):
                text = value.values[-1] if isinstance(value, ast.JoinedStr) else value
                target = text.value if isinstance(text, ast.Constant) else ast.unparse(value)
                found.append((str(family), str(kind), str(target).removeprefix(":")))
    return found


def _tree(path: Path) -> ast.Module:
    with reading(path):
        code = path.read_bytes()
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise own.not_python(path, error) from None


def _parse(path: Path, module: str | Path) -> list[Preset]:
    """The rows of a file's table; `module` is what the presets are said to stand in."""
    tree = _tree(path)
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
        out.append(Preset(str(key.value), module, value.id, line, *_inputs(node, path)))
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


def is_file(name: str) -> bool:
    """Whether `name` means a file of the user's own: ``FILE.py``, or ``FILE.py:PRESET``."""
    return name.endswith(".py") or name.rpartition(":")[0].endswith(".py")


def find(name: str) -> Preset:
    """The row of preset `name`: a name, ``FILE.py:PRESET``, or ``FILE.py`` where the file has one preset.

    Raises GenError, with the closest name, when there is none.
    """
    if not is_file(name):
        table = presets()
        if name not in table:
            raise GenError(
                f"unknown preset '{name}'; {suggest(name, table)} (gen list shows all; your own file: FILE.py:PRESET)"
            )
        return table[name]
    file, _, wanted = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    table = file_presets(Path(file))
    if not wanted and len(table) > 1:
        raise GenError(f"{file} has several presets; give one: {', '.join(f'{file}:{known}' for known in table)}")
    if wanted and wanted not in table:
        raise GenError(f"{file} has no preset '{wanted}'; {suggest(wanted, table)}")
    return table[wanted or next(iter(table))]


def build(name: str, inputs: Mapping[str, Any]) -> Recipe:
    """The recipe of preset `name` (as of `find`); imports its module.

    Args:
      inputs: by name (`INPUTS`), only those that are given.
    Raises GenError for an unknown preset, an input it needs but was not given, or does not take.
    """
    preset = find(name)
    for wanted in preset.required:
        if wanted not in inputs:
            raise GenError(f"preset '{name}' needs {NEEDED[wanted]}")
    for given in inputs:
        if given not in preset.required + preset.optional:
            raise GenError(f"preset '{name}' takes no --{given}; leave it out")
    recipe = getattr(preset.load(), preset.function)(**inputs)
    if not isinstance(recipe, Recipe):
        raise GenError(f"preset '{name}' gives a {type(recipe).__name__}; expected a Recipe (gen.experiments)")
    own.record(recipe.config)  # refuses a class that no later process would find
    return recipe
