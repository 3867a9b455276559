"""Kills a smoke demo with SIGKILL at random moments, lets it end, and compares it with an undisturbed one.

    python scripts/kill_demo.py --kills 20

Checkpoints, caches, samples and scores must be equal to the last bit. Prints what differs; exits with 1 then.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import gen

_VOLATILE = {"seconds", "versions"}  # of a result: wall time


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A smoke demo in a process of its own, in ``folder/demo``; paths are relative, for run folders record them."""
    folder.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).absolute().with_name("gen")), "demo", "--smoke", "--outdir", "demo"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end and raises RuntimeError for a demo that failed by itself."""
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the demo ended with {process.returncode}: {errors.decode()[-2000:]}")


def disturbed(folder: Path, kills: int, span: float, rng: random.Random) -> list[float]:
    """Runs a demo that is killed `kills` times, each time within half of `span` seconds; gives the moments."""
    moments = []
    for _ in range(kills):
        process = start(folder)
        moment = rng.uniform(0.0, span / 2)
        try:
            process.communicate(timeout=moment)
            break  # it was done before
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            moments.append(moment)
    finish(start(folder))
    return moments


def differences(a: Path, b: Path) -> list[str]:
    """What is not equal to the last bit in two finished demos."""
    found = []
    for run in ("tokenizer", "teacher", "student"):
        one, two = (gen.load(folder / run).params for folder in (a, b))
        found += [f"{run} weights" for x, y in _pairs(one, two) if not np.array_equal(x, y)][:1]
    one, two = (gen.load(folder / "student").sample(range(64)) for folder in (a, b))
    found += ["samples"] if not np.array_equal(one, two) else []
    for cache in ("latents", "pairs"):
        for file in sorted((a / cache).glob("*")):
            if file.read_bytes() != (b / cache / file.name).read_bytes():
                found.append(f"{cache}/{file.name}")
    for file in sorted((a / "scores").glob("*.json")):
        one, two = (json.loads((f / "scores" / file.name).read_text()) for f in (a, b))
        found += [f"scores/{file.name}: {k}" for k in one if k not in _VOLATILE and one[k] != two[k]]
    found += [str(path) for folder in (a, b) for path in folder.rglob("*.partial")]
    return found


def _pairs(a: object, b: object) -> list[tuple[np.ndarray, np.ndarray]]:
    import jax

    return list(zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True))


def check(kills: int, seed: int, folder: Path) -> list[str]:
    """One undisturbed and one disturbed smoke demo under `folder`; gives the differences."""
    finish(start(folder / "warm"))  # fills the compile cache, so that the kills fall into the work itself
    began = time.monotonic()
    finish(start(folder / "whole"))
    span = time.monotonic() - began
    moments = disturbed(folder / "killed", kills, span, random.Random(seed))
    print(f"undisturbed {span:.0f} s; killed after {', '.join(f'{m:.1f}' for m in moments)} s")
    return differences(folder / "whole" / "demo", folder / "killed" / "demo")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = check(args.kills, args.seed, Path(folder))
    print("different: " + "; ".join(found) if found else "equal to the last bit")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
