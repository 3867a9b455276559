"""Knowledge distillation: regression of a few-step student on stored outputs of its teacher (Luhman & Luhman 2021).

Paper: arXiv 2101.02388. The data are a teacher's starting noise and what its solver made of it, stored once by an
indexed job; for students of several steps, the points of the trajectory at the student's times.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.method import StudentMethod
from gen.training.part import Aux
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["KDTask", "regression_loss"]


def regression_loss(x: jax.Array, target: jax.Array) -> jax.Array:
    """Gives 0.5 mean (x - target)^2 over all axes of two arrays of one shape: a scalar."""
    return 0.5 * jnp.square(x - target).mean()


@dataclasses.dataclass(frozen=True)
class KDTask(StudentMethod):
    """Trains ``student`` to reach the end of its teacher's stored trajectories in one call.

    Batches: "latent" (B, ...) float32, the trajectory's end; "noise" (B, ...), its start as it was fed to the teacher
    (already scaled: 80 n for EDM). For several times instead of "noise" "path" (B, P, ...), P points from the noise
    end at equal spacing of the student's times: time i reads point i P / len(times). Conditions by name.
    """

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Checks what `Method.check` does, and the trajectories.

        Raises GenError for data that are no pairs of a teacher.
        """
        super().check(row)
        name = "noise" if len(self.times) == 1 else "path"
        if name not in row:
            raise GenError(
                f"the data hold no '{name}': regression needs what a teacher made; make records of it first "
                "(gen distill PRESET --teacher RUN --pairs N)"
            )

    def student_input(self, path: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives (x_t, t) for the time numbers `index` (B,) from stored points `path` (B, P, ...)."""
        point = index * (path.shape[1] // len(self.times))
        return path[jnp.arange(path.shape[0]), point], jnp.asarray(self.times, jnp.float32)[index]

    def loss(
        self, student: Params, path: jax.Array, index: jax.Array, target: jax.Array, cond: Cond
    ) -> tuple[jax.Array, Aux]:
        """Gives the regression loss, without a weighting over times."""
        x_t, t = self.student_input(path, index)
        return regression_loss(self.denoiser(student, x_t, t, cond).denoised, target), Aux()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one regression step at randomly drawn times of the student."""
        del frozen
        target = batch["latent"]
        path = batch["noise"][:, None] if len(self.times) == 1 else batch["path"]
        index = jax.random.randint(key, target.shape[:1], 0, len(self.times))
        data = (path, index, target, self.cond(batch))
        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, metrics
