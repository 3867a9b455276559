"""Public docstrings are sentences: a reader on the first day need not guess the verb."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "gen"
# how a phrase begins that names a thing and says nothing of it: "The tokenizer.", "What is gathered.", "See `Solver`."
PHRASES = {"The", "A", "An", "What", "Whether", "How", "Number", "See", "Fingerprint"}
FILES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))]


def documented(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, bool, str]]:
    """(name, whether it is a function, docstring) of everything public; what has none is ruff's business."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or (node.name.startswith("_") and node.name[1] != "_"):
            continue
        text = ast.get_docstring(node)
        if text:
            yield prefix + node.name, isinstance(node, ast.FunctionDef), text
        if isinstance(node, ast.ClassDef):
            yield from documented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("file", FILES)
def test_docstrings_are_sentences(file: str) -> None:
    for name, is_function, text in documented(ast.parse((ROOT / file).read_text()).body):
        words = text.partition("\n\n")[0].split()
        assert len(words) >= 3, (name, text)
        assert any(word[-1] in ".:" for word in words), (name, text)
        assert not is_function or words[0] not in PHRASES, (name, text)
