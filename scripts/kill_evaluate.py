"""Kills an evaluation with SIGKILL at random moments until it is through, and compares it with an undisturbed one.

    python scripts/kill_evaluate.py --kills 20

A small untrained generator of 8x8 digits is scored by ``gen evaluate`` against the embedded digits. The scores must be
equal to the last bit, and nothing half-written may be left. Prints what differs; exits with 1 then.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from gen import arrays
from gen.config import to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.nn.network import Network
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.solvers import Euler
from gen.training.run import RunConfig
from gen.training.task import Model

COUNT, BATCH = 30_000, 256  # several partial results: one at most every `onepass._SAVE_SECONDS`
# the command, with partial results kept after every flush, so that kills fall between them
COMMAND = (
    "from gen.metrics import onepass; onepass._SAVE_SECONDS = 0; from gen.cli import main; raise SystemExit(main())"
)


def write_run(folder: Path) -> None:
    """A run folder of a generator whose weights are random."""
    network = DiTConfig(size=(8, 8), channels=1, patch=4, width=32, depth=2, heads=2, num_classes=10)
    sampler = Sampler(Euler(), Uniform(), steps=4)
    generator = DiffusionGenerator(Denoiser(network, Linear(), Predict("velocity")), sampler)
    rng = np.random.default_rng(0)
    params = Network(network).init(jax.random.key(0))
    params = jax.tree.map(lambda a: np.float32(a + 0.1 * rng.standard_normal(a.shape)), params)
    arrays.save(folder / "artifacts" / "net.safetensors", params)
    (folder / "config.json").write_text(
        json.dumps(to_json(RunConfig("tiny", models={"net": Model(generator.denoiser)}, sampler=sampler)))
    )


def start(folder: Path, count: int) -> subprocess.Popen[bytes]:
    """An evaluation in a process of its own."""
    arguments = ["evaluate", "run", "--count", str(count), "--batch", str(BATCH), "--out", "scores.json"]
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end and raises RuntimeError for an evaluation that failed by itself."""
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the evaluation ended with {process.returncode}: {errors.decode()[-2000:]}")


def disturbed(folder: Path, count: int, kills: int, span: float, rng: random.Random) -> list[tuple[float, bool]]:
    """Evaluates with at most `kills` kills: (moment, whether partial results lay there) of each."""
    moments: list[tuple[float, bool]] = []
    while len(moments) < kills:
        process, moment = start(folder, count), rng.uniform(0.2, 1.0) * span
        try:
            process.communicate(timeout=moment)
            return moments  # it was done before
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            moments.append((moment, (folder / "scores.json.partial.npz").exists()))
    finish(start(folder, count))
    return moments


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal to the last bit in two finished evaluations, and what is left over."""
    one, two = (json.loads((folder / "scores.json").read_text()) for folder in (a, b))
    found = [key for key in one if key not in ("seconds", "versions") and one[key] != two[key]]
    return found + [str(path) for folder in (a, b) for path in folder.glob("*partial*")]


def check(kills: int, seed: int, folder: Path, count: int = COUNT) -> tuple[list[str], list[tuple[float, bool]]]:
    """Evaluations under `folder`, one undisturbed and as many disturbed ones as `kills` kills take.

    Gives the differences, and (moment in seconds, whether partial results lay there) of every kill.
    """
    for name in ("warm", "whole"):
        write_run(folder / name / "run")
    finish(start(folder / "warm", count))  # fills the compile cache, so that the kills fall into the work itself
    began = time.monotonic()
    finish(start(folder / "whole", count))
    span = time.monotonic() - began
    rng, moments, found = random.Random(seed), list[tuple[float, bool]](), list[str]()
    while len(moments) < kills:
        killed = folder / f"killed{len(moments)}"
        write_run(killed / "run")
        moments += disturbed(killed, count, kills - len(moments), span, rng)
        found += differences(folder / "whole", killed)
    told = ", ".join(f"{moment:.1f}{'' if held else ' (nothing saved yet)'}" for moment, held in moments)
    print(f"undisturbed {span:.0f} s; killed after {told} s")
    return found, moments


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, _ = check(args.kills, args.seed, Path(folder), args.count)
    print("different: " + "; ".join(found) if found else "equal to the last bit")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
