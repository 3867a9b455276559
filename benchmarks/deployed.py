"""How fast an export starts: from a fresh Python process to the first image, and what of it is jax's import.

    gen export runs/demo/student --out student/
    python -m benchmarks.deployed student/

Each round starts a process that imports jax and then the folder's load.py, and makes an image twice; nothing of gen is
imported. Seconds by the clock, which begins before the interpreter starts, and of CPU time: those of the first round,
which compiles, and medians of the others, which find the compiled program.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STAGES = ("interpreter", "import jax", "read the program", "first image", "next image")
CODE = """
import sys, time
marks = [(time.time(), time.process_time())]
import jax, jax.export
marks.append((time.time(), time.process_time()))
import load
marks.append((time.time(), time.process_time()))
load.sample([7], [3])
marks.append((time.time(), time.process_time()))
load.sample([8], [4])
marks.append((time.time(), time.process_time()))
assert "gen" not in sys.modules
print(*(value for mark in marks for value in mark))
"""


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    rounds = []
    with tempfile.TemporaryDirectory() as home:  # an empty cache of compiled programs
        for _ in range(1 + options.rounds):
            began = time.time()
            command, environment = [sys.executable, "-c", CODE], os.environ | {"HOME": home}
            said = subprocess.run(command, cwd=options.folder, env=environment, check=True, capture_output=True)
            marks = np.array(said.stdout.split(), float).reshape(-1, 2)
            rounds.append(np.diff(marks, axis=0, prepend=[[began, 0.0]]))
    rows = np.stack(rounds)  # (rounds, stages, clock and CPU)
    rows = np.concatenate([rows, rows[:, :-1].sum(axis=1, keepdims=True)], axis=1)
    shown = np.concatenate([rows[0], np.median(rows[1:], axis=0)], axis=1)
    print(f"{'':<22}" + "".join(f"{title:>12}" for title in ("first", "CPU", "later", "CPU")))
    for name, row in zip((*STAGES, "to the first image"), shown, strict=True):
        print(f"{name:<22}" + "".join(f"{value:>12.3f}" for value in row))


if __name__ == "__main__":
    main()
