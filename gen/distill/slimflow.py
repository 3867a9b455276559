"""SlimFlow: one-step students smaller than their teacher, by annealing reflow and flow-guided distillation.

Zhu et al. 2024, arXiv 2407.12718. The paper's time runs from noise (0) to data (1) in the code, ours the other way. A
small network cannot start from the teacher's weights; annealing reflow starts it on independent noise, which is easy,
and turns that into the noise of the pairs. The second stage makes one step of it, taught by the pairs and by two steps
of the flow that the first stage gave.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.objectives import mean_over_data
from gen.diffusion.process import expand
from gen.distill.rectified_flow import PairMethod
from gen.errors import GenError
from gen.features.resize import resize
from gen.nn.network import Cond, Network, Params, tree_copy
from gen.tokenizers.losses import expect_frozen
from gen.training.part import Aux
from gen.training.task import Batch, Frozen, Metrics, Model, Schedule, State

__all__ = ["EDGE", "AnnealingReflowTask", "FlowGuidedTask", "annealed_noise", "loss_weight"]

EDGE = 1e-3  # nearest that times come to pure noise
_PERCEPTUAL_SIDE = 64  # the size at which images are compared
_FLOW = "flow"  # of the state's further arrays: the annealed flow

Weighting = Literal["uniform", "snr", "snr_inv", "snr+1", "karras", "truncated-snr", "1mt"]


def loss_weight(t: jax.Array, weighting: Weighting) -> jax.Array:
    """Gives factors on the squared error at times t (B,), ours, with snr = ((1 - t) / (t + 0.001))^2."""
    snr = jnp.square((1.0 - t) / (t + EDGE))
    match weighting:
        case "uniform":
            return jnp.ones_like(t)
        case "snr":
            return snr
        case "snr_inv":
            return 1.0 / snr
        case "snr+1":
            return snr + 1.0
        case "karras":
            return snr + 1.0 / 0.5**2  # of data of standard deviation 0.5
        case "truncated-snr":
            return jnp.maximum(snr, 1.0)
        case "1mt":
            return jnp.square(t)


def annealed_noise(z: jax.Array, fresh: jax.Array, beta: jax.Array) -> jax.Array:
    """Gives sqrt(1 - beta^2) z + beta z' (arXiv 2407.12718): the noise of the pair, and fresh noise of its shape.

    The scalar beta lies in [0, 1].
    """
    return jnp.sqrt(1.0 - beta**2) * z + beta * fresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnealingReflowTask(PairMethod):
    """Trains ``student``, a rectified flow from random weights, on pairs whose noise is at first not their own.

    Attributes:
      annealing: how the share of fresh noise falls over `horizon` steps: beta = 1 - k / K (``linear``), (1 + cos(pi k /
        K)) / 2 (``cosine``), exp(-k / K) (``exponential``), or 0 throughout (``none``, plain reflow).
      horizon: K; 300,000 of the paper's 800,000 steps.
      weighting: of the squared error over times.

    Raises GenError for a horizon below 1.
    """

    annealing: Literal["linear", "cosine", "exponential", "none"] = "linear"
    horizon: int = 300_000
    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < 1:
            raise GenError(f"annealing over {self.horizon} steps; expected at least 1, or annealing none")

    def models(self) -> Mapping[str, Model]:
        """Gives the student, which a solver samples."""
        return {"net": Model(self.denoiser)}

    def beta(self, step: int) -> float:
        """Gives the share of fresh noise at a step of the stage."""
        done = step / self.horizon
        match self.annealing:
            case "linear":
                return 1.0 - min(1.0, done)
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
            case "exponential":
                return math.exp(-done)
            case "none":
                return 0.0

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives ``beta``, the share of fresh noise."""
        del steps
        return {"beta": np.float32(self.beta(step))}

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives random weights, or the student of the stage before."""
        if previous is not None:
            return super().start(key, frozen, previous)
        return {"student": Network(self.denoiser.network).init(key)}

    @staticmethod
    def time(u: jax.Array) -> jax.Array:
        """Gives times (B,) of uniform draws: from 1 - `EDGE` down to 0."""
        return (1.0 - EDGE) * (1.0 - u)

    def pair(
        self, x: jax.Array, z: jax.Array, fresh: jax.Array, flip: jax.Array, beta: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Gives (x, z_beta) as they are trained on: the noise mixed with `fresh` noise, then both mirrored."""
        return self.mirrored(flip, x, annealed_noise(z, fresh, beta))

    def loss(self, student: Params, x: jax.Array, z: jax.Array, cond: Cond, t: jax.Array) -> tuple[jax.Array, Aux]:
        """Gives the mean weighted squared error of the velocity at times t (B,) between x and z (B, ...)."""
        z_t = expand(1.0 - t, x) * x + expand(t, x) * z
        v = self.denoiser(student, z_t, t, cond).velocity
        errors = mean_over_data(jnp.square(v - (z - x)))
        return (loss_weight(t, self.weighting) * errors).mean(), Aux()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times and noise."""
        del frozen
        time_key, fresh_key, flip_key = jax.random.split(key, 3)
        x, z = self.pairs(batch)
        fresh = jax.random.normal(fresh_key, x.shape)
        x, z = self.pair(x, z, fresh, self.draw_flip(flip_key, len(x)), schedule["beta"])
        data = (x, z, self.cond(batch), self.time(jax.random.uniform(time_key, x.shape[:1])))
        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, *d), data, schedule)
        return state, {**metrics, "beta": schedule["beta"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowGuidedTask(PairMethod):
    """Trains ``student``, a rectified flow, to make its teacher's sample in one step.

    The flow that guides it is the (averaged) student of the stage before, or the run's teacher where there is none.
    One loss compares the student's step from a pair's noise with the pair's sample, the other its step from fresh noise
    with where one step of its own and one of the flow lead.

    Attributes:
      squared: weight of the mean squared error of the velocities; 0 for none.
      perceptual: an image term on noise + velocity; its weights are a frozen role of its name. None for none.
      between: the times between which the flow takes over from the student.

    Raises GenError for several times, a loss without a term, and a perceptual term on data that are no images.
    """

    times: tuple[float, ...] = (1.0 - EDGE,)
    noise_scale: float | None = 1.0
    squared: float = 1.0
    perceptual: Any = None
    between: tuple[float, float] = (0.2, 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.times) != 1:
            raise GenError(
                f"flow-guided distillation makes one-step students, not of times {self.times}; give one time"
            )
        if self.perceptual is None and not self.squared:
            raise GenError("the loss compares nothing; give squared a weight, or a perceptual term")
        if self.perceptual is not None and len(self.shape) != 3:
            raise GenError(f"data {self.shape} are no images to be compared; leave the perceptual term out")

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Task.init` says; the averaged student of the stage before is kept beside, as the flow."""
        state = super().init(key, frozen, previous)
        if previous is None:
            return state
        return dataclasses.replace(state, aux={_FLOW: tree_copy(self.student_part.averaged(previous))})

    def distance(self, frozen: Frozen, z: jax.Array, velocity: jax.Array, target: jax.Array) -> jax.Array:
        """Gives the distance () of where two velocities lead in one step from z, each to z - velocity."""
        found = self.squared * jnp.square(velocity - target).mean()
        if self.perceptual is None:
            return found
        expect_frozen(frozen, self.perceptual)
        size = (_PERCEPTUAL_SIDE, _PERCEPTUAL_SIDE)
        made, real = (resize(z - v, size, "torch-bilinear-corners") for v in (velocity, target))
        seen = self.perceptual(frozen[self.perceptual.name], real, made).mean()
        return found + self.perceptual.weight * seen

    def two_steps(self, flow: Any, z: jax.Array, v: jax.Array, t: jax.Array, cond: Cond) -> tuple[jax.Array, ...]:
        """Gives the point at t (B,) on the student's step with velocity v from z, the flow's velocity there, and the
        velocity from z to where that leads.
        """
        z_t = z - expand(1.0 - t, z) * v
        onward = flow(z_t, t, cond)
        return z_t, onward, z - (z_t - expand(t, z) * onward)

    def loss(
        self,
        student: Params,
        flow: Any,
        frozen: Frozen,
        x: jax.Array,
        z: jax.Array,
        cond: Cond,
        fresh: jax.Array,
        t: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        """Gives the sum of both losses, and each.

        Args:
          flow: (x_t, t, cond) -> velocity of the guiding flow.
          x, z: (B, ...) samples and their noise.
          fresh: like z, other noise.
          t: (B,) where the flow takes over.
        """
        first = jnp.float32(self.times[0])

        def velocity(z: jax.Array) -> jax.Array:
            found: jax.Array = self.denoiser(student, z, first, cond).velocity
            return found

        pair = self.distance(frozen, z, velocity((1.0 - first) * x + first * z), z - x)
        own = velocity(fresh)
        *_, target = jax.lax.stop_gradient(self.two_steps(flow, fresh, own, t, cond))
        guided = self.distance(frozen, fresh, own, target)
        return pair + guided, Aux({"pair_loss": pair, "two_step_loss": guided})

    def takeover(self, u: jax.Array) -> jax.Array:
        """Gives the times (B,) of uniform draws at which the flow takes over."""
        low, high = self.between
        return high - (high - low) * u

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times and noise."""
        time_key, fresh_key, flip_key = jax.random.split(key, 3)
        x, z = self.pairs(batch)
        x, z = self.mirrored(self.draw_flip(flip_key, len(x)), x, z)
        t = self.takeover(jax.random.uniform(time_key, x.shape[:1]))
        data = (x, z, self.cond(batch), jax.random.normal(fresh_key, x.shape), t)
        guide, params = self.guide(state, frozen)

        def flow(z: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
            found: jax.Array = guide(params, z, t, cond).velocity
            return found

        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, flow, frozen, *d), data, schedule)
        return state, metrics

    def guide(self, state: State, frozen: Frozen) -> tuple[Any, Params]:
        """Gives the guiding flow and its parameters."""
        if _FLOW in state.aux:
            return self.denoiser, state.aux[_FLOW]
        return self.teacher.under(self.denoiser.process), frozen["teacher"]
