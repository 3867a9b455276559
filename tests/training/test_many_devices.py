"""The same training on 1, 2, 4 and 8 simulated devices, on two processes of four, and moved from one to another."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gen.training.checkpoints import latest_step
from gen.training.logging import read_metrics
from gen.training.sharding import MeshConfig
from tests.processes import devices, ended, free_port
from tests.training import devices_job, scripts
from tests.training.conformance import run

ROOT = Path(__file__).parents[2]


def job(folder: Path, count: int, processes: int = 1) -> Path:
    """Runs the job on so many devices in each of so many processes; returns its folder."""
    out = folder / f"{processes}x{count}"
    out.mkdir()
    port, started = free_port(), []
    for number in range(processes):
        command = [sys.executable, "-m", "tests.training.devices_job", folder, out, number, processes, port]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | devices(count), **pipes))
    found = ended(*started, seconds=400)
    assert [status for status, _ in found] == [0] * processes, found
    return out


@pytest.mark.slow
def test_the_demo_teacher_trains_alike_on_any_devices_and_processes(tmp_path: Path) -> None:
    devices_job.prepare(tmp_path)
    one = job(tmp_path, 1)
    wanted = np.asarray([record["loss"] for record in read_metrics(one / "run")])
    assert len(wanted) == devices_job.STEPS
    with np.load(one / "0.npz") as file:
        batches = {name: file[name] for name in ("latent", "label", "image")}
    images = batches["image"][:, :, None]
    assert len(np.unique(images.reshape(-1, images[0, 0].size), axis=0)) > 40, "the images were augmented"
    for out in (one, job(tmp_path, 2), job(tmp_path, 4), job(tmp_path, 8), job(tmp_path, 4, processes=2)):
        losses = np.asarray([record["loss"] for record in read_metrics(out / "run")])
        np.testing.assert_allclose(losses, wanted, rtol=1e-5, err_msg=out.name)
        parts = [dict(np.load(path)) for path in sorted(out.glob("*.npz"))]
        for name, whole in batches.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis=1), whole)
        for part in parts:
            assert int(part["programs"]) == 1, "one program, compiled once"
            assert part["marks"][1] == part["marks"][-1], "something was compiled after the second step"


def go_on(outdir: str) -> None:
    """Steps 5 to 8 of the toy, everything cut over the devices there are."""
    task, data, frozen = scripts.build()
    mesh = MeshConfig(data=1, fsdp=jax.device_count(), shard_from=1)
    run(task, data, frozen, Path(outdir), batch=8, steps=12, stop_after=8, mesh=mesh)


@pytest.mark.slow
def test_a_run_moves_from_one_device_to_eight_and_back(tmp_path: Path) -> None:
    task, data, frozen = scripts.build()
    run(task, data, frozen, tmp_path / "moved", batch=8, steps=12, stop_after=4)
    script = "import sys; from tests.training.test_many_devices import go_on; go_on(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "moved")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | devices(8), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert latest_step(tmp_path / "moved") == 8
    moved = run(task, data, frozen, tmp_path / "moved", batch=8, steps=12)
    straight = run(task, data, frozen, tmp_path / "straight", batch=8, steps=12)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(straight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
