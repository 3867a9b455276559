"""Reflow: a rectified flow is trained again on its own pairs of noise and sample, whose paths are nearly straight.

Liu et al. 2022 (arXiv 2209.03003), with the recipe of Lee et al. 2024 (arXiv 2405.20320, "2-rectified flow++"): a
start from any diffusion model, U-shaped times, a pseudo-Huber loss, a perceptual term. The rounds of k-rectified flow
are a Plan in `gen.experiments.rectified_flow`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.conversions import MARGIN, rectified
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import mean_over_data
from gen.diffusion.process import Linear, expand
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.features.resize import resize
from gen.nn.network import Cond, Params
from gen.tokenizers.losses import expect_frozen
from gen.training.method import StudentMethod
from gen.training.part import Aux
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = [
    "PairMethod",
    "ReflowTask",
    "UShaped",
    "expect_alike",
    "pseudo_huber",
    "straightness",
    "u_shaped_times",
]

_HUBER = 0.00054  # c over the number of entries, after Song and Dhariwal 2024, sec. 3.3
_PERCEPTUAL_SIDE = 224  # the size at which images are compared


def u_shaped_times(u: jax.Array, mirrored: jax.Array, a: float) -> jax.Array:
    """Gives times (B,) of density proportional to cosh(a (t - 1/2)), from uniform draws u (B,).

    The increasing exponential's inverse distribution is s = ln(1 + u (e^a - 1)) / a; where `mirrored` (B,) bool the
    time is 1 - s. All are then brought into [`MARGIN`, 1 - `MARGIN`].
    """
    s = jnp.log1p(u * (jnp.exp(a) - 1.0)) / a
    return jnp.where(mirrored, 1.0 - s, s) * (1.0 - 2.0 * MARGIN) + MARGIN


@dataclasses.dataclass(frozen=True)
class UShaped:
    """Draws times near both ends more often than between (arXiv 2405.20320); see `u_shaped_times`.

    Attributes:
      a: how much; 4 in the paper.

    Raises GenError for an a that is not positive.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        if self.a <= 0:
            raise GenError(f"a U-shaped law with a {self.a:g}; expected a positive number")

    def __call__(self, key: jax.Array, process: Any, count: int) -> jax.Array:
        """Gives (count,) float32 times."""
        del process
        u_key, side_key = jax.random.split(key)
        mirrored = jax.random.bernoulli(side_key, 0.5, (count,))
        return u_shaped_times(jax.random.uniform(u_key, (count,)), mirrored, self.a)


def pseudo_huber(error: jax.Array) -> jax.Array:
    """Gives (sqrt(|e|^2 + c^2) - c) / d for errors (B, ...) of d entries each, with c = 0.00054 d; (B,)."""
    d = np.prod(error.shape[1:])
    c = _HUBER * d
    return (jnp.sqrt(jnp.square(error).reshape(len(error), -1).sum(1) + c**2) - c) / d


def straightness(trajectory: jax.Array, times: np.ndarray) -> jax.Array:
    """Gives how far the steps of a path are from its straight line: 0 for a flow that one step integrates.

    The mean over steps and entries of |(x_i - x_{i+1}) / (t_i - t_{i+1}) - (x_0 - x_N) / (t_0 - t_N)|^2.

    Args:
      trajectory: (N + 1, B, ...) states at `times`.
      times: (N + 1,).

    Returns:
      (B,).
    """
    steps = np.asarray(times[:-1] - times[1:], np.float32).reshape(-1, *(1,) * (trajectory.ndim - 1))
    velocities = (trajectory[:-1] - trajectory[1:]) / steps
    straight = (trajectory[0] - trajectory[-1]) / float(times[0] - times[-1])
    return mean_over_data(jnp.square(velocities - straight).mean(0))


