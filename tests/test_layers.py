"""Imports between rooms point only downward, and rooms on one floor do not import each other (read from the AST)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# floors from the top; rooms of one floor must not import each other. The command line finds presets by name, so it
# stands above them.
FLOORS = (
    ("cli",),
    ("experiments",),
    ("plan", "steps", "programs"),
    ("pretrained",),
    ("runs",),
    ("distill", "finetune"),
    ("autoregressive",),
    ("tokenizers",),
    ("sampling", "metrics"),
    ("diffusion",),
    ("features",),
    ("training", "data"),
    ("nn",),
    ("arrays",),
    ("own",),
    ("files",),
    ("config",),
    ("kinds",),
    ("progress",),
    ("errors",),
)
LEVEL = {room: len(FLOORS) - i for i, floor in enumerate(FLOORS) for room in floor}


def sources() -> list[tuple[str, Path]]:
    """(dotted module name, file) of all library code; ``experiments`` is installed as gen.experiments."""
    found = []
    for folder, package in ((ROOT / "gen", "gen"), (ROOT / "experiments", "gen.experiments")):
        for path in sorted(folder.rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def imports(path: Path, text: str | None = None) -> list[tuple[int, str]]:
    """(line, dotted name) of everything under gen that a file imports, at any depth of nesting."""
    found = []
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "gen"]


def violations(module: str, path: Path, text: str | None = None) -> list[str]:
    """What a file imports and must not."""
    own = module.split(".")[1] if "." in module else None
    wrong = []
    for line, name in imports(path, text):
        room = name.partition(".")[2].partition(".")[0]
        if room == "__version__" or own is None or room == own:
            continue
        if room not in LEVEL:
            wrong.append(f"{path}:{line}: {name} is in no room; import from the module that has it")
        elif LEVEL[room] >= LEVEL[own]:
            wrong.append(f"{path}:{line}: {own} imports {room}, which is not below it")
    return wrong


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_downward(module: str, path: Path) -> None:
    assert module == "gen" or module.split(".")[1] in LEVEL, f"{path} is in no known room"
    assert violations(module, path) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("gen.nn.layers", "from gen.training import engine"),
        ("gen.training.engine", "def f():\n    import gen.data.loader"),
        ("gen.sampling.generate", "from gen.metrics.frechet import frechet_distance"),
        ("gen.metrics.evaluate", "from gen import load"),
        ("gen.metrics.evaluate", "import gen"),
    ],
)
def test_the_check_finds_what_it_should(module: str, text: str) -> None:
    assert len(violations(module, Path("x.py"), text)) == 1


def test_the_linter_knows_the_same_floors() -> None:
    lines = (ROOT / ".importlinter").read_text().split("layers =")[1].split()
    names = [word.strip("()") for word in lines if word != "|"]
    assert names == [room for floor in FLOORS for room in floor if room != "experiments"]


def test_no_circle_among_files() -> None:
    """Each file can be read without another that reads it in turn."""
    known = dict(sources())
    needs: dict[str, set[str]] = {}
    for module, path in known.items():
        names = {name for _, name in imports(path)}
        needs[module] = {name if name in known else name.rpartition(".")[0] for name in names} & set(known) - {module}
    while free := {module for module, below in needs.items() if not below & set(needs)}:
        needs = {module: below for module, below in needs.items() if module not in free}
    assert not needs, f"files in or above a circle: {', '.join(sorted(needs))}"


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda v: v if isinstance(v, str) else "")
def test_files_stay_short(module: str, path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450, f"{module} does more than one thing: split it by what it holds"


# what a network is built of is called after its place there: a decoder's block is a Block
PARTS = {"Block", "Decoder", "Encoder", "Layer", "Trunk"}


def test_a_name_stands_for_one_idea() -> None:
    """No two classes of the library have one name, but for the parts of networks."""
    homes: dict[str, list[str]] = {}
    for module, path in sources():
        if module.startswith("gen.experiments."):  # each is read alone
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in PARTS:
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}
