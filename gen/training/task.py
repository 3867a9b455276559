"""Task, State and Stage: what the engine trains. See `gen.training.engine` for the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from gen.nn.conditions import Conditions

__all__ = ["Batch", "Frozen", "Metrics", "Model", "Program", "Schedule", "Stage", "State", "Task"]

Batch = Mapping[str, Any]  # arrays by name with leading axis B
Schedule = Mapping[str, Any]  # what Task.inputs gives for a step, by name
Frozen = Mapping[str, Any]  # arrays of teachers and feature networks by role; never donated, never checkpointed
Metrics = Mapping[str, jax.Array]  # scalars


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes; donated every step and checkpointed. No two leaves share a buffer.

    Attributes:
      step: () int32, programs run so far in this stage.
      params, opt, ema, aux: plain dicts by network (or quantity) name. ``ema`` keys are
        ``"<network>"`` or ``"<network>@<i>"`` when there are several averages.
    """

    step: jax.Array
    params: dict[str, Any]
    opt: dict[str, Any] = dataclasses.field(default_factory=dict)
    ema: dict[str, Any] = dataclasses.field(default_factory=dict)
    aux: dict[str, Any] = dataclasses.field(default_factory=dict)


Program = Callable[[State, Frozen, Batch, Schedule, jax.Array], tuple[State, Metrics]]


@dataclasses.dataclass(frozen=True)
class Model:
    """What a task gives its user under one role, as far as making images with it depends on the task.

    Attributes:
      config: what the exported arrays belong to: a Denoiser, a FlowMap, a tokenizer.
      times: of a student of few steps, noise end first; () for a model that a solver samples.
      noise_scale: standard deviation of a student's first input; None for that of the process at its first time.
    """

    config: Any
    times: tuple[float, ...] = ()
    noise_scale: float | None = None


class Task(Protocol):
    """A frozen dataclass (the config of a training method). `gen.training.method.Method` gives most of it."""

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Gives the initial state; copies, never aliases, what comes from `frozen` or the previous stage.

        Traced by the engine (`jax.jit`, `jax.eval_shape`). `gen.training.part.begin` makes the usual state.
        """
        ...

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives update functions by name, each compiled once: (state, frozen, batch, schedule, key) -> (state,
        metrics).

        Metrics are scalars. ``loss`` and ``grad_norm`` go to the status line; a positive ``skipped`` (or
        ``<name>/skipped``) says that a step was not finite and changed nothing. `gen.training.part.Part.update` gives
        all three, and ``lr``; a task with several parts gives each metric under its part's name
        (`gen.training.part.Part.named`). The engine counts ``state.step``.
        """
        ...

    def select(self, step: int) -> str:
        """Tells which program runs at `step` (update ratios)."""
        ...

    def inputs(self, step: int, steps: int) -> Mapping[str, np.ndarray]:
        """Gives host-side schedules of step `step` of `steps` as arrays, so that nothing recompiles."""
        ...

    @property
    def derived(self) -> bool:
        """Tells whether `inputs` depends on the length of the stage, so that a finished stage cannot be made longer."""
        ...

    @property
    def conditions(self) -> Conditions:
        """Gives what the trained model is conditioned on, by name."""
        ...

    @property
    def classes_at(self) -> str:
        """Gives the path of the setting that says how many classes the model has; "" where there is none to change."""
        ...

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Raises GenError where data that look like `row` (arrays with a leading axis) cannot train this task."""
        ...

    def preview(self, state: State, frozen: Frozen, key: jax.Array, generator: Any) -> Mapping[str, jax.Array]:
        """Pictures for a human: name -> (N, H, W, C) float in [-1, 1]; {} for none. Pure; jitted by the engine.

        Args:
          frozen: the frozen arrays and the run's artifacts, by role.
          generator: what makes images with `export` (built by the run from `models`); None where nothing does.
        """
        ...

    def export(self, state: State) -> Mapping[str, Any]:
        """Gives the parameters a user loads, by role, EMA where there is one."""
        ...

    def opened(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gives the arrays that the generator of `models` takes, by role, of exported ones beside the run's artifacts.

        They are the same, unless what is trained is a change of something frozen.
        """
        ...

    def models(self) -> Mapping[str, Model]:
        """Gives what the exported parameters belong to, by the same roles."""
        ...


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
