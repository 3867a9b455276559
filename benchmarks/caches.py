"""Whether reading a cache of encoded images keeps up with the trainer.

    python benchmarks/caches.py [--rows 20000] [--batch 256]

For caches of latents (VA-VAE's 16 x 16 x 32 float32), tokens (TiTok's 128) and bits (Instella's 128 x 64), with their
mirror images and without: batches per second of the loader alone, the processor time that a batch costs, and how many
rows per second that feeds, as a ratio to what LightningDiT-XL/1 eats on one H200 at best: its forward pass is 119
billion multiply-adds an image, training three times that, at half of the chip's 989 TFLOP/s in bfloat16.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gen.data.caches import seal, seal_bits, seal_tokens

APPETITE = 0.5 * 989e12 / (3 * 2 * 119e9)  # images per second


def made(kind: str, folder: Path, rows: int, flips: bool) -> Any:
    """A sealed cache of random rows."""
    rng = np.random.default_rng(0)
    known = {"tokenizer": "random", "data": "random"}
    values: Any = {
        "latent": lambda: rng.standard_normal((rows, 16, 16, 32), np.float32),
        "tokens": lambda: rng.integers(0, 4096, (rows, 128), np.int32),
        "bits": lambda: rng.integers(0, 2, (rows, 128, 64), np.uint8),
    }[kind]
    folder.mkdir()
    for name in (kind, f"{kind}_flip") if flips else (kind,):
        np.save(folder / f"{name}.npy", values())
    np.save(folder / "label.npy", np.arange(rows, dtype=np.int32) % 1000)
    if kind == "tokens":
        return seal_tokens(folder, vocabulary=4096, **known)
    return (seal if kind == "latent" else seal_bits)(folder, **known)


def measured(cache: Any, batch: int, seconds: float) -> tuple[float, float]:
    """Batches per second, and processor seconds per batch."""
    stream = cache.batches(batch=batch, seed=0, start=0)
    for _ in range(20):
        next(stream)
    began, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        next(stream)
        count += 1
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    stream.close()
    return count / wall, cpu / count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    for kind in ("latent", "tokens", "bits"):
        for flips in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                rate, cpu = measured(made(kind, Path(folder) / "cache", args.rows, flips), args.batch, args.seconds)
            rows = args.batch * rate
            print(
                f"{kind:<7}{'with mirror images' if flips else '':<20}{rate:9.1f} batches/s, {1e3 * cpu:6.2f} ms of a "
                f"processor each; {rows:9.0f} rows/s = {rows / APPETITE:6.1f} x LightningDiT-XL/1 on an H200",
                flush=True,
            )


if __name__ == "__main__":
    main()
