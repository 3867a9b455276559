import sys

import pytest

from gen.cli import COMMANDS, main
from gen.cli.tables import print_table
from tests.test_progress import Terminal

ROWS = [["a-name-that-must-be-typed-whole/" * 2, "two", "words " * 30], ["b", "three", "x" * 50]]


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_never_cut(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setattr(sys, "stdout", Terminal())
    print_table(["name", "number", "what"], ROWS, names=2)
    said = sys.stdout.getvalue() if terminal else capsys.readouterr().out  # type: ignore[attr-defined]
    lines = said.splitlines()
    assert any(ROWS[0][0] in line and " two" in line for line in lines)
    assert "…" not in said
    assert (len(lines) == 3) != terminal  # a pipe gets one line for each row
    assert said.count("words") == 30


@pytest.mark.parametrize("what", ["solver", "protocols", "measures", "presets"])
def test_lists_are_whole(what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list", what]) == 0
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_value_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert not {word for word in ("STR", "INT", "FLOAT", "{None}") if word in said}


def test_help_breaks_lines_where_the_terminal_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["evaluate", "--help"]) == 0
    assert "the reference's, or the first that takes the images and has its weights" in capsys.readouterr().out
