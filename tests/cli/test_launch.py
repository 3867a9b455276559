"""Jobs of several processes: flags, the SLURM script, what each process sees."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gen
from gen.cli import main
from gen.cli.start import Job, start
from gen.errors import GenError
from gen.training.checkpoints import latest_step
from tests.cli.test_runs import write_run
from tests.processes import devices, ended, free_port

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
# what srun does, with two processes of this machine for two nodes; the scheduler's other command says what it was asked
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" & pids[i]=$!; done
worst=0
for pid in "${pids[@]}"; do wait "$pid"; s=$?; [ $s -gt $worst ] && worst=$s; done
exit $worst
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*"\n'


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(coordinator="a:1"), "a job is named by three flags"),
        (Job(processes=2, process=0), "a job is named by three flags"),
        (Job(coordinator="a", processes=2, process=0), "expected HOST:PORT"),
        (Job(coordinator="a:1", processes=2, process=2), "--process is 2 of 2; expected 0 to 1"),
    ],
)
def test_flags_that_name_no_job(job: Job, message: str) -> None:
    with pytest.raises(GenError, match=message):
        start(job)


def test_the_flags_reach_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--coordinator", "node0", "--processes", "2", "--process", "1"]) == 2
    assert "--coordinator is 'node0'; expected HOST:PORT" in capsys.readouterr().err


def test_the_page_and_the_script_name_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for command in ("train", "info", "doctor"):
        assert main([command, "--help"]) == 0
        known += capsys.readouterr().out
    text = "`".join((LAUNCH / name).read_text() for name in ("README.md", "slurm.sbatch"))
    used = {
        flag for line in re.findall(r"gen (?:train|info|doctor) [^`]*", text) for flag in re.findall("--[a-z-]+", line)
    }
    assert {"--multihost", "--coordinator", "--processes", "--process", "--outdir", "--data"} <= used
    for flag in used - {"--engine"}:  # settings by their path
        assert re.search(f"{flag}(?![a-z-])", known), flag


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_and_queues_again(tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program(bin_ / "srun", SRUN)
    program(bin_ / "scontrol", SCONTROL)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    path = os.pathsep.join([str(bin_), str(Path(sys.executable).parent), os.environ["PATH"]])
    flags = ["--stages.0.steps", "6", "--batch", "16", "--engine.preview_every", "0"]
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "dit-smoke", "--outdir", str(tmp_path / "run"), *flags]
    env = os.environ | slurm | {"PATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert latest_step(tmp_path / "run") == 6
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["images"] == 6 * 16

    program(bin_ / "srun", "#!/usr/bin/env bash\nexit 143\n")  # saved and left
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert again.stdout == f"scontrol requeue {os.getpid()}\n"
    program(bin_ / "srun", "#!/usr/bin/env bash\nexit 2\n")  # bad input: once is enough
    assert subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 2


@pytest.mark.slow
def test_doctor_shows_what_each_process_of_a_named_job_sees() -> None:
    port, started = free_port(), []
    for number in range(2):
        command = [Path(sys.executable).parent / "gen", "doctor", "--coordinator", f"127.0.0.1:{port}"]
        command += ["--processes", "2", "--process", str(number)]
        started.append(subprocess.Popen(command, env=os.environ | devices(2), stdout=subprocess.PIPE, text=True))
    (status, first), (other, second) = ended(*started)
    assert (status, other) == (0, 0)
    assert re.search(r"^process 0 on \S+: 2 x cpu, .*\n^process 1 on \S+: 2 x cpu, ", first, re.MULTILINE)
    assert "matmul over 4 device(s): ok" in first
    assert "process 0" not in second


def in_two_processes(*commands: list[object]) -> list[tuple[int, str, float]]:
    """(exit status, output, seconds) of ``gen`` with each of two commands, as the processes of one job."""
    port, began, running = free_port(), time.monotonic(), []
    for number, command in enumerate(commands):
        job = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", number]
        line = [Path(sys.executable).parent / "gen", *command, *job]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([str(word) for word in line], env=env, **pipes))
    return [(status, text, time.monotonic() - began) for status, text in ended(*running)]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["sample", "no-such-run"], "error: no-such-run is not a run folder"),  # found once both have joined
        pytest.param(
            ["sample", "x", "--sedes", "3"], "error: gen sample: unknown flag '--sedes'", marks=pytest.mark.slow
        ),
    ],
)
def test_bad_input_of_one_process_ends_all_with_its_line(wrong: list[object], line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny")
    good = ["sample", run, "--out", tmp_path / "out"]
    for status, text, seconds in in_two_processes(good, wrong):
        assert status == 2
        assert text.count(line) == 1
        assert text.count("\n") == 1, text
        assert seconds < 60  # a start included, on a busy machine; left alone they wait for 300
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.slow
def test_a_run_with_a_checkpoint_samples_trains_on_and_is_distilled_in_two_processes(tmp_path: Path) -> None:
    few = ["--stages.0.steps", "2", "--batch", "32", "--engine.quiet", "true"]
    assert main(["train", "demo-tokenizer", "--outdir", str(tmp_path / "tokenizer"), *few]) == 0
    assert main(["encode", str(tmp_path / "tokenizer"), "--data", "digits", "--out", str(tmp_path / "latents")]) == 0
    inputs = ["--tokenizer", tmp_path / "tokenizer", "--data", tmp_path / "latents"]
    train = ["train", "demo-teacher", *inputs, "--outdir", tmp_path / "teacher", *few]
    sample = ["sample", tmp_path / "teacher", "--seeds", "0-9", "--batch", "4", "--out", tmp_path / "x.npz"]
    pairs = ["--pairs", "32", *few[:2], "--batch", "16", *few[4:]]
    distill = ["distill", "kd-smoke", "--teacher", tmp_path / "teacher", "--outdir", tmp_path / "student", *pairs]
    evaluate = ["evaluate", tmp_path / "student", "--count", "32", "--batch", "16"]
    for command in (train, sample, distill, evaluate):
        assert [status for status, _, _ in in_two_processes(command, command)] == [0, 0]
    alone = tmp_path / "alone.npz"
    assert main([str(word) for word in [*sample[:-1], alone]]) == 0
    with np.load(tmp_path / "x.npz") as two, np.load(alone) as one:
        np.testing.assert_allclose(two["arr_0"].astype(int), one["arr_0"].astype(int), atol=1)
    assert gen.load(tmp_path / "student").step == 2
    assert (tmp_path / "student" / "scores.json").is_file()


def test_control_c_ends_with_130_while_images_are_made(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny")
    # what runs in the background of a shell is started with Ctrl-C ignored, and so is what it starts
    heard = "import signal, gen.cli; signal.signal(signal.SIGINT, signal.default_int_handler); gen.cli.main()"
    command = [sys.executable, "-c", heard, "sample", run, "--seeds", "0-99999", "--out", tmp_path / "out"]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while process.poll() is None and not any((tmp_path / "out").glob("*.png")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    ((status, said),) = ended(process)
    assert status == 130
    assert said.endswith("interrupted; the same command again goes on where it stopped\n")
