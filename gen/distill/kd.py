"""Knowledge distillation: regression of a few-step student on stored outputs of its teacher (Luhman & Luhman 2021).

The data are pairs of a teacher's starting noise and what its solver made of it, stored once by an indexed job; for
students of several steps, the points of the trajectory at the student's times.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.ema import numbered
from gen.training.optim import OptimConfig, begin, update
from gen.training.task import Batch, Frozen, Metrics, Program, State, label_pictures

__all__ = ["KDTask", "regression_loss"]


def regression_loss(x: jax.Array, target: jax.Array) -> jax.Array:
    """0.5 mean (x - target)^2 over all axes."""
    return 0.5 * jnp.square(x - target).mean()


@dataclasses.dataclass(frozen=True)
class KDTask:
    """Trains ``student``, a copy of ``frozen["teacher"]``, to reach the end of stored trajectories in one call.

    Batches: "latent" (B, ...) float32, the trajectory's end; "noise" (B, ...), its start as it was fed to the teacher
    (already scaled: 80 n for EDM). For several times instead of "noise" "path" (B, P, ...), P points from the noise
    end at equal spacing of the student's times: time i reads point i P / len(times). Conditioning arrays by name.

    Attributes:
      denoiser: the teacher's network, process and parameterization, which the student shares.
      times: the student's times, noise end first.
      optim: the student's optimiser.
      emas: averages (`gen.training.ema`): the first is ``student`` and is exported, the i-th further ``student@i``.
      cond: names of the batch's conditioning arrays.
      generator: the generator that draws previews from the student as ``net`` and the frozen arrays, or None.
      labels: the previews' labels; the pictures of a label keep their noise through the run.
    """

    denoiser: Denoiser
    times: tuple[float, ...] = (1.0,)
    optim: OptimConfig = OptimConfig()
    emas: tuple[Any, ...] = ()
    cond: tuple[str, ...] = ("label",)
    generator: Any = None
    labels: tuple[int, ...] = tuple(range(8))

    def __post_init__(self) -> None:
        if not self.times or any(a <= b for a, b in itertools.pairwise(self.times)):
            raise GenError(f"student times {self.times} must decrease from the noise end; give at least one")

    def student_input(self, path: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x_t, t) for the time numbers `index` (B,) from stored points `path` (B, P, ...)."""
        point = index * (path.shape[1] // len(self.times))
        return path[jnp.arange(path.shape[0]), point], jnp.asarray(self.times, jnp.float32)[index]

    def loss(
        self, student: Params, path: jax.Array, index: jax.Array, target: jax.Array, cond: Cond
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The regression loss; no weighting over times."""
        x_t, t = self.student_input(path, index)
        return regression_loss(self.denoiser(student, x_t, t, cond).denoised, target), {}

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """The student starts as the teacher, or as the previous stage's student."""
        del key
        if "teacher" not in frozen:
            raise GenError(f"distillation needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        student = previous.params["student"] if previous is not None else frozen["teacher"]
        return begin({"student": student}, {"student": self.optim}, self._averages)

    @property
    def _averages(self) -> dict[str, Any]:
        return numbered("student", self.emas)

    @property
    def programs(self) -> Mapping[str, Program]:
        """One program."""
        return {"student": self.update}

    def select(self, step: int) -> str:
        """Always the student's."""
        del step
        return "student"

    def inputs(self, step: int) -> Mapping[str, np.ndarray]:
        """No schedules."""
        del step
        return {}

    def update(self, state: State, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        """One regression step at randomly drawn times of the student."""
        del frozen
        target = batch["latent"]
        path = batch["noise"][:, None] if len(self.times) == 1 else batch["path"]
        index = jax.random.randint(key, target.shape[:1], 0, len(self.times))
        cond = {name: batch[name] for name in self.cond}
        data = (path, index, target, cond)
        return update(state, "student", lambda p, d: self.loss(p, *d), data, self.optim, self._averages)

    def preview(self, state: State, frozen: Frozen, key: jax.Array) -> Mapping[str, jax.Array]:
        """Samples of the averaged student, one for each of `labels`."""
        return label_pictures(self.generator, {**frozen, **self.export(state)}, self.labels, key)

    def export(self, state: State) -> Mapping[str, Any]:
        """The student, averaged where it is, as ``net``."""
        return {"net": state.ema.get("student", state.params["student"])}
