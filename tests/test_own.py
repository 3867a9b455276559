"""A user's own files: found by path, recorded by hash, refused in one line where something is wrong."""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import config, kinds, own
from gen.cli import main
from gen.cli.opening import prepare
from gen.cli.train import check_decoded
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.experiments import find
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, integrate
from gen.training.checks import check_run
from gen.training.run import RunConfig, load_config, settle_config
from tests.conformance.tokenizers import Patches

DOCS = Path(__file__).parents[1] / "docs"
SOLVER = """
import dataclasses
from gen.kinds import KINDS

@dataclasses.dataclass(frozen=True)
class Mine:
    strength: float = 1.0

KINDS["solver"]["mine"] = f"{__name__}:Mine"
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has met no own file."""
    before = {family: dict(rows) for family, rows in kinds.KINDS.items()}
    monkeypatch.setattr(own, "_imported", {})
    monkeypatch.setattr(own, "_accepted", set())
    yield
    forget(before)


def forget(rows: dict[str, dict[str, str]] | None = None) -> None:
    """What a new process knows: nothing of own files."""
    own._imported.clear()
    own._accepted.clear()
    if rows is None:
        rows = {f: {k: t for k, t in r.items() if not t.startswith("gen_own_")} for f, r in kinds.KINDS.items()}
    kinds.KINDS.clear()
    kinds.KINDS.update(rows)


def code(page: str) -> str:
    (found,) = codes(page)
    return found


def codes(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs a command line that must fail; gives its one line."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose sampler's solver is a class of mysolver.py, left by another process."""
    file = tmp_path / "mysolver.py"
    file.write_text(SOLVER)
    module = own.import_file(file)
    out = tmp_path / "run"
    settle_config(RunConfig("mine", sampler=module.Mine(2.0)), out, write=True)
    forget()
    return out


def test_the_pages_files_train_from_anywhere_and_are_sampled_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").mkdir()
    experiment, method = tmp_path / "files" / "myexp.py", tmp_path / "files" / "mymethod.py"
    experiment.write_text(code("own-experiment.md"))
    method.write_text(code("own-method.md"))
    assert len(code("own-method.md").splitlines()) <= 66
    monkeypatch.chdir(tmp_path)
    assert main(["list", "files/myexp.py"]) == 0
    shown = capsys.readouterr().out
    assert "files/myexp.py:my-flow" in shown
    assert re.search("backbone +wide +WideConfig", shown)
    (tmp_path / "mysolver.py").write_text(SOLVER)
    assert main(["list", "mysolver.py"]) == 0
    assert re.search("solver +mine +Mine", capsys.readouterr().out)
    assert not own._imported
    quick = ["--steps", "2", "--batch", "16", "--engine.quiet", "true"]
    assert main(["train", "files/myexp.py", *quick]) == 0
    assert main(["train", "files/mymethod.py:contrastive", "--outdir", "runs/method", *quick]) == 0
    (row,) = json.loads((tmp_path / "runs" / "my-flow" / "modules.json").read_text())
    assert (row["file"], row["kinds"]) == (str(experiment), ["wide"])
    assert gen.load("runs/method").params.keys() == {"net"}
    monkeypatch.chdir(tmp_path / "files")
    fresh = f"""if True:
        import sys
        from pathlib import Path
        from gen.cli import main
        file, run = Path({str(experiment)!r}), {str(tmp_path / "runs" / "my-flow")!r}
        text = file.read_text()
        file.write_text(text + "# edited")
        assert main(["sample", run, "--seeds", "0,1", "--out", "x.npz"]) == 2
        file.write_text(text)
        assert main(["sample", run, "--seeds", "0,1", "--out", "x.npz"]) == 0
    """
    done = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert f"another version of {experiment}" in lines[0]
    assert f"--module {experiment}" in lines[0]
    assert lines[1].endswith(f"has own kinds (wide): importing {experiment}")
    assert Path("x.npz").exists()


def test_the_pages_solver_and_distiller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"myexp.py": code("own-experiment.md")}
    files |= dict(zip(("mysolver.py", "mystudent.py"), codes("own-solver-and-student.md"), strict=True))
    for name, text in files.items():
        Path(name).write_text(text)
    quick = ["--steps", "2", "--batch", "16", "--engine.quiet", "true"]
    assert main(["train", "./myexp.py", "--outdir", "mine", *quick]) == 0
    few, own_solver = ["--seeds", "0-1", "--out", "x.npz"], ["--solver", "ralston", "--module", "./mysolver.py"]
    assert main(["sample", "mine", *few, *own_solver, "--steps", "3"]) == 0
    assert "6 network calls per image" in capsys.readouterr().out
    x = np.array([1.0, 2.0])  # x' = x on x: exp(h) to second order
    solver, grid = own.import_file("mysolver.py").Ralston(), Grid(np.array([1.0, 0.9]), Linear())
    found = integrate(solver, Problem(lambda x, t, c, i, carry: (Slope(x), carry), jnp.asarray(x), grid, None, {}))
    np.testing.assert_allclose(found, x * (1.0 - 0.1 + 0.005), rtol=1e-6)
    assert main(["distill", "./mystudent.py", "--teacher", "mine", "--outdir", "student", *quick]) == 0
    assert main(["sample", "student", "--seeds", "0-1", "--out", "y.npz"]) == 0
    assert "1 network call per image" in capsys.readouterr().out


