"""What the site shows beside docs/: pages that stand elsewhere in the repository, and those made from its source text.

MkDocs calls `on_files` and `on_page_markdown`. Nothing of gen that imports jax is imported here.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from experiments import presets
from gen.cli import COMMANDS
from gen.kinds import KINDS

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "experiments/launch/README.md": "launch.md",
}
MADE = {  # file whose content a page shows -> that page
    "experiments/__init__.py": "presets.md",
    "gen/kinds.py": "kinds.md",
    "tests/distill/matrix.py": "combinations.md",
}
NOTEBOOKS = "build/notebooks"  # made by scripts/notebook.py
FENCED = re.compile(r"(^```.*?^```\n?)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that do not lie in docs/."""
    texts = {page: linked((ROOT / file).read_text(), file) for file, page in ELSEWHERE.items()}
    texts |= {"presets.md": preset_page(), "kinds.md": kind_page(), "commands.md": command_page()}
    texts |= {"combinations.md": combination_page()} | dict(reference_pages())
    for page, text in texts.items():
        files.append(File.generated(config, page, content=named(text)))
    for path in sorted((ROOT / NOTEBOOKS).glob("*.*")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads the links of a page of docs/ to pages of the site, and names of the code to the reference."""
    made = page.file.generated_by is not None and not page.file.src_uri.startswith("notebooks/")
    return markdown if made else named(linked(markdown, f"docs/{page.file.src_uri}"))


def linked(text: str, source: str) -> str:
    """Leads the links of `source`, a path in the repository, to pages; a link to another file loses its target."""

    def lead(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page = ELSEWHERE.get(path) or MADE.get(path)
        if path.startswith("docs/"):
            page = path.removeprefix("docs/")
        elif path.startswith("experiments/") and page is None:
            page, anchor = "presets.md", f"#gen.experiments.{posixpath.basename(path).removesuffix('.py')}"
        if page is None:
            return label
        here = posixpath.dirname(ELSEWHERE.get(source) or source.removeprefix("docs/")) or "."
        return f"[{label}]({posixpath.relpath(page, here)}{anchor})"

    return outside_code(text, lambda part: re.sub(r"\[([^\]\[]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)", lead, part))


def named(text: str) -> str:
    """Leads every `gen.module.Name` in running text to the reference, where the reference has it."""
    link = r'<autoref identifier="\1" optional><code>\1</code></autoref>'
    pattern = re.compile(r"(?<!`)`(gen(?:\.\w+)+)`(?!`)")
    lines = r"^(?!#).*$"  # headings stay as they are
    return outside_code(text, lambda part: re.sub(lines, lambda m: pattern.sub(link, m[0]), part, flags=re.M))


def outside_code(text: str, change: Any) -> str:
    """Applies `change` to what stands between fenced blocks."""
    return "".join(part if part.startswith("```") else change(part) for part in FENCED.split(text))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Gives a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]) + "\n"


def docstring(file: Path, name: str | None = None) -> str:
    """Reads the docstring of a module, or of its class or function `name`; runs nothing."""
    body: list[Any] = [ast.parse(file.read_text())]
    if name is not None:
        body = [n for n in body[0].body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
    return ast.get_docstring(body[0]) or "" if body else ""


def summary(text: str) -> str:
    """Gives the first paragraph in one line."""
    return " ".join(text.partition("\n\n")[0].split())


def module_file(module: str) -> Path:
    """Gives the file of a dotted module name of this repository."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def preset_page() -> str:
    """Every experiment file: its docstring, with data, recipe and expected result, and its presets."""
    parts = ["# Presets", "`gen train PRESET`, `gen distill METHOD`: one section for each file of `experiments/`."]
    found = presets()
    for module in dict.fromkeys(str(preset.module) for preset in found.values()):
        text = docstring(ROOT / "experiments" / f"{module.rpartition('.')[2]}.py")
        first, _, rest = text.partition("\n\n")
        rows = [
            [f"`{name}`", " ".join(f"`--{need}`" for need in preset.required), preset.line]
            for name, preset in found.items()
            if preset.module == module
        ]
        title = summary(first).partition(":")[0].partition(" (")[0].rstrip(".")
        parts += [f"## {title} {{#{module}}}", first, rest, table(["preset", "needs", "what"], rows)]
    return "\n\n".join(parts)


def kind_page() -> str:
    """The table of kinds: what a configuration may be built of."""
    parts = ["# Building blocks", "Every row of `gen.kinds.KINDS`: the kind that JSON and flags know a class by."]
    for family, rows in KINDS.items():
        lines = []
        for kind, target in rows.items():
            module, _, name = target.partition(":")
            lines.append([f"`{kind}`", f"`{module}.{name}`", summary(docstring(module_file(module), name))])
        parts += [f"## {family}", table(["kind", "class", "what"], lines)]
    return "\n\n".join(parts)


def command_page() -> str:
    """The commands, as their docstrings explain them; `gen COMMAND --help` adds types and defaults."""
    parts = ["# Commands", "`gen COMMAND --help` shows the same, with defaults."]
    for command, (target, _) in COMMANDS.items():
        module, _, name = target.partition(":")
        parts.append(f"## gen {command}")
        for block in docstring(module_file(module), name).split("\n\n"):
            if block.startswith("Examples:\n"):
                block = "```sh\n" + "\n".join(line.removeprefix("  ") for line in block.splitlines()[1:]) + "\n```"
            elif block.startswith("Args:\n"):
                rows = re.findall(r"^  ([\w, ]+): (.*(?:\n    .*)*)", block, re.M)
                block = table(["argument", "what"], [[f"`{a}`", " ".join(b.split())] for a, b in rows])
            parts.append(block)
    return "\n\n".join(parts)


def assigned(file: Path, name: str) -> Any:
    """Gives the expression that a module assigns to `name`."""
    for node in ast.parse(file.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[union-attr]
    raise KeyError(f"{file} assigns no {name}")


def combination_page() -> str:
    """Methods of distillation by family of teacher, from the lists that the tests of all combinations run over."""
    methods = ast.literal_eval(assigned(ROOT / "experiments/compare_distillers.py", "METHODS"))
    teachers = [ast.literal_eval(key) for key in assigned(ROOT / "tests/distill/matrix.py", "TEACHERS").keys]
    refused = ast.literal_eval(assigned(ROOT / "tests/distill/test_matrix.py", "REFUSED"))
    rows = [[f"`{m}`", *(refused.get((m, t), "trains, samples") for t in teachers)] for m in methods]
    return "\n\n".join(
        [
            "# Combinations",
            "Made from the lists that the tests run over. `tests/distill/test_matrix.py` trains every method for a few "
            "steps from a small teacher of every family of networks, opens the run and makes images with it.",
            table(["method", *teachers], rows),
            "Every solver of [solvers](solvers.md) is measured on an exact mixture of Gaussians "
            "(`tests/sampling/test_solvers.py`); every backbone, tokenizer, generator and task of "
            "[building blocks](kinds.md) passes one suite of its family (`tests/conformance`).",
        ]
    )


def reference_pages() -> Iterator[tuple[str, str]]:
    """One page for each room of gen/, and one for the modules that stand alone."""
    rooms = {path.name: [*sorted(path.rglob("*.py"))] for path in sorted((ROOT / "gen").iterdir()) if path.is_dir()}
    rooms["gen"] = sorted((ROOT / "gen").glob("*.py"))
    for room, files in rooms.items():
        title = "gen" if room == "gen" else f"gen.{room}"
        parts = [f"# {title}"]
        for file in files:
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if file.read_text().strip():
                parts.append(f"::: {module}")
        if files:
            yield f"reference/{room}.md", "\n\n".join(parts)
