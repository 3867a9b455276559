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


def raising(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """(name, docstrings) of every public function and class that raises GenError by itself.

    What a class raises when it is made stands in its docstring; so may what its methods without one raise.
    """
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            own = ast.get_docstring(node) or ""
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or not refuses(method):
                    continue
                if method.name.startswith("_") and not method.name.endswith("__"):
                    continue
                text = ast.get_docstring(method) or own
                yield f"{node.name}.{method.name}", text + own * (method.name in ("__post_init__", "__init__"))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and refuses(node):
            yield node.name, ast.get_docstring(node) or ""


def refuses(node: ast.AST) -> bool:
    return any(
        isinstance(n, ast.Raise) and n.exc is not None and "GenError" in ast.unparse(n.exc) for n in ast.walk(node)
    )


# docstrings of gen.cli are what --help shows, where an error speaks for itself
LEFT_OUT = ("cli/",)


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(LEFT_OUT)])
def test_docstrings_say_what_is_raised(file: str) -> None:
    silent = [
        name
        for name, text in raising(ast.parse((ROOT / file).read_text()).body)
        if not any(word in text for word in ("aise", "efuse", "says", "GenError"))
    ]
    assert not silent
