"""Own kinds: Python files of a user's own whose classes stand in the configuration of a run.

Such a file adds rows to `gen.kinds.KINDS` and is imported when it is named: by ``gen train FILE.py:PRESET``, by
``--module FILE``, or by `import_file` in Python. A run whose configuration holds its kinds records the file's path and
SHA-256 in ``modules.json``; a later process imports the file for that run only if its bytes are the recorded ones.

What this protects: weights are never read by other code than the code that trained them, and opening a run folder
executes nothing that has changed since, without a word. What it does not: the hash says that a file is the same, not
that it is harmless. A run folder of somebody you do not trust may name a file that came with it; a file inside the run
folder is therefore never imported from the record, and every import that a record asks for is written to stderr. Nor
does the hash cover what the file imports from installed packages.
"""

import dataclasses
import hashlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gen.config import installed, kind_of, kinds, suggest
from gen.errors import GenError
from gen.files import read_json, reading, write_json
from gen.kinds import KINDS

__all__ = ["accept", "admit", "import_file", "not_python", "record", "recorded", "where", "write_record"]

_RECORD = "modules.json"


@dataclasses.dataclass
class _Imported:
    """A file that was imported.

    Attributes:
      file: where it lies, absolute.
      sha256: of the bytes that were executed.
      module: what came of it.
      uses: path -> SHA-256 of the files that it imported by `import_file`.
      rows: family -> kind -> target: its own kinds.
    """

    file: Path
    sha256: str
    module: types.ModuleType
    uses: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


_imported: dict[str, _Imported] = {}  # by module name
_executed: set[str] = set()  # paths of all files that were tried
_running: list[_Imported] = []  # files that are being executed, the innermost last
_accepted: set[str] = set()  # names of the modules that stand for any older version of themselves


def import_file(path: str | Path) -> types.ModuleType:
    """Executes a Python file, once for each content, and registers its kinds.

    The module is named after the SHA-256 of the file, so that two files of one name do not collide. A file that needs
    another one beside it calls ``import_file(Path(__file__).with_name("other.py"))``; a run then records both.

    Raises:
      GenError: no such file, a file that does not parse, a row of `KINDS` that points nowhere or at what another module
        registered. What the file itself raises passes through; `where` says in which line.
    """
    file = Path(path).resolve()
    with reading(path):
        code = file.read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    name = f"gen_own_{digest[:16]}"
    if name not in _imported:
        entry = _Imported(file, digest, types.ModuleType(name))
        entry.module.__file__ = str(file)
        _execute(name, entry, code)
    entry = _imported[name]
    for family, rows in entry.rows.items():
        KINDS.setdefault(family, {}).update(rows)
    if _running:
        _running[-1].uses |= {str(entry.file): entry.sha256, **entry.uses}
    return entry.module


def not_python(file: Path, error: SyntaxError | ValueError) -> GenError:
    """Gives what is said of a file that does not parse."""
    line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
    return GenError(f"{file}{line} is not Python: {error.msg if isinstance(error, SyntaxError) else error}")


