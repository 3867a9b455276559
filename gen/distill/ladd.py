"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

The student's output is noised again and goes through the frozen teacher; light heads on the teacher's features tell it
from real data, which best are the teacher's own guided samples. There is no score and no regression: only the two
sides of a GAN, in which the noise level says how much of the picture is judged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gen.diffusion.objectives import Draws
from gen.diffusion.process import pair
from gen.diffusion.times import Levels, TimeSampler
from gen.distill.discriminator import AdversarialStudent
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Program, Schedule, State

__all__ = ["LADDDraws", "LADDTask"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LADDDraws:
    """All randomness of one step. Every array has leading axis B.

    Attributes:
      noise: (B, ...) unit normal, what the student's input is made with.
      index: (B,) int32, which of the student's times each sample is trained at.
      fake, real: times and noises at which generated and real data are judged.
    """

    noise: jax.Array
    index: jax.Array
    fake: Draws
    real: Draws


@dataclasses.dataclass(frozen=True)
class LADDTask(AdversarialStudent):
    """Trains ``student`` and ``discriminator``, the heads, one at a step.

    Batches hold real data (or a teacher's samples) and conditions by name. A student of one time starts from noise; one
    of several from real data noised to them.

    Attributes:
      gan_levels: times at which the discriminator judges: here logit-normal, mostly high (section 3.3 of the paper).
      paired: real data get the times and noises of the generated ones.
      ratio: steps per student update; the others are the discriminator's. 2 takes turns.
      head_optim: the heads' optimiser.

    Raises GenError for a ratio below 2, and a missing head.
    """

    gan_levels: Levels | TimeSampler = TimeSampler("logit-normal", mean=1.0)
    paired: bool = False
    ratio: int = 2
    optim: OptimConfig = OptimConfig(lr=2e-6, weight_decay=0.01, clip=10.0)
    head_optim: OptimConfig = OptimConfig(lr=4e-6, weight_decay=0.01, clip=10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio < 2:
            raise GenError(f"ratio is {self.ratio}; expected steps per student update, at least 2")
        if self.head is None:
            raise GenError("LADD is a discriminator's loss alone; give it `head` and `taps`")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student and the discriminator's heads."""
        return (self.student_part, Part("discriminator", self.head, self.head_optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Student from the previous stage's student, or else from the teacher; new heads."""
        return {**super().start(key, frozen, previous), "discriminator": Network(self.head).init(key)}

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives ``student`` and ``discriminator``; metrics bear the name of the part that they are of."""
        return {"student": self.update_student, "discriminator": self.update_discriminator}

    def select(self, step: int) -> str:
        """Moves the student at every `ratio`-th step, the discriminator at the others, beginning with it."""
        return "student" if step % self.ratio == self.ratio - 1 else "discriminator"

    def updates(self, part: str, steps: int) -> int:
        """Counts the updates of either part in the first `steps` steps."""
        students = steps // self.ratio
        return students if part == "student" else steps - students

    def update_student(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the student."""
        seen = frozen["teacher"], state.params["discriminator"]
        state, metrics, _ = self.student_part.update(
            state, lambda p, data: self.student_loss(p, *seen, *data), self._data(batch, key), schedule
        )
        return state, self.student_part.named(metrics)

    def update_discriminator(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the heads."""
        student, part = state.params["student"], self.parts[1]
        state, metrics, _ = part.update(
            state,
            lambda p, data: self.discriminator_loss(p, frozen["teacher"], student, *data),
            self._data(batch, key),
            schedule,
        )
        return state, part.named(metrics)

    def _data(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Cond, LADDDraws]:
        real = self.data(batch)
        return real, self.cond(batch), self.draw(key, real)

    def draw(self, key: jax.Array, x: jax.Array) -> LADDDraws:
        """Draws all random numbers of a step for data shaped like x (B, ...)."""
        noise, index, fake, real = jax.random.split(key, 4)
        judged, other = self.judging(fake, x), self.judging(real, x)
        return LADDDraws(
            noise=jax.random.normal(noise, x.shape),
            index=jax.random.randint(index, x.shape[:1], 0, len(self.times)),
            fake=judged,
            real=dataclasses.replace(other, t=judged.t, eps=judged.eps) if self.paired else other,
        )

    def student_input(self, real: jax.Array, draws: LADDDraws) -> tuple[jax.Array, jax.Array]:
        """Gives (x_t, t (B,)) that the student is trained at: noise, or of several times noised real data (B, ...)."""
        t = jnp.asarray(self.times, jnp.float32)[draws.index]
        if len(self.times) == 1:
            return self.first_scale * draws.noise, t
        a, s = pair(self.denoiser.process, t, real)
        return a * real + s * draws.noise, t

    def generate(self, student: Params, real: jax.Array, cond: Cond, draws: LADDDraws) -> jax.Array:
        """Gives the student's output x."""
        x_t, t = self.student_input(real, draws)
        return self.denoiser(student, x_t, t, cond).denoised

    def student_loss(
        self, student: Params, teacher: Params, head: Params, real: jax.Array, cond: Cond, draws: LADDDraws
    ) -> tuple[jax.Array, Aux]:
        """Gives mean softplus(-logit) of the noised output, with gradient through the teacher's features."""
        x = self.generate(student, real, cond, draws)
        return self.gan_loss(teacher, head, x, cond, draws.fake), Aux()

    def discriminator_loss(
        self, head: Params, teacher: Params, student: Params, real: jax.Array, cond: Cond, draws: LADDDraws
    ) -> tuple[jax.Array, Aux]:
        """Gives the heads' loss on generated against real data."""
        x = jax.lax.stop_gradient(self.generate(student, real, cond, draws))
        loss, terms = self.head_loss(teacher, head, (x, cond, draws.fake), (real, cond, draws.real))
        return loss, Aux(terms)
