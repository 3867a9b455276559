"""Program: one update function of a task, compiled once for fixed shapes and layouts."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import flatten
from gen.training.budget import held, refuse, size_text
from gen.training.part import microbatches
from gen.training.sharding import replicated
from gen.training.task import Frozen, Program, State

__all__ = ["Compiled", "Placement", "enable_compile_cache", "step_key"]

_STEPS = 0  # the use of the seed that training keys are drawn from; the engine has others


def step_key(seed: Any, step: Any) -> jax.Array:
    """Gives the key of global step `step` of a run with this seed."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STEPS), step)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the programs of a stage run.

    Attributes:
      mesh: the devices.
      layout: shardings of the state, in its structure.
      parts: microbatches into which a batch is cut.
      shard_from: as of `gen.training.sharding.MeshConfig`.
      limit: bytes of one device, None where nobody knows.
    """

    mesh: Any
    layout: State
    parts: int
    shard_from: int
    limit: int | None


class Compiled:
    """A task's program with the run's keys, its metrics as one row; compiled at its first call.

    Args:
      name: for messages.
      program: the task's update function.
      placement: where it runs.
      seed, offset: of the run, and global steps before this stage.
      note: takes a line that says what compiling took.
    """

    def __init__(
        self, name: str, program: Program, placement: Placement, seed: int, offset: int, note: Callable[[str], None]
    ) -> None:
        self.name, self.program, self.placement, self.note = name, program, placement, note
        self.metrics: tuple[str, ...] = ()  # names of the row's entries, known once it is traced
        self._constants = (np.int32(offset), np.uint32(seed))
        self._compiled: Any = None

    def __call__(
        self, state: State, frozen: Frozen, batch: Mapping[str, jax.Array], schedule: Mapping[str, np.ndarray]
    ) -> tuple[State, jax.Array]:
        """Gives the next state and the row of metrics, (number of `metrics`,) float32. `state` is donated."""
        args = (state, frozen, batch, {k: np.asarray(v) for k, v in schedule.items()})
        if self._compiled is None:
            self._compiled = self._compile(args)
        new, row = self._compiled(*args, *self._constants)
        return new, row

    def _step(self, state: State, frozen: Frozen, batch: Any, schedule: Any, offset: Any, seed: Any) -> Any:
        new, metrics = self.program(state, frozen, batch, schedule, step_key(seed, offset + state.step))
        self.metrics = tuple(sorted(metrics))
        row = jnp.stack([jnp.asarray(metrics[name], jnp.float32).reshape(()) for name in self.metrics])
        return dataclasses.replace(new, step=state.step + 1), row

    def traced(self, state: State, frozen: Frozen, batch: Any, schedule: Mapping[str, np.ndarray]) -> Any:
        """Gives the program as jax traces it for arrays or shapes with their shardings: `lower()` goes on from there.

        Raises TypeError for a changed type in the state.
        """
        where, args = self.placement, (state, frozen, batch, schedule, *self._constants)
        out = (where.layout, replicated(where.mesh))
        with microbatches(where.parts):
            traced = jax.jit(self._step, donate_argnums=0, out_shardings=out).trace(*args)
        before, after = _types(state), _types(traced.out_info[0])
        changed = [f"{path}: {before[path]} became {after[path]}" for path in before if after[path] != before[path]]
        if changed:
            raise TypeError(f"program '{self.name}' changes the types of the state: {'; '.join(changed[:3])}")
        return traced

    def _compile(self, args: tuple[Any, ...]) -> Any:
        """Traces and compiles. Raises for more memory needed than there is."""
        where, began = self.placement, time.monotonic()
        compiled = self.traced(*args).lower().compile()
        text, memory = f"compiled '{self.name}' in {time.monotonic() - began:.1f} s", compiled.memory_analysis()
        if memory is not None:
            sizes = dict(where.mesh.shape)
            needed = held(args[0], args[1], sizes, where.shard_from)
            needed = dataclasses.replace(needed, temporaries=int(memory.temp_size_in_bytes))
            refuse(f"a step of '{self.name}'", needed, where.limit, sizes)
            text += f"; a step needs {size_text(needed.total)} per device, {size_text(needed.temporaries)} temporary"
        self.note(text)
        return compiled


def _types(state: State) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten(state).items()}


def enable_compile_cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk, small ones too, so that the second start is fast.

    Args:
      folder: by default ``$XDG_CACHE_HOME/gen/jax`` or ``~/.cache/gen/jax``; JAX_COMPILATION_CACHE_DIR wins.

    Returns:
      The folder in use.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder or Path(home) / "gen" / "jax"
    path = Path(chosen).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
