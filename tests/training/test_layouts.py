"""What devices send one another in a training step, as the compiler cuts it over eight simulated ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import devices

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("preset", "mesh"),
    [
        ("dit-smoke", "data=2,fsdp=4"),
        pytest.param("lightningdit-smoke", "data=1,fsdp=8", marks=pytest.mark.slow),
        pytest.param("edm2-smoke", "data=1,fsdp=8", marks=pytest.mark.slow),
        pytest.param("edm-smoke", "data=1,fsdp=8", marks=pytest.mark.slow),
    ],
)
def test_weights_are_gathered_whole_and_nothing_else_is_moved_about(preset: str, mesh: str) -> None:
    """Gathered weights, summed gradients; no array is cut along another axis on its way, no window is passed round."""
    command = [sys.executable, "-m", "tests.training.layouts_job", preset, mesh]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | devices(8), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert {"all-gather", "all-reduce"} <= set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}, found