def test_what_a_student_cannot_be_sampled_without_is_said_before_it_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A teacher of latents has a tokenizer; its student needs the configuration and the arrays."""
    config = prepare("dit-smoke", {}, ()).config
    tokenized = dataclasses.replace(config, tokenizer=Patches())
    monkeypatch.setattr("gen.runs.read_config", lambda path: tokenized)
    with pytest.raises(GenError, match="makes latents and no images: its teacher t has a tokenizer"):
        check_decoded(config, Path("t"))
    with pytest.raises(GenError, match=r"samples with 'tokenizer' and has no arrays of it"):
        check_run(tokenized, {})


class Slope(NamedTuple):
    velocity: jax.Array


def test_a_run_is_read_with_the_file_that_made_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(run).sampler.strength == 2.0
    assert "importing" in capsys.readouterr().err
    assert load_config(run).sampler.strength == 2.0
    assert capsys.readouterr().err == ""


def test_a_changed_file_is_refused_until_it_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "mysolver.py"
    file.write_text(SOLVER + "raise RuntimeError('executed')")
    with pytest.raises(GenError, match=r"another version of .*mysolver.py .* --module"):
        load_config(run)
    file.write_text(SOLVER + "\n# better\n")
    own.import_file(file)  # a preset of the same file was named: that says nothing of this run
    with pytest.raises(GenError, match="another version of"):
        load_config(run)
    assert "another version of" in refused(capsys, "info", run)
    own.accept(file)
    own.write_record(run, own.record(load_config(run)))  # as a resumed run does: it goes on with this file
    forget()
    assert load_config(run).sampler.strength == 2.0


def test_a_file_that_is_gone_or_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.move(tmp_path / "mysolver.py", tmp_path / "elsewhere.py")
    assert "that file is gone; put it back, or say where it is now with --module FILE" in refused(capsys, "info", run)
    own.accept(moved)
    assert load_config(run).sampler.strength == 2.0


def test_a_run_folder_that_brings_its_own_code_is_not_trusted(run: Path) -> None:
    shutil.move(run.parent / "mysolver.py", run / "mysolver.py")
    (row,) = own.recorded(run)
    (run / "modules.json").write_text(json.dumps([row | {"file": str(run / "mysolver.py")}]))
    with pytest.raises(GenError, match="came with the run folder itself"):
        load_config(run)
    (run / "modules.json").write_text("[3]")
    with pytest.raises(GenError, match=r"modules.json is damaged"):
        load_config(run)


def test_two_files_of_one_name_do_not_collide(tmp_path: Path) -> None:
    modules = []
    for kind in ("first", "second"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "net.py").write_text(SOLVER.replace('"mine"', f'"{kind}"'))
        modules.append(own.import_file(tmp_path / kind / "net.py"))
    assert config.config_class("first") is modules[0].Mine
    assert config.config_class("second") is modules[1].Mine
    assert config.kind_of(modules[1].Mine) == "second"
    assert own.import_file(tmp_path / "first" / "net.py") is modules[0]


def test_a_file_that_imports_another_records_both(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("DEFAULT = 3.0\n")
    beside = "from pathlib import Path\nfrom gen.own import import_file\n"
    beside += 'base = import_file(Path(__file__).with_name("base.py"))\n'
    (tmp_path / "net.py").write_text(beside + SOLVER.replace("1.0", "base.DEFAULT"))
    module = own.import_file(tmp_path / "net.py")
    settle_config(RunConfig("mine", sampler=module.Mine()), tmp_path / "run", write=True)
    (row,) = own.recorded(tmp_path / "run")
    assert list(row["uses"]) == [str(tmp_path / "base.py")]
    forget()
    (tmp_path / "base.py").write_text("DEFAULT = 4.0\n")
    with pytest.raises(GenError, match=r"another version of .*base.py .* --module .*net.py"):
        load_config(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (1,\n", "mine.py, line 1 is not Python"),
        ("import gen\n\nvalue = {}['key']\n", "mine.py, line 3: KeyError: 'key'"),
        ("import helper\n", "helper.py lies beside the file: import it by gen.own.import_file"),
        (SOLVER.replace('["mine"]', '["euler"]'), "the kind 'euler' is gen.sampling.solvers:Euler already"),
        (SOLVER.replace("{__name__}", "mine"), "points at mine:Mine, which is not in this file"),
        (SOLVER.replace(":Mine", ":Main"), "is no frozen dataclass 'Main' of this file"),
        (SOLVER.replace("frozen=True", "frozen=False"), "is no frozen dataclass 'Mine' of this file"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "helper.py").write_text("")
    before = config.kinds()
    assert message in refused(capsys, "list", "--module", tmp_path / "mine.py")
    assert config.kinds() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mypaper.py:flow", "did you mean"),
        ("paper.py:flaw", "paper.py has no preset 'flaw'; did you mean 'flow'?"),
        ("paper.py", "has several presets; give one: "),
        ("empty.py", "empty.py has no presets; end it with PRESETS = "),
        ("broken.py:flow", "broken.py, line 2 is not Python"),
        ("paper.py:flow", "paper.py, line 3: ZeroDivisionError: division by zero"),
        ("paper.py:other", "gives a int; expected a Recipe"),
        ("nowhere/at.py", "there is no file"),
    ],
)
def test_a_preset_that_cannot_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("\ndef f(:\n")
    (tmp_path / "paper.py").write_text(
        "def flow():\n    '''One.'''\n    return 1 / 0\n\ndef other():\n    '''Two.'''\n    return 3\n\n"
        "PRESETS = {'flow': flow, 'other': other}\n"
    )
    assert message in refused(capsys, "info", tmp_path / name)


def test_an_error_in_a_network_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = code("own-experiment.md").replace("self.enter(call.x.reshape(len(call.x), -1))", "self.entre(call.x)")
    (tmp_path / "myexp.py").write_text(text)
    line = text[: text.index("self.entre")].count("\n") + 1
    message = refused(capsys, "train", tmp_path / "myexp.py", "--dry-run")
    assert f"error: {tmp_path}/myexp.py, line {line}: AttributeError: 'Wide' object has no attribute 'entre'" in message


def test_a_class_without_a_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SOLVER.rpartition("KINDS")[0])
    module = own.import_file(tmp_path / "net.py")
    with pytest.raises(GenError, match=r"Mine of .*net.py has no kind; add a line to the file"):
        own.record(RunConfig("mine", sampler=module.Mine()))
    student = re.sub(r"^KINDS.*\n", "", codes("own-solver-and-student.md")[1], flags=re.M)
    (tmp_path / "student.py").write_text(student)
    task = own.import_file(tmp_path / "student.py").HalvesTask(teacher=None)
    with pytest.raises(GenError, match=r'has no kind; add .* KINDS\["task"\]\["halvestask"\]'):
        own.record(RunConfig("mine", sampler=task))


def test_a_bare_file_with_one_preset_is_enough(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def flow(data):\n    '''One.'''\n\nPRESETS = {'my-flow': flow}\n")
    preset = find(f"{tmp_path}/one.py")
    assert (preset.name, preset.required, preset) == ("my-flow", ("data",), find(f"{tmp_path}/one.py:my-flow"))


def test_installed_packages_add_kinds_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(*names: str) -> None:
        config.installed.cache_clear()
        found = [importlib.metadata.EntryPoint(name, "fractions:Fraction", "gen.kinds") for name in names]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)

    try:
        points("solver.packaged")
        assert config.members("solver")["packaged"] == "fractions:Fraction"
        assert config.config_class("packaged").__name__ == "Fraction"
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert main(["list", "solver"]) == 0
        assert "packaged" in shown.getvalue()
        points("solvr.packaged")
        with pytest.raises(GenError, match=r"is not called FAMILY.KIND; did you mean 'solver'"):
            config.kinds()
        points("solver.euler")
        with pytest.raises(GenError, match="gives the kind 'euler' a second meaning"):
            config.kinds()
    finally:
        monkeypatch.undo()
        config.installed.cache_clear()
