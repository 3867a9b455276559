"""What README shows runs."""

import re
from pathlib import Path

from gen.cli import COMMANDS

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_ten_lines_run(capsys):
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[0]
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(16, 8, 8, 1) made with 19 network calls each\n"


def test_every_command_is_in_the_table():
    assert not [name for name in COMMANDS if f"`gen {name}" not in TEXT]
