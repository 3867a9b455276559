"""Memory of training per device, from shapes alone: nothing is allocated, nothing compiled.

Parameters, optimiser and averages are counted under the rule of `gen.training.sharding`; what a step needs beside them,
above all activations, is read off the traced step (`gen.training.liveness`).
"""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gen.errors import GenError
from gen.training.liveness import nbytes, temporaries
from gen.training.optim import microbatches
from gen.training.sharding import (
    batch_parts,
    batch_sharding,
    bytes_per_device,
    cut_parts,
    replicated,
    shardings,
)
from gen.training.task import Frozen, Program, Stage, State

__all__ = [
    "Memory",
    "batch_shapes",
    "compiled_bytes",
    "device_bytes",
    "held",
    "refuse",
    "remat_choices",
    "stage_memory",
]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimisers, averages, other, frozen: the state's parts and the frozen arrays.
      batch: the rows of the global batch that this device holds.
      activations: the most that a step needs at one time beside all those, gradients included.
    """

    parameters: int
    optimisers: int
    averages: int
    other: int
    frozen: int
    batch: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


def held(state: State, frozen: Frozen, sizes: Mapping[str, int], shard_from: int) -> Memory:
    """What one device holds between steps, on a mesh of these axis sizes; trees of arrays or shapes."""
    trees = (state.params, state.opt, state.ema, state.aux, frozen)
    return Memory(*(bytes_per_device(tree, sizes, shard_from) for tree in trees))


def batch_shapes(stage: Stage, rows: int) -> dict[str, Any]:
    """What a program of this stage gets as its batch, with `rows` rows, as shapes; reads one row of the data."""
    batches = stage.data.batches(batch=1, seed=0, start=0)
    try:
        row = next(batches)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    shapes = {name: jax.ShapeDtypeStruct((rows, *np.shape(v)[1:]), np.asarray(v).dtype) for name, v in row.items()}
    schedule = {
        name: jax.ShapeDtypeStruct(np.shape(v), np.asarray(v).dtype) for name, v in stage.task.inputs(0).items()
    }
    return {**shapes, "schedule": schedule}


def stage_memory(
    stage: Stage,
    state: State,
    frozen: Frozen,
    sizes: Mapping[str, int],
    shard_from: int,
    parts: int = 1,
    platform: str | None = None,
) -> Memory:
    """Memory of a stage on one device: that of its program which needs most.

    Activations are taken to be cut over the batch alone: a "tensor" axis lowers them by more than is said here.

    Args:
      state, frozen: trees of arrays or shapes.
      sizes: mesh axis sizes; shard_from: as in MeshConfig.
      parts: microbatches into which a device's rows are cut.
      platform: "cpu", "gpu" or "tpu" (see `gen.training.liveness`); that of the default backend if None.
    """
    batch = batch_shapes(stage, stage.batch // batch_parts(sizes))
    cut = cut_parts((state, frozen), sizes, shard_from)
    key = jax.eval_shape(jax.random.key, 0)
    needed = 0
    for program in stage.task.programs.values():
        with microbatches(parts):
            closed = jax.make_jaxpr(program)(state, frozen, batch, key)
        needed = max(needed, temporaries(closed, len(jax.tree.leaves(state)), cut, platform))
    rows = sum(nbytes(leaf) for leaf in jax.tree.leaves(batch))
    return dataclasses.replace(held(state, frozen, sizes, shard_from), batch=rows, activations=needed)


def compiled_bytes(
    program: Program, state: State, frozen: Frozen, batch: Mapping[str, Any], mesh: Mesh, shard_from: int
) -> int:
    """XLA's own figure for one step of `program` on one device of `mesh`, in bytes: compiles, allocates nothing.

    Args:
      state, frozen: trees of shapes; batch: of the global batch (`batch_shapes`).
    """
    layout = shardings(state, mesh, shard_from)

    def placed(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), tree, where)

    rows = {k: jax.tree.map(lambda _: batch_sharding(mesh), v) for k, v in batch.items() if k != "schedule"}
    rows["schedule"] = jax.tree.map(lambda _: replicated(mesh), batch["schedule"])
    with jax.set_mesh(mesh):
        step = jax.jit(program, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
        arguments = (
            placed(state, layout),
            placed(frozen, shardings(frozen, mesh, shard_from)),
            placed(batch, rows),
            jax.eval_shape(jax.random.key, 0),
        )
        found: Any = step.lower(*arguments).compile().memory_analysis()
    return int(
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )


def remat_choices(task: Any) -> dict[str, Any]:
    """The task with every rematerialisation policy its networks offer, by name; {} where they offer none.

    A policy is the field ``remat`` of a dataclass somewhere in the task.
    """
    changed = {policy: _with_remat(task, policy) for policy in ("none", "dots", "full")}
    return {policy: found for policy, found in changed.items() if found is not None}


def _with_remat(value: Any, policy: str) -> Any:
    """`value` with ``remat`` set to `policy` wherever it stands; None where it does not stand or is no choice."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if field.name == "remat":
            if policy in typing.get_args(typing.get_type_hints(type(value))["remat"]):
                changes["remat"] = policy
            continue
        new = _with_remat(getattr(value, field.name), policy)
        if new is not None:
            changes[field.name] = new
    return dataclasses.replace(value, **changes) if changes else None


def device_bytes(setting: float | None = None) -> int | None:
    """Memory of one device in bytes: the setting (GiB), else what the device reports; None when nobody knows.

    Simulated CPU devices share the machine's memory.
    """
    if setting is not None:
        return int(setting * 2**30)
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def refuse(what: str, memory: Memory, limit: int | None, sizes: Mapping[str, int]) -> None:
    """Raises GenError when `memory` exceeds `limit` bytes, naming its largest part and what would make it smaller."""
    if limit is None or memory.total <= limit:
        return
    parts = dataclasses.asdict(memory)
    largest = max(parts, key=lambda name: parts[name])
    if largest == "activations":
        advice = "take fewer samples at a time (--batch-gpu N) or recompute more in the backward pass (remat full)"
    else:
        advice = f"cut it over more devices (--engine.mesh.fsdp, now {sizes['fsdp']}) or choose a smaller network"
    raise GenError(
        f"{what} needs about {_gib(memory.total)} per device, {_gib(parts[largest])} of it {largest}; a device has "
        f"{_gib(limit)}: {advice}; --engine.memory_gib N if a device has more than that"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB"
