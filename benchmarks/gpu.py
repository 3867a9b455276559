"""The parts of ``benchmarks/gpu.sh``, each in a process of its own: see there."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import unflatten
from gen.cli.estimates import planned
from gen.features.inception import Inception
from gen.metrics.frechet import frechet_distance
from gen.metrics.onepass import collect
from gen.metrics.sources import balanced_labels, generated
from gen.metrics.statistics import basic_statistics, finalised
from gen.nn.conditions import make_conditions
from gen.nn.network import Network
from gen.programs import programs
from gen.sampling.generator import OneStepGenerator
from gen.training.budget import device_bytes
from gen.training.checks import batches, close
from gen.training.engine import train
from gen.training.flops import count_flops
from gen.training.logging import read_metrics
from gen.training.sharding import batch_sharding, make_mesh, place, shardings
from gen.training.targets import CHIPS

ROOT = Path(__file__).parents[1]
# preset -> images of a step, and the module whose importer writes the network for the torch side
STEPS = {
    "dit-b2": (256, "gen.pretrained.dit"),
    "dit-xl2": (64, "gen.pretrained.dit"),
    "lightningdit-xl1": (64, "gen.pretrained.lightningdit"),
    "edm-cifar10-gpu": (256, "gen.pretrained.edm"),
}
TOY_STEPS = {"dit-smoke": (8, ""), "lightningdit-smoke": (8, "")}
PARITY = ("test_dit.py", "test_sit.py", "test_lightningdit.py", "test_edm_unet.py", "test_inception.py")
TOY_PARITY = ("test_sit_paths.py",)


def bare(preset: str, batch: int | None = None) -> Any:
    """The recipe of a preset on one device, on random data."""
    mesh = tuple((f"engine.mesh.{axis}", "1") for axis in ("data", "fsdp", "tensor"))
    return planned(preset, {}, mesh, {"batch": batch})


def device(toy: bool) -> dict[str, Any]:
    """What this runs on."""
    found = jax.devices()[0]
    return {"kind": found.device_kind, "platform": found.platform, "bytes": device_bytes(), "jax": jax.__version__}


def parity(toy: bool) -> dict[str, Any]:
    """Golden numbers of the official codes, on this device, with products in float32."""
    files = [f"tests/parity/{name}" for name in (TOY_PARITY if toy else PARITY)]
    command = [sys.executable, "-m", "pytest", "-n", "0", *files]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"passed": done.returncode == 0, "said": lines[-1] if lines else done.stderr[-300:]}


def sampling(toy: bool) -> dict[str, Any]:
    """The same seeds sampled here and on a CPU, in float32: the largest difference, of images in [-1, 1]."""
    recipe = planned("dit-smoke", {})
    generator = recipe.config.generator()
    params = {"net": Network(generator.network).init(jax.random.key(0))}
    numbers = np.arange(4)
    cond = {name: jnp.asarray(v) for name, v in make_conditions(generator.conditions, numbers).items()}

    def images(where: Any) -> np.ndarray:
        with jax.default_device(where), jax.default_matmul_precision("highest"):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
            return np.asarray(jax.jit(generator)(jax.device_put(params, where), keys, jax.device_put(cond, where)))

    here, there = images(jax.devices()[0]), images(jax.devices("cpu")[0])
    difference = float(np.abs(here - there).max() / max(1.0, np.abs(there).max()))
    return {"difference": difference, "passed": difference < 1e-3}


def training(toy: bool) -> dict[str, Any]:
    """The toy DiT trained in bfloat16 and in float32: the mean loss of the last steps of both."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        steps = 20 if toy else 400
        settings = (("stages.0.task.denoiser.network.dtype", dtype), ("engine.quiet", "true"))
        config = planned("dit-smoke", {}, settings, {"steps": steps}).config
        with tempfile.TemporaryDirectory() as folder:
            train(config, Path(folder) / "run")
            rows = [record["loss"] for record in read_metrics(Path(folder) / "run") if "loss" in record]
        losses[dtype] = statistics.mean(rows[-5:])
    ratio = losses["bfloat16"] / losses["float32"]
    return {**losses, "ratio": ratio, "passed": abs(ratio - 1) < 0.05}


def steps(toy: bool) -> dict[str, Any]:
    """A training step of each network: seconds, share of peak, memory beside the compiler's figure; torch's seconds."""
    peak = next((c.peak for c in CHIPS.values() if c.title.partition(" ")[2] in jax.devices()[0].device_kind), None)
    found = {}
    for preset, (batch, importer) in (TOY_STEPS if toy else STEPS).items():
        found[preset] = _step(preset, batch, 2 if toy else 20, peak)
        if importer and importlib.util.find_spec("torch") is not None:
            found[preset]["torch.compile"] = _torch(preset, batch, importer)
    return found


