"""``benchmarks/gpu.sh`` at toy sizes, where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_part_runs_and_none_twice(tmp_path: Path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--toy", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=7200)

    first = run("--parts", "device,sampling")
    assert first.returncode == 0, first.stderr
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["device", "sampling", "training", "steps", "inception", "evaluation", "parity"]
    assert "device: " not in done.stdout  # it was there
    for step in found["steps"].values():
        assert step["finite"]
        assert step["seconds"] > 0
        assert step["bytes_compiler"] > 0
    assert found["evaluation"]["images"] == 16
    assert "| evaluation  | images 16, " in (tmp_path / "gpu.md").read_text()
