"""Task, State and Stage: what the engine trains. See `gen.training.engine` for the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Batch", "Frozen", "Metrics", "Program", "Stage", "State", "Task", "label_pictures"]

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
        """The initial state; copies, never aliases, what comes from `frozen` or the previous stage.

        Traced by the engine (`jax.jit`, `jax.eval_shape`). `gen.training.optim.begin` makes the usual state.
        """
        ...

    @property
    def programs(self) -> Mapping[str, Program]:
        """Update functions by name, each compiled once: (state, frozen, batch, key) -> (state, metrics).

        Metrics are scalars. ``loss`` and ``grad_norm`` go to the status line; a positive ``skipped`` (or
        ``<name>/skipped``) says that a step was not finite and changed nothing. `gen.training.optim.update` gives all
        three. The engine counts ``state.step``.
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


def label_pictures(generator: Any, params: Any, labels: tuple[int, ...], key: jax.Array) -> dict[str, jax.Array]:
    """A preview: what a generator makes of each label, clipped; {} without one. Equal keys give equal noise."""
    if generator is None:
        return {}
    images = generator(params, jax.random.split(key, len(labels)), {"label": jnp.asarray(labels, jnp.int32)})
    return {"samples": jnp.clip(images, -1.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One leg of a run.

    Attributes:
      name: folder-safe name, unique in the run.
      task: what is trained.
      steps: number of programs to run.
      batch: global batch size.
      data: ``batches(batch=, seed=, start=, process=, processes=)`` gives endless dicts of arrays from a global step
        on, each process its contiguous part; ``identity()`` names content and options (see `gen.data.loader`).
    """

    name: str
    task: Any
    steps: int
    batch: int
    data: Any
