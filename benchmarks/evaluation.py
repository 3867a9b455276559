"""What the one-pass evaluation costs beyond making samples and features, and how its memory grows with their number.

    python benchmarks/evaluation.py overhead [--pairs 7]
    python benchmarks/evaluation.py memory

Overhead: CPU time of `gen.metrics.onepass.collect` (moments, first 10,000 features, labels, accuracy) against a bare
loop over the same jitted generation, rounding and features whose results are only waited for, in interleaved pairs.
Memory: the most anonymous memory (RssAnon; mapped file pages can be dropped at any time and do not count) of a process
of its own that scores 10,000 and 100,000 samples, generated ones and those of an npz of 1.2 GB.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.data.stores import open_store
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.features.digits import DigitsExtractor
from gen.metrics.onepass import collect
from gen.metrics.sources import LABEL_RULES, QUANTISERS, ImageSet, from_store, generated
from gen.metrics.statistics import Accuracy, Statistic, basic_statistics
from gen.nn.network import Network
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Uniform
from gen.sampling.solvers import Euler
from gen.training.indexed import padded_block
from gen.training.program import enable_compile_cache

COUNT, BATCH = 6144, 256
SIDE = 64  # pixels of the stored images
SIZES = (10_000, 100_000)


def tiny_generator(count: int, steps: int = 4) -> ImageSet:
    """A DiT with random weights that makes 8x8 images."""
    network = DiTConfig(size=(8, 8), channels=1, patch=2, width=64, depth=4, heads=4, num_classes=10)
    generator = DiffusionGenerator(
        Denoiser(network, Linear(), Predict("velocity")), Sampler(Euler(), Uniform(), steps=steps)
    )
    params = {"net": Network(network).init(jax.random.key(0))}
    labels = LABEL_RULES["seed mod classes"](range(count), 10)
    return generated(generator, params, seeds=range(count), identity="tiny", labels=labels, rule="seed mod classes")


@dataclasses.dataclass(frozen=True)
class Projection:
    """An extractor that costs next to nothing: 64 random projections of an image."""

    name = "projection"
    image = (SIDE, SIDE, 3)
    resize = "none"
    precision = "float32-highest"
    outputs = ("features",)

    def load(self) -> Any:
        return np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, 64)).astype(np.float32) / SIDE

    def fingerprint(self) -> str:
        return "projection"

    def __call__(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"features": images.reshape(len(images), -1) @ params}


def gathered(limit: int = 10_000) -> dict[str, Statistic]:
    """What ``gen evaluate`` gathers with the digits extractor."""
    return basic_statistics(DigitsExtractor(), True, limit) | {"accuracy": Accuracy()}


def bare(source: ImageSet, params: Any, step: Callable[..., Any]) -> None:
    """Makes samples and features batch by batch."""
    pending = None
    for first in range(0, source.count, BATCH):
        made = step(source.arguments, params, padded_block(first, source.count, BATCH, None)[0])
        jax.block_until_ready(pending)  # one batch behind, as the job reads
        pending = made
    jax.block_until_ready(pending)


def overhead(pairs: int) -> None:
    """Prints CPU seconds of the job and of the bare loop, and the median of the pairs' ratios."""
    source, extractor = tiny_generator(COUNT), DigitsExtractor()
    source = dataclasses.replace(source, arguments=jax.device_put(source.arguments))
    params = extractor.load()

    @jax.jit
    def step(arguments: Any, params: Any, indices: jax.Array) -> Any:
        return extractor(params, QUANTISERS["round"](source.function(arguments, indices)["image"]))

    rows = []
    for _ in range(pairs + 1):  # the first compiles
        began = time.process_time()
        collect(source, extractor, gathered(), batch=BATCH)
        middle = time.process_time()
        bare(source, params, step)
        rows.append((middle - began, time.process_time() - middle))
    job, alone = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    ratio = statistics.median(a / b for a, b in rows[1:])
    print(f"{COUNT} samples: job {job:.2f} s, bare {alone:.2f} s of CPU time; overhead {100 * (ratio - 1):.1f} %")


def anonymous() -> float:
    """Anonymous memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def peak(kind: str, count: int) -> None:
    """Prints the most memory seen while scoring `count` samples."""
    enable_compile_cache()
    seen = [0.0]
    if kind == "generated":
        source: ImageSet = tiny_generator(count, steps=1)
        extractor: Any = DigitsExtractor()
    else:
        extractor = Projection()
        source = from_store(open_store(kind), extractor)
    kept = basic_statistics(extractor, source.labels != "none", 10_000)
    collect(
        source,
        extractor,
        kept,
        indices=range(count),
        batch=BATCH,
        progress=lambda done, total: seen.append(anonymous()),
    )
    print(f"{max(seen):.0f}")


def write_images(path: Path, count: int) -> None:
    """An npz of `count` images, as `numpy.savez` writes it, a block at a time."""
    rng = np.random.default_rng(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, SIDE, SIDE, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for first in range(0, count, 5000):
            member.write(rng.integers(0, 256, (min(5000, count - first), SIDE, SIDE, 3), dtype=np.uint8).tobytes())


def memory() -> None:
    """Prints the peaks of both kinds of samples at both sizes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        write_images(path, max(SIZES))
        for kind, name in (("generated", "generated"), (str(path), f"npz of {path.stat().st_size / 1e9:.1f} GB")):
            command = [sys.executable, __file__, "peak", "--kind", kind, "--count"]
            subprocess.run([*command, str(min(SIZES))], check=True, stdout=subprocess.DEVNULL)  # compiles
            peaks = [subprocess.run([*command, str(n)], check=True, capture_output=True, text=True) for n in SIZES]
            told = ", ".join(f"{n:,}: {p.stdout.split()[-1]} MB" for n, p in zip(SIZES, peaks, strict=True))
            print(f"{name}: {told}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "memory", "peak"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--kind", help="of peak: generated, or a path")
    parser.add_argument("--count", type=int, help="of peak: samples")
    args = parser.parse_args()
    if args.what == "overhead":
        overhead(args.pairs)
    elif args.what == "memory":
        memory()
    else:
        peak(args.kind, args.count)


if __name__ == "__main__":
    jnp.zeros(())  # starts the backend before anything is measured
    main()
