"""Multi-student distillation: one student for each part of the classes (Song et al. 2024, arXiv 2410.23274).

The classes are divided among K students. Each is distilled by the same method, with a fake score and a discriminator of
its own, from the data of its part alone; the teacher knows all classes. All K train in one program, stacked along a
leading axis that a mesh may cut (axis ``student``): they exchange nothing. A router sends each sample to its student
(`gen.sampling.router`), so that an image costs what one student costs.

Students smaller than their teacher cannot copy its weights. They first learn its denoised predictions at all noise
levels (teacher score matching); a good denoiser is a one-step generator's start.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.objectives import Draws, noised
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Network, Params
from gen.sampling.router import Students
from gen.training.method import StudentMethod, pictures
from gen.training.part import Aux
from gen.training.sharding import STUDENTS as GROUP
from gen.training.task import Batch, Frozen, Metrics, Model, Program, Schedule, State

__all__ = ["MultiStudentTask", "ScoreMatchingTask"]


@dataclasses.dataclass(frozen=True)
class ScoreMatchingTask(StudentMethod):
    """Trains ``student`` to denoise as its teacher does, at times of its own native objective.

    The loss is the mean squared error of the network's raw output against what that should be for the teacher's
    prediction, which for EDM's networks is lambda(sigma) |D_student - D_teacher|^2. Batches hold data and conditions.
    A student of another shape than its teacher starts at random, one that is alike with what fits.

    The exported student has the times of the one-step generator that it becomes.

    Raises GenError for a student of other data or conditions than the teacher's.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        mine, its = self.denoiser.network, self.teacher.network
        if mine.shape != its.shape or mine.conditions != its.conditions:
            raise GenError(
                f"the student takes {mine.shape} and {list(mine.conditions)}, its teacher {its.shape} and "
                f"{list(its.conditions)}; give the student's network the size, channels and classes of the teacher's"
            )

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives a random student of its own architecture, or else the teacher or the previous stage's student."""
        if self.student is None or previous is not None:
            return super().start(key, frozen, previous)
        return {"student": Network(self.denoiser.network).init(key)}

    def loss(self, student: Params, teacher: Params, x: jax.Array, cond: Cond, draws: Draws) -> tuple[jax.Array, Aux]:
        """Gives the matching loss on x (B, ...) noised by `draws`, with the teacher held."""
        own = self.denoiser
        x_t = noised(own.process, x, draws)
        told = self.teacher.under(own.process)(teacher, x_t, draws.t, cond)
        target = own.parameterization.target(own.process, told.denoised, told.eps, draws.t)
        inner, times = own.parameterization.inputs(own.process, x_t, draws.t)
        raw, _ = own.net(student, inner, times, cond)
        error = jnp.square(raw[..., : x.shape[-1]] - jax.lax.stop_gradient(target))
        return error.mean(), Aux()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step of teacher score matching."""
        x = self.data(batch)
        data = (x, self.cond(batch), self.denoiser.objective.draw(key, self.denoiser.process, x))
        state, metrics, _ = self.student_part.update(
            state, lambda p, d: self.loss(p, frozen["teacher"], *d), data, schedule
        )
        return state, metrics


@dataclasses.dataclass(frozen=True)
class MultiStudentTask:
    """Several students, each trained as `task` says on its own part of the classes: a `gen.training.task.Task`.

    Batches are those of `gen.data.partitioned.Partitioned`: the rows of the first student's part, then the second's.
    A previous stage may be of as many students, or of a single one, from which all of them start.

    Attributes:
      task: the method of every student (`gen.training.method.StudentMethod`).
      partition: the student of each class.
    """

    task: Any
    partition: tuple[int, ...]

    def __post_init__(self) -> None:
        _ = self.students  # refuses a partition that does not fit

    @property
    def students(self) -> Students:
        """Gives the exported networks."""
        return Students(self.task.models()["net"].config, self.partition)

    @property
    def count(self) -> int:
        """Gives the number of students."""
        return self.students.count

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `gen.training.task.Task.init` says, for all students at once."""
        keys = jax.random.split(key, self.count)
        several = previous is not None and GROUP in previous.params
        before = _opened(previous, self.count) if previous is not None and several else previous
        begun = jax.vmap(self.task.init, in_axes=(0, None, 0 if several else None), axis_size=self.count)(
            keys, frozen, before
        )
        return _closed(begun, jnp.zeros((), jnp.int32))

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives the method's programs, each over all students."""
        return {name: self._over(program) for name, program in self.task.programs.items()}

    def _over(self, program: Program) -> Callable[..., tuple[State, Metrics]]:
        def run(
            state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
        ) -> tuple[State, Metrics]:
            rows = {name: v.reshape(self.count, -1, *v.shape[1:]) for name, v in batch.items()}
            keys = jax.random.split(key, self.count)
            cut = dict(jax.sharding.get_abstract_mesh().shape).get("student", 1) > 1
            mapped = jax.vmap(
                program,
                in_axes=(0, None, 0, None, 0),
                spmd_axis_name="student" if cut else None,
            )
            new, metrics = mapped(_opened(state, self.count), frozen, rows, schedule, keys)
            each = {
                f"{name}@{k}": v[k] for name, v in metrics.items() if name.endswith("loss") for k in range(self.count)
            }
            return _closed(new, state.step), {name: v.mean() for name, v in metrics.items()} | each

        return run

    def select(self, step: int) -> str:
        """Chooses as the method does."""
        name: str = self.task.select(step)
        return name

    def inputs(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives the method's schedules, one for all students."""
        found: Mapping[str, Any] = self.task.inputs(step, steps)
        return found

    @property
    def derived(self) -> bool:
        """Tells what the method does."""
        return bool(self.task.derived)

    @property
    def conditions(self) -> Conditions:
        """Gives what every student is conditioned on."""
        found: Conditions = self.task.conditions
        return found

    @property
    def classes_at(self) -> str:
        """Says that the classes are the teacher's."""
        return ""

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Checks what the method does, and that whole batches are in the order of the parts.

        Raises GenError for data that are not divided among the students.
        """
        self.task.check(row)
        labels, count = np.asarray(row["label"]), self.count
        if len(labels) % count == 0 and jax.process_count() == 1:
            wanted = np.repeat(np.arange(count), len(labels) // count)
            if (np.asarray(self.partition)[labels] != wanted).any():
                raise GenError(
                    f"the data are not divided among the {count} students; give Partitioned(data, partition) with the "
                    "partition of the task"
                )

    def preview(self, state: State, frozen: Frozen, key: jax.Array, generator: Any) -> Mapping[str, jax.Array]:
        """Gives samples of the students, as `gen.training.method.Method.preview` does."""
        return pictures(generator, {**frozen, **self.export(state)}, key)

    def export(self, state: State) -> Mapping[str, Any]:
        """Gives the networks of all students, stacked."""
        found: Mapping[str, Any] = self.task.export(_opened(state, self.count))
        return {GROUP: found["net"]}

    def opened(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Gives the arrays as they are."""
        return params

    def models(self) -> Mapping[str, Model]:
        """Gives the students, with their times."""
        return {GROUP: dataclasses.replace(self.task.models()["net"], config=self.students)}


def _opened(state: State, count: int) -> State:
    """The state that the method knows, of all students at once."""
    inner = {name: getattr(state, name).get(GROUP, {}) for name in ("params", "opt", "ema", "aux")}
    return State(step=jnp.broadcast_to(state.step, (count,)), **inner)


def _closed(state: State, step: jax.Array) -> State:
    """The state of the run: the students' arrays in a group of their own, and one step for all."""
    groups = {name: getattr(state, name) for name in ("params", "opt", "ema", "aux")}
    return State(step=step, **{name: {GROUP: value} if value else {} for name, value in groups.items()})
