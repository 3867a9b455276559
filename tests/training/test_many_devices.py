"""The demo's teacher on 1, 2, 4 and 8 simulated devices, and on two processes of four: the same training."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gen.training.logging import read_metrics
from tests.training import devices_job

ROOT = Path(__file__).parents[2]


def job(folder: Path, devices: int, processes: int = 1) -> Path:
    """Runs the job on so many devices in each of so many processes; returns its folder."""
    out = folder / f"{processes}x{devices}"
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    started = []
    for number in range(processes):
        command = [sys.executable, "-m", "tests.training.devices_job", folder, out, number, processes, port]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | flags, **pipes))
    said = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
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
