"""Budget: parameters and bytes per device, before anything is allocated, and the check against what a device has.

What a device holds between steps (parameters, optimiser, averages, frozen arrays) is counted from shapes under the rule
of `gen.training.sharding`. What a step needs beside that, above all activations, is the compiler's own figure, known
once the step is compiled (`gen.training.program`).
"""

import dataclasses
import os
from collections.abc import Mapping

import jax

from gen.errors import GenError
from gen.nn.network import count
from gen.training.sharding import bytes_per_device
from gen.training.task import Frozen, Stage, State

__all__ = ["Memory", "abstract_states", "describe", "device_bytes", "held", "refuse", "size_text"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimisers, averages, other, frozen: the state's parts and the frozen arrays.
      temporaries: what a compiled step needs at one time beside all those: activations, gradients, its batch.
    """

    parameters: int
    optimisers: int
    averages: int
    other: int
    frozen: int
    temporaries: int = 0

    @property
    def total(self) -> int:
        """Gives the sum of all of these."""
        return sum(dataclasses.asdict(self).values())


def held(state: State, frozen: Frozen, sizes: Mapping[str, int], shard_from: int) -> Memory:
    """Gives what one device holds between steps, on a mesh of these axis sizes; trees of arrays or shapes."""
    trees = (state.params, state.opt, state.ema, state.aux, frozen)
    return Memory(*(bytes_per_device(tree, sizes, shard_from) for tree in trees))


def abstract_states(stages: tuple[Stage, ...], frozen: Frozen) -> list[State]:
    """Gives shapes of the state at the start of each stage; nothing is allocated. `frozen` may hold shapes."""
    states: list[State] = []
    previous: State | None = None
    for stage in stages:
        previous = jax.eval_shape(stage.task.init, jax.eval_shape(jax.random.key, 0), frozen, previous)
        states.append(previous)
    return states


def describe(stage: Stage, state: State, frozen: Frozen, sizes: Mapping[str, int], shard_from: int) -> str:
    """Gives one line: networks with their parameters, bytes per device of state and frozen arrays, the mesh."""
    nets = ", ".join(f"{name} {count(tree):,}" for name, tree in state.params.items())
    parts = dataclasses.asdict(held(state, frozen, sizes, shard_from))
    bytes_ = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    return f"stage '{stage.name}': {nets} parameters; per device: {bytes_}; mesh {mesh}"


def device_bytes(setting: float | None = None) -> int | None:
    """Gives the memory of one device in bytes: the setting (GiB), else what the device reports; None when nobody knows.

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
    if largest == "temporaries":
        advice = "take fewer samples at a time (--batch-gpu N) or recompute more in the backward pass (remat full)"
    else:
        advice = f"cut it over more devices (--engine.mesh.fsdp, now {sizes['fsdp']}) or choose a smaller network"
    raise GenError(
        f"{what} needs {_gib(memory.total)} per device, {_gib(parts[largest])} of it {largest}; a device has "
        f"{_gib(limit)}: {advice}; --engine.memory_gib N if a device has more than that"
    )


def size_text(size: float) -> str:
    """Spells a number of bytes: 1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g} GiB"
