"""How fast an export starts: from a fresh Python process to the first image, and what of it is jax's import.

    gen export runs/demo/student --out student/
    python -m benchmarks.deployed student/

Each round starts a process that imports jax and then the folder's load.py, and makes an image twice; the last row adds
the interpreter's own start and end. Nothing is kept between rounds. Medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CODE = """
import time
began = time.perf_counter()
import jax, jax.export
imported = time.perf_counter()
import load
read = time.perf_counter()
load.sample([7], [3])
first = time.perf_counter()
load.sample([8], [4])
second = time.perf_counter()
import json
print(json.dumps({
    "import jax": imported - began, "read the program": read - imported, "first image, compiled": first - read,
    "next image": second - first,
}))
"""


def main(arguments: list[str] | None = None) -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    rows = []
    for _ in range(options.rounds):
        began = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", CODE], cwd=options.folder, check=True, capture_output=True)
        rows.append(json.loads(said.stdout) | {"the whole process": time.perf_counter() - began})
    for name in rows[0]:
        print(f"{name:<24}{statistics.median(row[name] for row in rows):>8.3f} s")


if __name__ == "__main__":
    main()
