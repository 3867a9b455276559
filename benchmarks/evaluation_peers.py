"""Evaluation beside pytorch-fid, torch-fidelity and clean-fid: features, PNG to features, Frechet distance.

One run compares all of them with the same random weights, in turns, one thread each; figures are CPU seconds, which a
busy machine disturbs less than wall time, and ratios are of neighbouring turns. Run it in the environment that
``make test-peers`` makes:

    OPENBLAS_NUM_THREADS=1 .venv-peers/bin/python benchmarks/evaluation_peers.py
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from PIL import Image

from gen.features.inception import Inception, conv_shapes
from gen.metrics import cleanfid
from gen.metrics.frechet import frechet_distance
from gen.pretrained.inception import fold

Task = Callable[[], Any]


def official() -> dict[str, np.ndarray]:
    """Random weights under the names of the .pth file."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.standard_normal((1008, 2048)) / 45, "fc.bias": np.zeros(1008)}
    for layer, (channels, out, height, width) in conv_shapes().items():
        path, scale = layer.replace("/", "."), np.sqrt(2 / (channels * height * width))
        weights[f"{path}.conv.weight"] = rng.standard_normal((out, channels, height, width)) * scale
        weights |= {f"{path}.bn.{name}": np.ones(out) for name in ("weight", "running_var")}
        weights |= {f"{path}.bn.{name}": np.zeros(out) for name in ("bias", "running_mean")}
    return {name: array.astype(np.float32) for name, array in weights.items()}


def in_turns(tasks: dict[str, Task], rounds: int, idle: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each task in each round, after `idle` rounds that do not count."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for count in range(rounds + idle):
        for name, task in tasks.items():
            began = time.process_time()
            task()
            if count >= idle:
                found[name].append(time.process_time() - began)
    return found


def table(title: str, seconds: dict[str, list[float]], images: int | None) -> None:
    """Prints best and median, and the median ratio of each to the first in the same round."""
    unit = "images/s" if images else "CPU s"
    print(f"\n{title}\n\n| | {unit}, best | median | times the CPU of gen |\n|---|---|---|---|")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        best, median = min(values), statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
        shown = (f"{images / best:.1f}", f"{images / median:.1f}") if images else (f"{best:.2f}", f"{median:.2f}")
        print(f"| {name} | {shown[0]} | {shown[1]} | {ratio:.2f} |", flush=True)


def peers(weights: dict[str, np.ndarray], folder: Path) -> dict[str, Callable[[np.ndarray], Any]]:
    """The others' feature functions: uint8 images (B, H, W, 3) of one size -> features, as each tool runs them."""
    import pytorch_fid.inception
    import torch
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.set_num_threads(1)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(tensors, folder / "inception.pth")
    pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: tensors
    network = pytorch_fid.inception.InceptionV3().eval()
    plain = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    frozen = torch.jit.freeze(torch.jit.trace(network, torch.rand(2, 3, 256, 256)))
    fidelity = FeatureExtractorInceptionV3("n", ["2048"], feature_extractor_weights_path=str(folder / "inception.pth"))
    resizer = build_resizer("clean")

    def batch(images: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

    def clean(images: np.ndarray) -> Any:
        return plain((batch(np.stack([resizer(image) for image in images])) - 128) / 128)

    def quiet(function: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
        return torch.no_grad()(function)

    return {
        "pytorch-fid": quiet(lambda images: network(batch(images).float() / 255)),
        "pytorch-fid, frozen TorchScript": quiet(lambda images: frozen(batch(images).float() / 255)),
        "torch-fidelity": quiet(lambda images: fidelity(batch(images))),
        "clean-fid": quiet(clean),
    }


def features(asked: argparse.Namespace) -> None:
    """Images in memory, and PNG files, to features: two tables."""
    cleanfid.require(Inception())
    weights, rng = official(), np.random.default_rng(1)
    params = jax.device_put(fold(weights))
    small = rng.integers(0, 256, (asked.images, 24, 24, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((256, 256), Image.Resampling.BICUBIC)) for i in small])
    ours = {mode: jax.jit(Inception(mode)) for mode in ("legacy_pytorch", "clean")}

    def run(mode: str, pictures: np.ndarray) -> Any:
        return jax.block_until_ready(ours[mode](params, jnp.asarray(pictures, jnp.float32))["features"])

    def turns(title: str, read: Callable[[], np.ndarray]) -> None:
        tasks: dict[str, Task] = {
            "gen": lambda: run("legacy_pytorch", read()),
            "gen, clean": lambda: run("clean", read()),
        }
        tasks |= {name: lambda function=function: function(read()) for name, function in others.items()}
        table(title, in_turns(tasks, asked.rounds), asked.images)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others = peers(weights, folder)
        turns("256 px images in memory to features", lambda: images)
        files = [folder / f"{i:04d}.png" for i in range(asked.images)]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image).save(file)
        turns("PNG files to features", lambda: np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]))


def square_root(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The distance as pytorch-fid, clean-fid and ADM's evaluator work it out."""
    root = scipy.linalg.sqrtm(cov1.dot(cov2))
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root).real)


def eigenvalues(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The distance as torch-fidelity works it out."""
    roots = np.sqrt(np.linalg.eigvals(cov1.dot(cov2)).astype(complex)).real
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum())


def distance(asked: argparse.Namespace) -> None:
    """The distance of given statistics: at full rank, and of fewer samples than dimensions."""
    rng, dim = np.random.default_rng(1), 2048
    functions: dict[str, Callable[..., float]] = {
        "gen": frechet_distance,
        "matrix square root (pytorch-fid, clean-fid, ADM)": square_root,
        "eigenvalues (torch-fidelity)": eigenvalues,
    }
    for count in (5000, 500):
        rows = [np.maximum(rng.standard_normal((count, dim)) * np.linspace(0.05, 1, dim) + 0.1, 0) for _ in range(2)]
        given = [part for x in rows for part in (x.mean(0), np.cov(x, rowvar=False))]
        tasks: dict[str, Task] = {name: functools.partial(f, *given) for name, f in functions.items()}
        table(f"Frechet distance at D = {dim}, {count} samples", in_turns(tasks, 1, idle=0), None)


TABLES = {"features": features, "distance": distance}


def main() -> None:
    """Runs the comparisons and prints them as tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    asked = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"  # before jax starts
    for name in asked.tables:
        TABLES[name](asked)


if __name__ == "__main__":
    main()
