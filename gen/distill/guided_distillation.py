"""Guided distillation, stage one: one network learns what classifier-free guidance makes of two calls, at every scale.

Meng et al. 2022, arXiv 2210.03142, sec. 3.1. Stage two halves its steps: `gen.distill.progressive_distillation`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.backbones.guided import SCALE, GuidedConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import expand, pair
from gen.distill.progressive_distillation import ScaleMethod, Weight, weighted_error
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.part import Aux, warm_start
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["GuidedTask", "guided_student"]


def guided_student(teacher: Denoiser, *, factor: float = 1000.0, usual: float = 1.0) -> Denoiser:
    """Gives the Denoiser of a student that knows the guidance scale, from its teacher's.

    Args:
      factor, usual: see `gen.diffusion.backbones.guided.GuidedConfig`.
    """
    network = GuidedConfig(dataclasses.replace(teacher.network, times=2), factor, usual)
    return dataclasses.replace(teacher, network=network)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedTask(ScaleMethod):
    """Trains ``student``, whose network is a `GuidedConfig`, to predict the guided data at any time and scale.

    Batches hold data and the teacher's conditions.

    Attributes:
      student: its Denoiser, which `guided_student` makes.
      weight: of the squared error, see `gen.distill.progressive_distillation.weighted_error`.

    Raises GenError for a teacher without a null condition, and a student that takes no scale.
    """

    student: Any = dataclasses.field()
    weight: Weight = "snr-trunc"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher.network.conditions or not self.teacher.network.null_class:
            raise GenError(
                "guidance needs a teacher that is conditioned and knows the null condition; this one is not: distil it "
                "without guidance (progressive-distillation)"
            )
        if not isinstance(self.denoiser.network, GuidedConfig):
            raise GenError("the student's network takes no guidance scale; make it with guided_student(teacher)")

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the teacher's arrays that fit the student's backbone; the scale's embedding is new."""
        if previous is not None or "teacher" not in frozen:
            return super().start(key, frozen, previous)
        return {"student": {"network": warm_start(self.denoiser.network.network, key, frozen["teacher"])}}

    def guided(self, teacher: Params, z: jax.Array, t: jax.Array, cond: Cond, scale: jax.Array) -> jax.Array:
        """Gives x_u + w (x_c - x_u) of the teacher's data predictions with and without conditions, at scales w (B,)."""
        null = self.teacher.net.apply(teacher, cond, method="null")
        unconditional, conditional = (self.teacher(teacher, z, t, c).denoised for c in (null, cond))
        return unconditional + expand(scale, z) * (conditional - unconditional)

    def loss(
        self,
        student: Params,
        teacher: Params,
        x: jax.Array,
        cond: Cond,
        t: jax.Array,
        eps: jax.Array,
        scale: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        """Gives the mean weighted error of the student at data x (B, ...), noised to times t (B,), at scales (B,)."""
        process = self.teacher.process
        a, s = pair(process, t, x)
        z = a * x + s * eps
        target = jax.lax.stop_gradient(self.guided(teacher, z, t, cond, scale))
        found = self.denoiser(student, z, t, {**cond, SCALE: scale}).denoised
        return weighted_error(found, target, process.alpha(t), process.sigma(t), self.weight).mean(), Aux()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times, noise and scales."""
        t_key, eps_key, scale_key = jax.random.split(key, 3)
        x, process = self.data(batch), self.teacher.process
        # 1 - u is above 0: at clean data there is no noise to weigh by
        t = jnp.asarray(process.at(1.0 - jax.random.uniform(t_key, x.shape[:1])))
        data = (x, self.cond(batch), t, jax.random.normal(eps_key, x.shape), self.draw_scale(scale_key, x.shape[0]))
        teacher = frozen["teacher"]
        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, teacher, *d), data, schedule)
        return state, metrics
