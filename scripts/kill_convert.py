"""Kills `gen data convert` at random moments, again and again, and compares the bytes with an undisturbed run.

python scripts/kill_convert.py --kills 20
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def photographs(path: Path, count: int) -> None:
    """A zip of JPEG files."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
            with archive.open(f"{i:05d}.jpg", "w") as file:
                coarse.resize((240, 200), Image.Resampling.BICUBIC).save(file, "JPEG")


def content(path: Path) -> list[bytes]:
    """The bytes of a file, or of the files of a folder in order."""
    return [p.read_bytes() for p in sorted(path.iterdir())] if path.is_dir() else [path.read_bytes()]


def main() -> int:
    """Status 1 when the bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.zip"
        photographs(source, args.images)
        for name in ("out.zip", "shards"):

            def command(out: Path) -> list[str]:
                options = ["--size", "128", "--shard", "256"]
                gen = str(Path(sys.executable).absolute().with_name("gen"))
                return [gen, "data", "convert", str(source), str(out), *options]

            whole, hurt = Path(folder) / "whole" / name, Path(folder) / "hurt" / name
            began = time.monotonic()
            subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
            duration = time.monotonic() - began
            kills = 0
            while not hurt.exists():
                # A run must get on, or it is killed for ever: at times it may have most of an undisturbed run.
                limit = rng.uniform(0.1, 1) * duration if kills < args.kills else None
                process = subprocess.Popen(command(hurt), stdout=subprocess.DEVNULL)
                try:
                    if process.wait(limit):
                        print(f"{name}: ended with {process.returncode} after {kills} kills")
                        return 1
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
            same = content(hurt) == content(whole)
            different += not same
            print(f"{name}: {kills} kills, {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
