"""Progressive distillation: a student makes in one step what its teacher makes in two, again and again.

Salimans and Ho 2022, arXiv 2202.00512. Each halving is a stage of a run, taught by the student of the stage before.
With networks that know the guidance scale this is the second stage of guided distillation (arXiv 2210.03142).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.backbones.guided import SCALE
from gen.diffusion.objectives import mean_over_data
from gen.diffusion.process import expand
from gen.distill.rectified_flow import expect_alike
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Params, tree_copy
from gen.training.method import StudentMethod
from gen.training.part import Aux
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["ProgressiveTask", "ScaleMethod", "Steps", "Weight", "halves", "weighted_error"]

Weight = Literal["snr-trunc", "constant", "snr", "v"]
_TEACHER = "teacher"  # of the state's further arrays


def weighted_error(
    x: jax.Array, target: jax.Array, a: jax.Array, s: jax.Array, weight: Weight = "snr-trunc"
) -> jax.Array:
    """Gives the mean squared error (B,) of data predictions in the quantity that `weight` names.

    With the signal-to-noise ratio snr = (a / s)^2: ``constant`` mean (x - target)^2; ``snr`` that of the noise, snr
    times it; ``snr-trunc`` the larger of both, max(snr, 1) times it; ``v`` that of v = a eps - s x.

    Args:
      x, target: (B, ...).
      a, s: (B,) alpha and sigma at the prediction's time.
    """
    error = mean_over_data(jnp.square(x - target))
    match weight:
        case "snr-trunc":
            return jnp.maximum(1.0, (a / s) ** 2) * error
        case "snr":
            return (a / s) ** 2 * error
        case "v":
            return ((a**2 + s**2) / s) ** 2 * error
        case "constant":
            return error


class Steps(NamedTuple):
    """Coefficients of two teacher steps and the student's one, at the student's step i from t = (i + 1) / N.

    Attributes:
      t, middle: (B,) times of the first and of the second teacher step.
      a, s, a_middle, s_middle: (B,) alpha and sigma there.
      share: (B,) weight of the first step's data prediction in the student's target.
    """

    t: jax.Array
    middle: jax.Array
    a: jax.Array
    s: jax.Array
    a_middle: jax.Array
    s_middle: jax.Array
    share: jax.Array


def halves(process: Any, steps: int, i: jax.Array) -> Steps:
    """Gives the `Steps` of numbers i (B,) in 0 .. steps - 1, from tables in float64.

    The target is the x with which one DDIM step from t lands where the teacher's two land,
    (z'' - r z) / (a'' - r a) with r = s'' / s. In the two data predictions x_1 and x_2 it is their weighted mean
    share x_1 + (1 - share) x_2, share = (s'' / s') (a' - a s' / s) / (a'' - a s'' / s), of which no digits cancel; at
    i = 0, where s'' is 0, it is x_2.
    """
    u = np.arange(1, steps + 1) / steps
    t, middle, end = (np.asarray(process.at(v), np.float64) for v in (u, u - 0.5 / steps, u - 1.0 / steps))
    (a, a1, a2), (s, s1, s2) = ([f(v) for v in (t, middle, end)] for f in (process.alpha, process.sigma))
    share = s2 / s1 * (a1 - a * s1 / s) / (a2 - a * s2 / s)
    share[0] = 0.0
    return Steps(*(jnp.asarray(column, jnp.float32)[i] for column in (t, middle, a, s, a1, s1, share)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleMethod(StudentMethod):
    """A `StudentMethod` whose networks may know the guidance scale, and whose teacher may be the stage before.

    Attributes:
      scales: between which guidance scales are drawn uniformly, for networks that know theirs (`GuidedConfig`).

    Raises GenError for scales in the wrong order, and a student of another process.
    """

    scales: tuple[float, float] = (1.0, 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales[0] > self.scales[1]:
            raise GenError(f"guidance scales from {self.scales[0]:g} to {self.scales[1]:g}; give the lower one first")
        if self.denoiser.process != self.teacher.process:
            raise GenError(
                f"the student's process is {self.denoiser.process}, the teacher's {self.teacher.process}; a student "
                "that follows its teacher's steps needs the same"
            )
        expect_alike(self.teacher, self.denoiser)

    def models(self) -> Mapping[str, Model]:
        """Gives the student, which a solver samples."""
        return {"net": Model(self.denoiser)}

    @property
    def scaled(self) -> bool:
        """Tells whether the student knows the guidance scale."""
        return SCALE in self.denoiser.network.conditions

    @property
    def conditions(self) -> Conditions:
        """Gives what the data say of each sample: the network's conditions without the scale, which is drawn."""
        return {name: c for name, c in self.denoiser.network.conditions.items() if name != SCALE}

    def draw_scale(self, key: jax.Array, batch: int) -> jax.Array:
        """Gives (batch,) guidance scales."""
        return jax.random.uniform(key, (batch,), minval=self.scales[0], maxval=self.scales[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgressiveTask(ScaleMethod):
    """Trains ``student`` to make in `steps` DDIM steps what its teacher makes in twice as many.

    The teacher is the (averaged) student of the stage before, or the run's teacher in the first stage; the student
    starts from it.

    Attributes:
      steps: N, the student's steps.
      weight: see `weighted_error`.

    Raises GenError for fewer steps than 1.
    """

    steps: int = 4
    weight: Weight = "snr-trunc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise GenError(f"a student of {self.steps} steps; expected at least 1")

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the student of the stage before, averaged where it is, or else what fits of the teacher.

        Raises GenError for a student that knows a scale of a teacher that does not.
        """
        if previous is not None:
            return {"student": self.student_part.averaged(previous)}
        if self.scaled and SCALE not in self.teacher.network.conditions:
            raise GenError(
                "the student knows a guidance scale and its teacher does not; put a stage of guided distillation before"
            )
        return super().start(key, frozen, previous)

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Task.init` says; a student of the stage before is kept beside, as the teacher."""
        state = super().init(key, frozen, previous)
        if previous is None:
            return state
        return dataclasses.replace(state, aux={_TEACHER: tree_copy(self.student_part.averaged(previous))})

    def draw(self, key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Draws step numbers (B,), noise like x, and the guidance scale as a condition where there is one."""
        step_key, eps_key, scale_key = jax.random.split(key, 3)
        i = jax.random.randint(step_key, x.shape[:1], 0, self.steps)
        scale = {SCALE: self.draw_scale(scale_key, len(i))} if self.scaled else {}
        return i, jax.random.normal(eps_key, x.shape), scale

    def target(
        self, teacher: Any, params: Params, z: jax.Array, at: Steps, cond: Cond
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gives the x that the student is to predict at z, and where the teacher's two steps went: z' and x_2.

        Args:
          teacher: its Denoiser.
          params: its parameters.
          z: (B, ...) noisy data at ``at.t``.
        """
        a, s, a1, s1, share = (expand(v, z) for v in (at.a, at.s, at.a_middle, at.s_middle, at.share))
        first = teacher(params, z, at.t, cond).denoised
        middle = s1 / s * z + (a1 - a * s1 / s) * first
        second = teacher(params, middle, at.middle, cond).denoised
        return share * first + (1.0 - share) * second, middle, second

    def loss(
        self, student: Params, teacher: tuple[Any, Params], x: jax.Array, cond: Cond, i: jax.Array, eps: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Gives the mean weighted error at data x (B, ...) noised to the student's steps i (B,)."""
        at = halves(self.denoiser.process, self.steps, i)
        z = expand(at.a, x) * x + expand(at.s, x) * eps
        target, _, _ = jax.lax.stop_gradient(self.target(*teacher, z, at, cond))
        found = self.denoiser(student, z, at.t, cond).denoised
        return weighted_error(found, target, at.a, at.s, self.weight).mean(), Aux()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times, noise and scales."""
        x = self.data(batch)
        i, eps, scale = self.draw(key, x)
        own = _TEACHER in state.aux
        teacher = (self.denoiser, state.aux[_TEACHER]) if own else (self.teacher, frozen["teacher"])
        data = (x, {**self.cond(batch), **scale}, i, eps)
        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, teacher, *d), data, schedule)
        return state, metrics
