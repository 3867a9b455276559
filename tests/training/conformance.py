"""What every task must satisfy: `check_task`; the same training on 8 simulated devices: `check_devices`."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.config import from_json, to_json
from gen.nn.network import tree_copy
from gen.training.checkpoints import latest_step
from gen.training.engine import Hook, train
from gen.training.run import EngineConfig, RunConfig
from gen.training.sharding import MeshConfig
from gen.training.task import Stage, State
from tests.processes import devices
from tests.training.keys import Uses

__all__ = ["check_devices", "check_task", "compilations", "run", "same"]


def same(a: Any, b: Any) -> bool:
    """Equal structure and equal bits (NaN equals NaN)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f")
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def run(task: Any, data: Any, frozen: Any, outdir: Path, *, batch: int, steps: int, **options: Any) -> State:
    """A quiet run of one stage; options named like fields of EngineConfig go there, the rest to `train`."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    engine = {"quiet": True, "log_every": 1} | {k: options.pop(k) for k in list(options) if k in names}
    config = RunConfig("conformance", (Stage("only", task, steps, batch, data),), engine=EngineConfig(**engine))
    return train(config, outdir, frozen=frozen, **options)


def check_task(
    task: Any, data: Any, frozen: Mapping[str, Any], outdir: Path, *, batch: int = 8, steps: int = 12
) -> None:
    """Trains `task` a little and asserts what the engine relies on.

    `steps` must reach every program twice. Checked: JSON round trip; string keys; one compilation per program;
    frozen arrays and the data's source alive and unchanged; interrupted and resumed equal to undisturbed, bit for
    bit; a step with non-finite parameters changes neither optimiser nor averages and says so; no PRNG key used twice
    in a step; previews; exports of the same roles as `models`.
    """
    assert from_json(json.loads(json.dumps(to_json(task)))) == task
    before = jax.device_get(tree_copy(dict(frozen)))
    half = steps // 2
    with compilations() as compiled:
        marks: list[int] = []
        hook = Hook(1, lambda stage, step, state, frozen: marks.append(len(compiled)))
        engine = {"batch": batch, "steps": steps, "checkpoint_every": half}
        whole = run(task, data, frozen, outdir / "whole", hooks=(hook,), **engine)
    order = [task.select(step) for step in range(steps)]
    warm = max(order.index(name) for name in set(order)) + 1  # every program has run
    assert set(order) == set(task.programs), f"{steps} steps reach {set(order)} of {set(task.programs)}"
    assert warm < steps, "give more steps: every program must run twice"
    assert marks[warm] == marks[steps - 1], f"compiled again after step {warm + 1}: {compiled[marks[warm] :]}"
    assert same(jax.device_get(dict(frozen)), before), "a frozen array changed"

    shutil.copytree(outdir / "whole", outdir / "resumed", ignore=shutil.ignore_patterns(str(steps)))
    assert latest_step(outdir / "resumed") == half
    resumed = run(task, data, frozen, outdir / "resumed", **engine)
    assert same(resumed, whole), "resumed differs from undisturbed"

    for path, leaf in jax.tree_util.tree_leaves_with_path((whole.params, whole.ema, whole.aux)):
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        assert all(isinstance(name, str) for name in names), f"{path} has a key that is not a string"
        assert np.isfinite(np.asarray(leaf)).all(), f"{jax.tree_util.keystr(path)} is not finite"
    _check_steps(task, data, frozen, whole, batch, steps)
    previews = jax.eval_shape(lambda state, key: task.preview(state, frozen, key, None), whole, jax.random.key(0))
    for images in previews.values():
        assert images.ndim == 4
        assert images.shape[-1] in (1, 3)
    exported = task.export(whole)
    assert exported.keys() == task.models().keys(), "export and models speak of different roles"
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(exported))


def _check_steps(task: Any, data: Any, frozen: Any, state: State, batch: int, steps: int) -> None:
    """The guard against what is not finite, and the keys of a step: each program compiled once for both."""
    rows = next(iter(data.batches(batch=batch, seed=0, start=0)))
    broken = dataclasses.replace(
        state, params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params), step=jnp.int32(0)
    )
    for name, program in task.programs.items():
        uses, step = Uses(), jax.jit(program)
        rest = (frozen, rows, _schedule(task, name, steps), uses.key(1))
        new, metrics = step(broken, *rest)
        flags = [float(v) for k, v in metrics.items() if k.split("/")[-1] == "skipped"]
        assert flags, f"program '{name}' reports no 'skipped'"
        assert max(flags) == 1.0, f"program '{name}' did not skip a step with non-finite parameters"
        assert same(new.opt, state.opt), f"program '{name}' changed an optimiser in a skipped step"
        assert same(new.ema, state.ema), f"program '{name}' changed an average in a skipped step"
        uses.forget()
        jax.block_until_ready(step(state, *rest))
        assert uses.repeated() == 0, f"program '{name}' uses a PRNG key twice"


def _schedule(task: Any, name: str, steps: int) -> Mapping[str, Any]:
    """The schedule of the first step of a program."""
    found: Mapping[str, Any] = task.inputs(next(i for i in range(steps) if task.select(i) == name), steps)
    return found


class compilations:
    """Names every compilation while open: jax reports them as events."""

    def __enter__(self) -> list[str]:
        self.events: list[str] = []
        self.open = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self.events

    def _listen(self, event: str, seconds: float, **details: Any) -> None:
        if self.open and event == "/jax/core/compile/backend_compile_duration":
            self.events.append(str(details.get("fun_name", event)))

    def __exit__(self, *exc: object) -> None:
        self.open = False  # listeners cannot be taken out one by one


MESHES = {
    "one": (MeshConfig(data=8), MeshConfig(fsdp=8, data=1), MeshConfig(data=2, fsdp=2, tensor=2)),
    "students": (MeshConfig(data=4, student=2), MeshConfig(data=1, fsdp=2, tensor=2, student=2)),
}


def check_devices(
    build: str, outdir: Path, *, batch: int = 8, steps: int = 4, rtol: float = 1e-5, meshes: str = "one"
) -> None:
    """Asserts that 8 simulated devices (data, fsdp, tensor axes) train as one does, within rounding.

    Args:
      build: "module:function" or "module:function(argument)" that returns (task, data, frozen); called in a fresh
        process too.
      outdir: scratch folder.
      batch, steps: a multiple of 8; enough steps to reach every program.
      rtol: of each logged metric, over all steps, and of parameters, relative to their largest entry.
      meshes: which of `MESHES`.
    """
    script = "import sys; from tests.training.conformance import _on_devices; _on_devices(*sys.argv[1:])"
    command = [sys.executable, "-c", script, build, str(outdir), str(batch), str(steps), meshes]
    done = subprocess.run(command, env=os.environ | devices(8), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    task, data, frozen = _build(build)
    one = run(task, data, frozen, outdir / "one", batch=batch, steps=steps, quiet=True)
    wanted = dict(_numbers(one, outdir / "one"))
    for index, mesh in enumerate(MESHES[meshes]):
        with np.load(outdir / f"mesh{index}.npz") as found:
            assert set(found.files) == set(wanted)
            for name, value in wanted.items():
                scale = max(np.abs(value).max(initial=0.0), 1e-6)
                error = np.abs(found[name] - value).max(initial=0.0) / scale
                assert error <= rtol, f"mesh {mesh}: {name} is off by {error:.1e} of {scale:.1e}"


def _build(build: str) -> Any:
    module, _, call = build.partition(":")
    function, _, argument = call.rstrip(")").partition("(")
    return getattr(importlib.import_module(module), function)(*([argument] if argument else []))


def _on_devices(build: str, outdir: str, batch: str, steps: str, meshes: str) -> None:
    task, data, frozen = _build(build)
    for index, mesh in enumerate(MESHES[meshes]):
        mesh = dataclasses.replace(mesh, shard_from=1)
        folder = Path(outdir) / f"run{index}"
        state = run(task, data, frozen, folder, batch=int(batch), steps=int(steps), mesh=mesh)
        np.savez(Path(outdir) / f"mesh{index}.npz", **dict(_numbers(state, folder)))


def _numbers(state: State, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Weights, averages and the logged metrics by name, a metric at all its steps as one array.

    One step's value may be a mean of signed terms that cancel, such as logits, with the rounding of the terms.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.ema)):
        yield jax.tree_util.keystr(path).replace("/", "_"), np.asarray(leaf, np.float64)
    metrics: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if isinstance(value, float) and name not in ("seconds", "images_per_second"):
                metrics.setdefault(name.replace("/", "_"), []).append(value)
    for name, values in metrics.items():
        yield f"metric {name}", np.asarray(values)
