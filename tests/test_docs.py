"""The pages of docs/ name what is there: modules, classes, functions and methods; their links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from gen.cli import COMMANDS, parse

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def resolve(name: str) -> object:
    """What a dotted name means: the longest prefix that is a module, then its attributes."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = Path(ROOT, *parts[:end])
        if parts[:2] == ["gen", "experiments"]:
            path = Path(ROOT, *parts[1:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            found: object = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist_and_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for name in re.findall(r"`(gen(?:\.\w+)+)`", text):
        if name != "gen.kinds":  # an entry point group
            resolve(name)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_the_walks_and_words_are_of_this_code() -> None:
    """Each page names enough of it to be one."""
    for name, least in (("walk.md", 35), ("glossary.md", 30)):
        assert len(set(re.findall(r"`gen\.[\w.]+`", (ROOT / "docs" / name).read_text()))) >= least


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name in ("README.md", "first-hour.md", "own-experiment.md")],
    ids=lambda page: page.name,
)
def test_commands_parse(page: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    text = "".join(blocks).replace("\\\n", " ")
    prompt = r"^\$ " if "$ gen" in text else "^"
    lines = [shlex.split(line, comments=True) for line in re.findall(prompt + "gen (.*)$", text, flags=re.M)]
    assert len(lines) >= 8
    for line in lines:
        command = " ".join(line[:2]) if " ".join(line[:2]) in COMMANDS else line[0]
        assert parse(command, line[len(command.split()) :]) is not None