def expect_alike(teacher: Denoiser, student: Denoiser) -> None:
    """Raises GenError for a student of other data than its teacher's."""
    if teacher.network.shape != student.network.shape:
        raise GenError(
            f"the teacher makes {teacher.network.shape} and the student {student.network.shape}; give the student the "
            "size and channels of its teacher"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairMethod(StudentMethod):
    """A `StudentMethod` on pairs of noise and what the teacher's solver made of it (`gen.sampling.records`).

    Batches: "latent" (B, ...) or "image" the sample, "noise" (B, ...) where the solver started, as it was given to it.

    Attributes:
      flip: images are mirrored with probability 1/2, each together with its noise: the mirrored noise makes the
        mirrored image. For images, not for latents.

    Raises GenError for a student that is no linear flow, and mirror images of data that are none.
    """

    flip: bool = False

    @property
    def denoiser(self) -> Denoiser:
        """Gives the student's Denoiser; the teacher's as a rectified flow, where none is given."""
        found: Denoiser = self.student or rectified(self.teacher)
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denoiser.process != Linear():
            raise GenError(
                f"the student's process is {type(self.denoiser.process).__name__}; straight paths are those of the "
                "linear process: leave the student out, or give it that"
            )
        expect_alike(self.teacher, self.denoiser)
        if self.flip and len(self.shape) != 3:
            raise GenError(f"data {self.shape} cannot be mirrored; set flip to false")

    def check(self, row: Mapping[str, np.ndarray]) -> None:
        """Checks what `Method.check` does, and that there are pairs.

        Raises GenError for data that are no pairs of a teacher.
        """
        super().check(row)
        if "noise" not in row:
            raise GenError(
                "the data hold no 'noise': reflow needs pairs of noise and what a teacher made of it; make records of "
                "it first (gen distill PRESET --teacher RUN --pairs N)"
            )

    def pairs(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Gives (x, z) of a batch: the samples and their unit noise."""
        process = self.teacher.process
        return self.data(batch), batch["noise"] / float(process.sigma(np.float64(process.t_max)))

    def mirrored(self, flip: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Gives arrays (B, H, W, C) whose rows are mirrored where `flip` (B,) is true."""
        return tuple(jnp.where(expand(flip, x), x[..., ::-1, :], x) for x in arrays) if self.flip else arrays

    def draw_flip(self, key: jax.Array, batch: int) -> jax.Array:
        """Draws which rows are mirrored, (batch,) bool."""
        return jax.random.bernoulli(key, 0.5, (batch,)) & self.flip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReflowTask(PairMethod):
    """Trains ``student``, a rectified flow, on the straight paths between the teacher's pairs.

    Attributes:
      law: of the times.
      distance: of the velocities of one sample: the mean ``squared`` error, its ``root``, or pseudo-``huber``.
      perceptual: an image term (`gen.tokenizers.losses`) on the data predictions, in which case the distance of the
        velocities weighs 1 - t; its weights are a frozen role of its name. Any distance will do, since each z_t
        belongs to one pair. None for none.
      over_time: whether the perceptual term is divided by t.

    Raises GenError for a perceptual term on data that are no images.
    """

    law: Any = TimeSampler()
    distance: Literal["squared", "root", "huber"] = "squared"
    perceptual: Any = None
    over_time: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual is not None and len(self.shape) != 3:
            raise GenError(f"data {self.shape} are no images to be compared; leave the perceptual term out")

    def models(self) -> Mapping[str, Model]:
        """Gives the student, which a solver samples: it is a flow, and any number of steps will do."""
        return {"net": Model(self.denoiser)}

    def velocity_distance(self, v: jax.Array, target: jax.Array) -> jax.Array:
        """Gives the distance (B,) of velocities."""
        match self.distance:
            case "squared":
                return mean_over_data(jnp.square(v - target))
            case "root":
                return jnp.sqrt(mean_over_data(jnp.square(v - target)))
            case "huber":
                return pseudo_huber(v - target)

    def losses(self, frozen: Frozen, v: jax.Array, z_t: jax.Array, x: jax.Array, z: jax.Array, t: jax.Array) -> Any:
        """Gives the loss (B,) of velocities v at z_t = (1 - t) x + t z, whose target is z - x."""
        found = self.velocity_distance(v, z - x)
        if self.perceptual is None:
            return found
        expect_frozen(frozen, self.perceptual)
        size = (_PERCEPTUAL_SIDE, _PERCEPTUAL_SIDE)
        made, real = (resize(y, size, "torch-bilinear") for y in (z_t - expand(t, v) * v, x))
        seen = self.perceptual.weight * self.perceptual(frozen[self.perceptual.name], real, made)
        return (1.0 - t) * found + (seen / t if self.over_time else seen)

    def loss(
        self, student: Params, frozen: Frozen, x: jax.Array, z: jax.Array, cond: Cond, t: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Gives the mean loss over pairs x, z (B, ...) at times t (B,), and the velocities' mean squared error."""
        z_t = expand(1.0 - t, x) * x + expand(t, x) * z
        v = self.denoiser(student, z_t, t, cond).velocity
        error = jnp.square(v - (z - x)).mean()
        return self.losses(frozen, v, z_t, x, z, t).mean(), Aux({"velocity_mse": error})

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times."""
        time_key, flip_key = jax.random.split(key)
        x, z = self.pairs(batch)
        x, z = self.mirrored(self.draw_flip(flip_key, len(x)), x, z)
        data = (x, z, self.cond(batch), self.law(time_key, Linear(), len(x)))
        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, frozen, *d), data, schedule)
        return state, metrics
