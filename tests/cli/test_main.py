"""The command line's shell: help, suggestions, one-line errors, statuses; nothing here needs jax."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gen import cli
from gen.cli import COMMANDS, main, split_overrides
from gen.errors import GenError
from gen.experiments import presets


def error_of(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """Runs a command line that must fail, and gives its one line."""
    assert main(args) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("sampel", "runs/x"), "unknown command 'sampel'; did you mean 'sample'?"),
        (("sample", "runs/x", "--outt", "a"), "unknown flag '--outt'; did you mean '--out'?"),
        (("sample", "runs/x", "--cfg-scal", "2"), "unknown flag '--cfg-scal'; did you mean '--cfg-scale'?"),
        (("sample", "runs/x", "--guidance", "2"), "unknown flag '--guidance'; it is called --cfg-scale"),
        (("sample", "runs/x", "--clas", "1"), "unknown flag '--clas'; did you mean '--class'?"),
        (("train", "x", "--form", "runs/y"), "unknown flag '--form'; did you mean '--from'?"),
        (("reconstruct", "runs/x", "--out", "grid.png"), "--out grid.png: reconstructions are written as arrays"),
        (("train", "x", "--monitr", "y"), "unknown flag '--monitr'; did you mean '--monitor'?"),
        (("sample", "runs/x", "y"), "unexpected argument 'y'"),
        (("sample",), "missing from gen sample"),
        (
            ("data", "convert", "a", "--out", "b.zip"),
            "OUT is given without a flag: gen data convert SOURCE OUT; leave out --out",
        ),
        (("train", "dit-xl2"), "preset 'dit-xl2' needs training data; add --data DATA"),
        (("sample", "runs/x", "--steps", "many"), "error parsing --steps: 'many' is not INT; see gen sample --help"),
        (("sample", "runs/x", "--weights", "emo"), "invalid choice 'emo' for argument '--weights'"),
        (("sample", "runs/x", "--sampler.steps"), "--sampler.steps lacks its value; write --sampler.steps VALUE"),
        (("list", "solvr"), "nothing is called 'solvr'; did you mean 'solver'?"),
        (("list", "--engine.seed", "1"), "unknown flag '--engine.seed'"),
    ],
)
def test_bad_command_lines_end_in_one_line(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], expected: str
) -> None:
    assert expected in error_of(capsys, *args)


def test_nothing_runs_before_all_flags_are_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error_of(capsys, "demo", "--outdir", str(tmp_path / "x"), "--smok")
    assert not (tmp_path / "x").exists()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_by_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"\n  gen {command}" in out
    assert "Args:" not in out
    assert "--module FILE" in out
    assert not re.search(r" (PATH|STR|INT|FLOAT|None)\b", out)
    assert len(re.findall(r"[\w'.:|-]*\w", out)) <= 480  # a help is read on one screen or two


def test_a_group_of_commands_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for args, status in ((["data", "--help"], 0), (["data"], 2)):
        assert main(args) == status
        shown = capsys.readouterr().out
        assert [name for name in COMMANDS if f"  {name} " in shown] == ["data convert", "data inspect", "data split"]
    assert main(["data", "inspct"]) == 2
    assert "unknown command 'data inspct'; did you mean 'data inspect'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_interruption_has_its_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", lambda *_: interrupted)
    assert "goes on where it stopped" in error_of(capsys, "list", status=130)


def test_help_and_list_import_no_jax() -> None:
    lines = "\n".join(f"    main([{name!r}, '--help'])" for name in COMMANDS)
    code = (
        "import sys, io, contextlib, gen\nfrom gen.cli import main\nwith contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main(['--help']); main(['list'])\n{lines}\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_installed_command_reports_bad_input_without_a_traceback() -> None:
    command = [Path(sys.executable).parent / "gen", "train", "demmo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown preset 'demmo'; ")
    assert result.stderr.count("\n") == 1


def test_overrides_are_separated_from_flags() -> None:
    args = ["p", "--stages.0.steps", "5", "--batch", "2", "--engine.seed=7", "--out", "a.b"]
    rest, overrides = split_overrides(args)
    assert rest == ["p", "--batch", "2", "--out", "a.b"]
    assert overrides == (("stages.0.steps", "5"), ("engine.seed", "7"))


def test_the_preset_table_is_the_python_table() -> None:
    import importlib

    found = presets()
    assert found
    for module in {preset.module for preset in found.values()}:
        table = importlib.import_module(module).PRESETS
        assert {name: f.__name__ for name, f in table.items()} == {
            p.name: p.function for p in found.values() if p.module == module
        }
    assert all(preset.line for preset in found.values()), "each preset function needs a docstring"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PRESETS = make()", "PRESETS must be a literal"),
        ("PRESETS = {'a': lambda: 1}", "PRESETS must be a literal"),
        ("def a(depth):\n    'x'\nPRESETS = {'a': a}", "preset input 'depth' of a; expected teacher"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "paper.py").write_text(text)
    with pytest.raises(GenError, match=message):
        presets(tmp_path)


def test_a_table_is_read_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "paper.py").write_text(
        "raise RuntimeError\ndef a(teacher, *, data=None):\n    '''First line.\n\n    More.'''\n"
        "PRESETS: dict = {'p-a': a}"
    )
    preset = presets(tmp_path)["p-a"]
    assert (preset.line, preset.required, preset.optional) == ("First line.", ("teacher",), ("data",))


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("def a():\n    'x'\nPRESETS = {'p': a}")
    with pytest.raises(GenError, match="preset 'p' stands in"):
        presets(tmp_path)


def test_distillation_takes_the_flags_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from gen.cli import train

    given: list[train.Training] = []
    monkeypatch.setattr(train, "_train", lambda preset, inputs, outdir, training, *rest: given.append(training))
    flags = ("--batch-gpu", "4", "--monitor", "real.npz", "--monitor-every", "5", "--dry-run")
    assert main(["distill", "demo-student", "--teacher", "runs/t", *flags]) == 0
    assert given == [train.Training(batch_gpu=4, monitor="real.npz", monitor_every=5, dry_run=True)]
