"""``gen sweep``, ``gen ema`` and ``gen search --what skips`` end to end on a small U-Net that was trained on digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen import cli
from gen.config import from_json
from gen.files import read_json
from gen.metrics.protocol import Result

COUNT = ["--count", "64", "--batch", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A short run of EDM's toy, with three kept checkpoints of two averages each."""
    folder = str(tmp_path_factory.mktemp("settings") / "run")
    averages = [{"kind": "ema-power", "std": std} for std in (0.05, 0.1)]
    kept = ["--stages.0.steps", "30", "--engine.checkpoint_every", "10", "--engine.keep_every", "10"]
    command = ["train", "edm-smoke", "--outdir", folder, "--stages.0.task.emas", json.dumps(averages), *kept]
    assert cli.main([*command, "--engine.quiet", "true"]) == 0
    return folder


def values(folder: Path) -> dict[str, float]:
    """The distances of a folder of scores, by file."""
    return {path.name: Result.load(path).values["frechet_distance"] for path in folder.glob("*.json")}


@pytest.mark.slow
def test_a_sweep_chooses_and_reports(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", run, "--steps", "2,4", "--solver", "euler,heun", "--out", str(tmp_path), *COUNT]
    assert cli.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("]")[0] for line in said[-5:-1]] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    assert said[-5].endswith("at 2 calls")  # Euler, two steps
    assert said[-1].startswith("best: steps ")
    first = values(tmp_path)
    assert len(first) == 5  # four settings, and the chosen one on other seeds
    chosen = Result.load(tmp_path / "chosen.json")
    assert chosen.protocol.seeds == "64-127"
    assert chosen.values["frechet_distance"] != min(value for name, value in first.items() if name != "chosen.json")
    assert (tmp_path / "sweep.html").read_text().count("<svg") == 2  # over steps, over calls
    assert cli.main([*command[:4], *command[6:], "--cfg-scale", "1.5"]) == 0  # further settings in the same folder
    assert "[1/2] steps 2, guidance 1.5: " in capsys.readouterr().out
    assert first.items() <= {**values(tmp_path), "chosen.json": first["chosen.json"]}.items()


@pytest.mark.slow
def test_widths_of_averages(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ema", run, "--sigma-rel", "0.05,0.15,0.25", "--out", str(tmp_path), *COUNT]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("best: ema ")
    assert len(set(values(tmp_path).values())) == 4
    assert (tmp_path / "ema.html").read_text().count("<svg") == 1  # the distance over the width


@pytest.mark.slow
def test_skips_are_tuned(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "skips.json")
    assert cli.main(["search", run, "--what", "skips", "--steps", "2", "--out", out, *COUNT]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("tuned ")
    held = read_json(out)
    ((name, rows),) = from_json(held["grid"], Any, out).controls
    assert (name, len(rows), held["about"]["scored"]) == ("skips", 2, 18)
    assert (rows[0][0], rows[0][-1]) == pytest.approx(held["about"]["bottom, top"])
    images = []
    for sampling in (["--grid", out], ["--steps", "2"]):
        file = str(tmp_path / f"{len(images)}.npz")
        assert cli.main(["sample", run, *sampling, "--seeds", "0-1", "--out", file]) == 0
        assert "3 network calls per image" in capsys.readouterr().out
        with np.load(file) as found:
            images.append(found["arr_0"])
    assert (images[0] == images[1]).all() == (held["about"]["bottom, top"] == [1.0, 1.0])