def _step(preset: str, batch: int, repeats: int, peak: float | None) -> dict[str, Any]:
    """The program of ``gen train``, compiled as ``gen compile`` compiles it, run on random data."""
    recipe = bare(preset, batch)
    config, mesh = recipe.config, make_mesh(recipe.config.engine.mesh, jax.devices()[:1])
    (program,) = programs(config, mesh, frozen=recipe.frozen, artifacts=recipe.artifacts, kinds=("train",))
    stage, traced = config.stages[0], program.trace()
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    with jax.set_mesh(mesh):
        layout = shardings(jax.eval_shape(lambda k: stage.task.init(k, {}, None), jax.random.key(0)), mesh)
        state = jax.jit(lambda k: stage.task.init(k, {}, None), out_shardings=layout)(jax.random.key(0))
        data = batches(stage, 0, 0)
        rows = place(dict(next(data)), batch_sharding(mesh))
        close(data)
        schedule = {name: np.asarray(value) for name, value in stage.task.inputs(0, stage.steps).items()}
        constants = (np.int32(0), np.uint32(0))
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            state, row = compiled(state, {}, rows, schedule, *constants)
            jax.block_until_ready(row)
            times.append(time.perf_counter() - began)
    seconds, flops = statistics.median(times[1:]), count_flops(traced.jaxpr.jaxpr)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "batch": batch,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "share_of_peak": flops.model / seconds / peak if peak else None,
        "bytes_measured": used,
        "bytes_compiler": int(memory.argument_size_in_bytes + memory.temp_size_in_bytes),
        "finite": bool(np.isfinite(np.asarray(row)).all()),
    }


def _torch(preset: str, batch: int, importer: str) -> float:
    """Seconds of torch.compile's step of the same network, that of a velocity in place of a learned variance."""
    import backbones

    network = bare(preset).config.exported()["net"].config.network
    if "learned_variance" in {field.name for field in dataclasses.fields(network)}:
        network = dataclasses.replace(network, learned_variance=False)
    case = backbones.Case(network, batch, importlib.import_module(importer).IMPORTER)
    params = backbones.randomised(case.denoiser.net.init(jax.random.key(0)))
    with tempfile.TemporaryDirectory() as folder:
        backbones.write_weights(case, params, path := Path(folder) / "weights.npz")
        peer = backbones.Peer(sys.executable)
        answer = peer.ask(op="build", case=case.describe(["compile"], False), weights=str(path))
    (who,) = answer["peers"]
    peer.ask(op="run", peer=who, what="step")
    seconds = [peer.ask(op="run", peer=who, what="step")["seconds"] for _ in range(3)]
    peer.process.terminate()
    return statistics.median(seconds)


@dataclasses.dataclass(frozen=True)
class RandomInception(Inception):
    """The network with random weights: as fast as with its own."""

    def load(self) -> Mapping[str, Any]:
        """Draws them."""
        rng = np.random.default_rng(0)
        flat = {
            path: rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / max(1, np.prod(shape[:-1]))))
            for path, shape in self.shapes().items()
        }
        return unflatten(flat)

    def fingerprint(self) -> str:
        """Says that they are no one's."""
        return "random"


def inception(toy: bool) -> dict[str, Any]:
    """Images of 256 pixels through the Inception network, in float32 as scores are taken."""
    network, batch = RandomInception(), 2 if toy else 256
    params = jax.device_put(network.load())
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (batch, 256, 256, 3)), jnp.float32)
    call = jax.jit(network)
    jax.block_until_ready(call(params, images))
    times = []
    for _ in range(2 if toy else 10):
        began = time.perf_counter()
        jax.block_until_ready(call(params, images))
        times.append(time.perf_counter() - began)
    return {"batch": batch, "images_per_second": batch / statistics.median(times)}


def evaluation(toy: bool) -> dict[str, Any]:
    """A one-step generator of CIFAR's size scored from its seeds to its distance, compiling included (goal: 60 s)."""
    count, batch = (16, 8) if toy else (50_000, 500)
    config = bare("edm-smoke" if toy else "edm-cifar10-cond").config
    student = OneStepGenerator(config.exported()["net"].config)
    classes = student.conditions["label"].classes if "label" in student.conditions else 0
    params = {role: jax.jit(Network(n).init)(jax.random.key(0)) for role, n in student.networks.items()}
    labels = balanced_labels(count, classes) if classes else None
    network = RandomInception()
    statistics_ = basic_statistics(network, labels is not None, min(count, 10_000))
    began = time.perf_counter()
    source = generated(student, params, seeds=range(count), labels=labels, identity="random weights")
    tally = collect(source, network, statistics_, batch=batch, mesh=make_mesh())
    found = finalised(statistics_, tally.accumulators)
    mean, covariance = found["mean"], found["covariance"]
    distance = frechet_distance(mean, covariance, np.zeros_like(mean), np.eye(len(mean)))
    seconds = time.perf_counter() - began
    return {"images": count, "seconds": seconds, "images_per_second": count / seconds, "distance": float(distance)}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "device": device,
    "sampling": sampling,
    "training": training,
    "steps": steps,
    "inception": inception,
    "evaluation": evaluation,
    "parity": parity,
}


def table(found: Mapping[str, Any]) -> str:
    """Gives the results as Markdown."""
    lines = ["| part | result |", "|---|---|"]
    for part, result in found.items():
        rows = result if part == "steps" and "error" not in result else {"": result}
        for name, values in rows.items():
            text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            lines.append(f"| {part} {name} | {text} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the parts that are not there yet, each in a process of its own; exit status 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(PARTS[given.one](given.toy)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "gpu.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for part in given.parts.split(","):
        if part in found and "error" not in found[part]:
            continue
        began = time.monotonic()
        command = [sys.executable, __file__, "--one", part, *(["--toy"] if given.toy else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            found[part] = {"error": said[-1] if said else f"exit status {done.returncode}"}
        else:
            found[part] = json.loads(done.stdout.splitlines()[-1])
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{part}: {time.monotonic() - began:.0f} s  {json.dumps(found[part])}", flush=True)
    (given.out / "gpu.md").write_text(table(found) + "\n")
    print(table(found))
    sys.exit(any("error" in result or result.get("passed") is False for result in found.values()))


if __name__ == "__main__":
    main()
