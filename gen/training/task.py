"""Task, State and Stage: what the engine trains. See `gen.training.engine` for the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

__all__ = ["Batch", "Frozen", "Metrics", "Program", "Stage", "State", "Task"]

Batch = Mapping[str, Any]  # arrays by name with leading axis B, plus "schedule": Task.inputs(step)
Frozen = Mapping[str, Any]  # arrays of teachers and feature networks by role; never donated, never checkpointed
Metrics = Mapping[str, jax.Array]  # scalars


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes; donated every step and checkpointed. No two leaves share a buffer.

    Attributes:
      step: () int32, programs run so far in this stage.
      params, opt, ema, aux: plain dicts by network (or quantity) name. ``ema`` keys are
        ``"<network>"`` or ``"<network>@<decay>"`` when there are several averages.
    """

    step: jax.Array
    params: dict[str, Any]
    opt: dict[str, Any] = dataclasses.field(default_factory=dict)
    ema: dict[str, Any] = dataclasses.field(default_factory=dict)
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)


Program = Callable[[State, Frozen, Batch, jax.Array], tuple[State, Metrics]]


class Task(Protocol):
    """A frozen dataclass (the config of a training method)."""

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """The initial state; copies, never aliases, what comes from `frozen` or the previous stage."""
        ...

    @property
    def programs(self) -> Mapping[str, Program]:
        """Update functions by name, each compiled once: (state, frozen, batch, key) -> (state, metrics).

        A metrics dict holds ``loss`` and ``grad_norm`` for the status line; the engine adds none.
        """
        ...

    def select(self, step: int) -> str:
        """Which program runs at `step` (update ratios)."""
        ...

    def inputs(self, step: int) -> Mapping[str, np.ndarray]:
        """Host-side schedules as arrays, so that nothing recompiles; reaches programs as batch["schedule"]."""
        ...

    def preview(self, state: State, frozen: Frozen, key: jax.Array) -> Mapping[str, jax.Array]:
        """Pictures for a human: name -> (N, H, W, C) float in [-1, 1]; {} for none. Pure; jitted by the engine."""
        ...

    def export(self, state: State) -> Mapping[str, Any]:
        """The parameters a user loads, by role, EMA where there is one."""
        ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """One leg of a run.

    Attributes:
      name: folder-safe name, unique in the run.
      task: what is trained.
      steps: number of programs to run.
      batch: global batch size.
      data: batches by step; resume = rebuild and start at the global step (see `gen.data.loader`).
    """

    name: str
    task: Any
    steps: int
    batch: int
    data: Any
