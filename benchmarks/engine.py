"""What the engine costs: step overhead over the bare jitted step, loader rate, blocking time of a checkpoint.

    python benchmarks/engine.py runs/demo [--pairs 5]

Needs a finished demo (its latent cache). Every figure is a median over interleaved pairs: one engine run, one bare
loop over batches of the same data with the same update, jitted alone, in turn. The engine's seconds per step are the
difference of a long and a short run, so that start-up, tracing and the final checkpoint cancel. CPU time counts all
threads; on a machine that does other things it is the steadier of the two.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import gen
from gen.data.caches import Cache, seal
from gen.data.sources import Digits
from gen.experiments import build
from gen.files import read_json
from gen.training.checkpoints import Checkpoints
from gen.training.engine import train
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

SHORT, LONG = 50, 1550


def clock() -> np.ndarray:
    """(wall seconds, CPU seconds of all threads of this process)."""
    return np.array([time.perf_counter(), time.process_time()])


def engine_seconds(stage: Stage, steps: tuple[int, int]) -> np.ndarray:
    """Wall and CPU seconds per step of `train`."""
    times = []
    for count in steps:
        run = Stage(stage.name, stage.task, steps=count, batch=stage.batch, data=stage.data)
        config = RunConfig("benchmark", (run,), engine=EngineConfig(quiet=True, checkpoint_every=10**9))
        with tempfile.TemporaryDirectory() as folder:
            began = clock()
            train(config, folder)
            times.append(clock() - began)
    return (times[1] - times[0]) / (steps[1] - steps[0])


def bare_seconds(stage: Stage, steps: tuple[int, int]) -> np.ndarray:
    """Wall and CPU seconds per step of the jitted update alone, on batches that already lie on the device."""
    task = stage.task
    state = jax.jit(task.init, static_argnums=(1, 2))(jax.random.key(0), None, None)
    name = task.select(0)
    step = jax.jit(lambda s, b, k: task.programs[name](s, {}, b, task.inputs(0, 1), k), donate_argnums=0)
    source = stage.data.batches(batch=stage.batch, seed=0, start=0)
    batches = [jax.device_put(dict(b)) for b in itertools.islice(source, 16)]
    keys = jax.random.split(jax.random.key(1), 16)
    state, _ = step(state, batches[0], keys[0])
    jax.block_until_ready(state)
    count = steps[1] - steps[0]
    began = clock()
    for i in range(count):
        state, _ = step(state, batches[i % 16], keys[i % 16])
    jax.block_until_ready(state)
    return (clock() - began) / count


def overhead(name: str, stage: Stage, pairs: int, steps: tuple[int, int]) -> None:
    """Prints the engine's and the bare loop's time per step and the medians of their differences and ratios."""
    rows = np.array([(engine_seconds(stage, steps), bare_seconds(stage, steps)) for _ in range(pairs + 1)][1:])
    for column, kind in enumerate(("wall", "CPU")):
        engine, bare = rows[:, 0, column], rows[:, 1, column]
        print(
            f"{name:<26} {kind:<4} engine {1e3 * np.median(engine):8.2f} ms, bare {1e3 * np.median(bare):8.2f} ms, "
            f"overhead {1e3 * np.median(engine - bare):6.2f} ms ({100 * np.median(engine / bare - 1):.1f} %)",
            flush=True,
        )


def repeated(cache: Path, folder: Path, times: int) -> Cache:
    """A cache whose rows are those of `cache`, `times` over."""
    for name in ("latent", "label"):
        rows = np.load(cache / f"{name}.npy")
        np.save(folder / f"{name}.npy", np.concatenate([rows] * times))
    return seal(folder, tokenizer="repeated", data="repeated")


def loader_rate(data: object, batch: int, count: int = 2000) -> float:
    """Batches per second of the loader alone."""
    source = data.batches(batch=batch, seed=0, start=0)
    for _ in range(50):
        next(source)
    began = time.perf_counter()
    for _ in range(count):
        next(source)
    return count / (time.perf_counter() - began)


def checkpoint_seconds(state: object, repeats: int = 7) -> tuple[float, float]:
    """Median seconds that a save blocks, and until it is committed."""
    blocking, committed = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        for step in range(1, repeats + 1):
            began = time.perf_counter()
            checkpoints.save(step, state, {"step": step})
            blocking.append(time.perf_counter() - began)
            checkpoints.wait()
            committed.append(time.perf_counter() - began)
    return statistics.median(blocking), statistics.median(committed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    enable_compile_cache()
    tokenizer = build("demo-tokenizer", {}).config.stages[0]
    recipe = build("demo-teacher", {"tokenizer": gen.load(args.demo / "tokenizer"), "data": str(args.demo / "latents")})
    task = recipe.config.stages[0].task
    teacher = Stage("teacher", task, steps=1, batch=128, data=Cache(str(args.demo / "latents")))
    overhead("demo tokenizer, batch 64", tokenizer, args.pairs, (SHORT, LONG))
    overhead("demo teacher, batch 128", teacher, args.pairs, (SHORT, LONG))
    with tempfile.TemporaryDirectory() as folder:
        large = Stage("large", task, steps=1, batch=4096, data=repeated(args.demo / "latents", Path(folder), 4))
        overhead("demo teacher, batch 4096", large, args.pairs, (3, 43))
    for name, stage in (("digits", Stage("t", None, 1, 64, Digits())), ("latent cache", teacher)):
        print(f"loader, {name}, batch {stage.batch}: {loader_rate(stage.data, stage.batch):,.0f} batches/s")
    blocking, committed = checkpoint_seconds(jax.jit(task.init, static_argnums=(1, 2))(jax.random.key(0), None, None))
    print(f"checkpoint of the teacher: blocks {1e3 * blocking:.0f} ms, committed after {1e3 * committed:.0f} ms")
    steps = read_json(args.demo / "plan.json")
    print("demo, seconds per step: " + ", ".join(f"{name} {step['seconds']:.0f}" for name, step in steps.items()))


if __name__ == "__main__":
    main()