def _execute(name: str, entry: _Imported, code: bytes) -> None:
    """Runs a file as the module `name`; leaves nothing behind where that fails."""
    try:
        compiled = compile(code, str(entry.file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise not_python(entry.file, error) from None
    before = {family: dict(rows) for family, rows in KINDS.items()}
    sys.modules[name], _imported[name] = entry.module, entry
    _executed.add(str(entry.file))
    _running.append(entry)
    try:
        exec(compiled, entry.module.__dict__)
        entry.rows = _new_rows(before, entry)
    except BaseException:
        del sys.modules[name], _imported[name]
        KINDS.clear()
        KINDS.update(before)
        raise
    finally:
        _running.pop()


def _new_rows(before: Mapping[str, Mapping[str, str]], entry: _Imported) -> dict[str, dict[str, str]]:
    """The rows that a file has added to `KINDS`. Raises GenError for those that cannot be."""
    old = {kind: target for rows in before.values() for kind, target in rows.items()} | _flat(installed())
    new: dict[str, dict[str, str]] = {}
    modules = {name for name, other in _imported.items() if other is entry or str(other.file) in entry.uses}
    for family, rows in KINDS.items():
        for kind, target in rows.items():
            if before.get(family, {}).get(kind) == target:
                continue
            if kind in old:
                raise GenError(f"{entry.file}: the kind '{kind}' is {old[kind]} already; choose another name")
            module, _, attribute = target.partition(":")
            if module not in modules:
                raise GenError(
                    f"{entry.file}: the kind '{kind}' points at {target}, which is not in this file; write "
                    f'KINDS["{family}"]["{kind}"] = f"{{__name__}}:Class"'
                )
            cls = sys.modules[module].__dict__.get(attribute)
            if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or not _frozen(cls):
                raise GenError(f"{entry.file}: the kind '{kind}' is no frozen dataclass '{attribute}' of this file")
            if module == entry.module.__name__:
                new.setdefault(family, {})[kind] = target
    return new


def _frozen(cls: Any) -> bool:
    return bool(cls.__dataclass_params__.frozen)


def _flat(families: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {kind: target for rows in families.values() for kind, target in rows.items()}


def accept(path: str | Path) -> None:
    """Imports a file and takes it, as it is now, for every run that was made with an older version of its kinds."""
    name = import_file(path).__name__
    used = {other for other, entry in _imported.items() if str(entry.file) in _imported[name].uses}
    _accepted.update({name, *used})


def where(error: BaseException) -> str | None:
    """Tells where in a file of the user's own an error arose, and what it was, as one line; None where it did not.

    The line is like "myexp.py, line 12: KeyError: 'x'", with the file's whole path. It is the innermost line of such a
    file on the way to the error.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _executed]
    if not frames:
        return None
    text = f"{frames[-1].filename}, line {frames[-1].lineno}: {type(error).__name__}: {' '.join(str(error).split())}"
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and Path(frames[-1].filename).with_name(f"{missing}.py").is_file():
        text += (
            f"; {missing}.py lies beside the file: import it by "
            f'gen.own.import_file(Path(__file__).with_name("{missing}.py")), or install both as a package'
        )
    return text


def record(config: Any) -> list[dict[str, Any]]:
    """Gives the files whose own kinds a configuration holds, as ``modules.json`` says them.

    Kinds of installed packages (entry points of the group ``gen.kinds``) are not recorded: like this package, they are
    there by name. Nor are classes without a file, such as those of a notebook.

    Raises:
      GenError: a class of a user's file that has no row in `KINDS`, so that no later process would find it.
    """
    found: dict[str, dict[str, Any]] = {}
    given = _flat(installed())
    for cls in dict.fromkeys(_classes(config)):
        kind, module = kind_of(cls), cls.__module__
        if kind is None and module in _imported:
            raise GenError(
                f"{cls.__name__} of {_imported[module].file} has no kind; add a line to the file, such as "
                f'KINDS["{_family(cls)}"]["{cls.__name__.lower()}"] = f"{{__name__}}:{cls.__name__}"'
            )
        if kind is None or kind in given or module.partition(".")[0] == "gen":
            continue
        now = _now(module)
        if now is not None:
            file, digest, uses = now
            entry = {"file": str(file), "sha256": digest, "uses": uses, "kinds": []}
            found.setdefault(module, entry)["kinds"].append(kind)
    return [{**entry, "kinds": sorted(entry["kinds"])} for entry in found.values()]


def _family(cls: type) -> str:
    """The family of kinds that a class without one is most like; that of the networks where nothing tells."""
    if any(base.__name__ == "Method" for base in cls.__mro__):
        return "task"
    return "solver" if hasattr(cls, "rows") and hasattr(cls, "step") else "backbone"


def _classes(value: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in dataclasses.fields(value):
            yield from _classes(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _classes(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _classes(inner)


def _now(module: str) -> tuple[Path, str, dict[str, str]] | None:
    """(file, SHA-256, files it uses) of a module of this process; None for one without a file."""
    if module in _imported:
        entry = _imported[module]
        return entry.file, entry.sha256, dict(entry.uses)
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return Path(path).resolve(), _sha256(Path(path)), {}


def _sha256(path: Path) -> str:
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(run: str | Path) -> list[dict[str, Any]]:
    """Gives what ``modules.json`` of a run folder says; [] where there is none. Raises GenError for a damaged one."""
    path = Path(run) / _RECORD
    if not path.exists():
        return []
    found = read_json(path)
    shape = {"file": str, "sha256": str, "uses": dict, "kinds": list}
    rows: list[Any] = found if isinstance(found, list) else [None]
    if not all(isinstance(r, dict) and all(isinstance(r.get(k), t) for k, t in shape.items()) for r in rows):
        raise GenError(f"{path} is damaged; give the files of its own kinds with --module FILE, and delete it")
    return rows


def write_record(run: str | Path, modules: list[dict[str, Any]]) -> None:
    """Writes ``modules.json`` where it says anything new."""
    if modules != recorded(run):
        write_json(Path(run) / _RECORD, modules)


def admit(run: str | Path) -> None:
    """Makes the own kinds of a run known: imports their files if they are still what the run recorded.

    Raises:
      GenError: a file that is gone, has changed, or lies in the run folder; a kind that this process has from another
        file. What to do is said: restore the file, or accept another with ``--module FILE`` (in Python: `accept`).
    """
    for entry in recorded(run):
        missing = [kind for kind in entry["kinds"] if kind not in kinds()]
        if not missing:
            _check_known(run, entry)
            continue
        if not any(str(_imported[name].file) == entry["file"] for name in _accepted):
            _check_files(run, entry)
            print(f"{run} has own kinds ({', '.join(entry['kinds'])}): importing {entry['file']}", file=sys.stderr)
            import_file(entry["file"])
            missing = [kind for kind in entry["kinds"] if kind not in kinds()]
        if missing:
            raise GenError(f"{entry['file']} registers no kind '{missing[0]}'; {suggest(missing[0], kinds())}")


def _check_known(run: str | Path, entry: Mapping[str, Any]) -> None:
    """Raises GenError where this process has the kinds of a record from another file, which nobody has accepted."""
    for kind in set(entry["kinds"]) - set(_flat(installed())):
        module = kinds()[kind].partition(":")[0]
        now = _now(module)
        if module in _accepted or now is None:
            continue
        file, digest, uses = now
        if digest != entry["sha256"]:
            raise _changed(run, file, file)
        for name, used in uses.items():
            if used not in entry["uses"].values():
                raise _changed(run, name, file)


def _check_files(run: str | Path, entry: Mapping[str, Any]) -> None:
    """Raises GenError unless all files of a record are what they were; executes nothing."""
    for name, then in {entry["file"]: entry["sha256"], **entry["uses"]}.items():
        file = Path(name)
        needs = f"{run} has own kinds ({', '.join(entry['kinds'])}) of {file}"
        if not file.is_absolute() or Path(run).resolve() in file.resolve().parents:
            raise GenError(
                f"{needs}, which came with the run folder itself; read the file, and if you trust it, say so with "
                f"--module {file}"
            )
        if not file.is_file():
            raise GenError(f"{needs}, and that file is gone; put it back, or say where it is now with --module FILE")
        if _sha256(file) != then:
            raise _changed(run, file, entry["file"])


def _changed(run: str | Path, file: str | Path, module: str | Path) -> GenError:
    return GenError(
        f"{run} was made with another version of {file} ({run}/{_RECORD} has its SHA-256); restore the file, or "
        f"accept it as it is now with --module {module}"
    )
