"""Consistency models: distillation and training, improved training, easy tuning, truncated training.

A consistency model f maps every point of a trajectory of the probability flow to its data end. It learns that from
neighbours: f(x_t, t) is brought to sg f(x_r, r) at an earlier time r < t of the same trajectory, which a teacher's step
gives (distillation, CD) or the data themselves with the same noise (training, CT). At the data end f is the identity,
and from there the answer travels to the noise. One call from noise makes a sample.

Papers: CM, Song et al. 2023 (arXiv 2303.01469); iCT, Song and Dhariwal 2024 (arXiv 2310.14189); ECT, Geng et al. 2024
(arXiv 2406.14548); TCM, Lee et al. 2024 (arXiv 2410.14895). What the methods differ in are the settings: the law of the
pairs (`gen.distill.pairs`), the distance, its weight, and the target's parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.config import check_choices
from gen.diffusion.consistency_maps import deviation
from gen.diffusion.process import expand, pair
from gen.distill.distances import PseudoHuber
from gen.distill.pairs import Doubling, GridPairs, LogLevels, Pair, ShrinkingPairs, at_level, level_of
from gen.errors import GenError
from gen.nn.network import Cond, Params, tree_copy
from gen.sampling.guidance import ClassifierFree
from gen.training.ema import average
from gen.training.method import FlowMapMethod, given
from gen.training.part import Aux, keep_if
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["ConsistencyDistillationTask", "ConsistencyTask", "TruncatedTask", "Weight", "ode_step", "weighting"]

Weight = Literal[
    "uniform", "snr", "snr+1", "karras", "truncated-snr", "inverse-gap", "inverse-root-gap", "c-out", "c-out-squared"
]
Solver = Literal["euler", "heun"]
_LEAST = 1e-6  # stands for t = 0 in networks that see its logarithm


def weighting(weight: Weight, level: jax.Array, gap: jax.Array, data: float) -> jax.Array:
    """Gives the factor (B,) on the distance.

    Args:
      weight: of the level s: ``snr`` s^-2, ``snr+1``, ``karras`` s^-2 + data^-2, ``truncated-snr`` max(s^-2, 1),
        ``c-out`` sqrt(s^2 + data^2) / (s data) and its square; of the gap: ``inverse-gap`` 1 / (t - r), and its root.
      level: (B,) noise levels of the student's times; may be infinite.
      gap: (B,) t - r.
      data: standard deviation of the data.
    """
    snr = level**-2.0
    match weight:
        case "snr":
            return snr
        case "snr+1":
            return snr + 1.0
        case "karras":
            return snr + data**-2.0
        case "truncated-snr":
            return jnp.maximum(snr, 1.0)
        case "inverse-gap":
            return 1.0 / gap
        case "inverse-root-gap":
            return jax.lax.rsqrt(gap)
        case "c-out":
            return jnp.sqrt(snr + data**-2.0)
        case "c-out-squared":
            return snr + data**-2.0
    return jnp.ones_like(gap)


def ode_step(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, t: jax.Array, r: jax.Array, solver: Solver
) -> jax.Array:
    """Gives x_r from x_t by one step of the probability flow, without gradient.

    Args:
      velocity: (x_t, t) -> d x_t / d t.
      t, r: (B,) where the step starts and ends.
    """
    h, v = expand(r - t, x), velocity(x, t)
    if solver == "heun":
        v = 0.5 * (v + velocity(x + h * v, r))
    return jax.lax.stop_gradient(x + h * v)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyTask(FlowMapMethod):
    """Consistency training: the target's point has the student's own data and noise. The defaults are iCT's.

    Easy tuning is this task on `gen.distill.pairs.ShrinkingPairs` from a pretrained network. Networks that drop
    activations drop the same ones in student and target.

    Attributes:
      pairs: the law of the two times.
      distance: of the two answers (`gen.distill.distances`).
      weight: on the distance, see `weighting`.
      target_decay: the target's parameters are an average of the student's with this decay, which a progressive grid
        brings nearer to 1 as it grows (arXiv 2303.01469, app. C); None where they are the student's own.

    Raises GenError for a flow map that jumps elsewhere than to the data end, a decay outside [0, 1], and an averaged
    target without a grid.
    """

    pairs: Any = GridPairs(Doubling(), mean=-1.1)
    distance: Any = PseudoHuber()
    weight: Weight = "inverse-gap"
    target_decay: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.flow_map.parameterization.anywhere:
            raise GenError(
                f"{type(self).__name__} trains the jump to the data end alone, and "
                f"{type(self.flow_map.parameterization).__name__} jumps anywhere; give it a consistency function "
                "(gen.diffusion.consistency_maps)"
            )
        if self.target_decay is not None and not 0.0 < self.target_decay < 1.0:
            raise GenError(f"target_decay is {self.target_decay:g}; expected a number between 0 and 1, or None")
        if self.target_decay is not None and not isinstance(self.pairs, GridPairs):
            raise GenError("a target of averaged parameters follows the curriculum of a grid; give the pairs one")

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Method.init` says; an averaged target starts as the student."""
        self.distance.expect(frozen)
        state = super().init(key, frozen, previous)
        if self.target_decay is None:
            return state
        return dataclasses.replace(state, aux=state.aux | {"target": tree_copy(state.params["student"])})

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives what the law of the pairs depends on, and ``target_decay``."""
        found = dict(self.pairs.schedule(self.flow_map.process, step, steps))
        if self.target_decay is not None:
            found["target_decay"] = np.float32(self.pairs.curriculum.decay(self.target_decay, step, steps))
        return found

    @property
    def derived(self) -> bool:
        """Tells whether the learning rate or the grid follows the length of the stage."""
        return super().derived or bool(self.pairs.derived)

    def f(self, params: Params, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        """Gives the consistency function at x_t; at t = 0 it is x_t."""
        end = jnp.float32(self.flow_map.process.t_min)
        jumped = self.flow_map(params, x, jnp.maximum(t, _LEAST), end, cond)
        return jnp.where(expand(t > 0.0, x), jumped, x)

    def earlier(self, frozen: Frozen, x: jax.Array, x_t: jax.Array, eps: jax.Array, times: Pair, cond: Cond) -> Any:
        """Gives x_r, the target's point: the data with the student's noise."""
        del frozen, x_t, cond
        a, s = pair(self.flow_map.process, times.r, x)
        return a * x + s * eps

    def target(self, params: Params, state: Mapping[str, Any], x_r: jax.Array, r: jax.Array, cond: Cond) -> jax.Array:
        """Gives the target's answer.

        Args:
          params: the student's parameters.
          state: further arrays of the state, "target" among them where its parameters are an average.
        """
        return self.f(state.get("target", params), x_r, r, cond)

    def losses(
        self,
        params: Params,
        frozen: Frozen,
        state: Mapping[str, Any],
        x: jax.Array,
        cond: Cond,
        times: Pair,
        eps: jax.Array,
    ) -> jax.Array:
        """Gives weight(t, r) d(f(x_t, t), sg f(x_r, r)) (B,) for data x and noise eps (B, ...)."""
        process = self.flow_map.process
        a, s = pair(process, times.t, x)
        x_t = a * x + s * eps
        x_r = self.earlier(frozen, x, x_t, eps, times, cond)
        target = jax.lax.stop_gradient(self.target(params, state, x_r, times.r, cond))
        weight = weighting(self.weight, level_of(process, times.t), times.gap, deviation(process))
        distance: jax.Array = self.distance(frozen, self.f(params, x_t, times.t, cond), target)
        return weight * distance

    def draw(self, key: jax.Array, x: jax.Array, schedule: Schedule) -> tuple[Pair, jax.Array]:
        """Draws the pairs of times and the factors (B,) on the samples' losses for data x (B, ...)."""
        return self.pairs.draw(key, self.flow_map.process, x.shape[0], schedule), jnp.ones(x.shape[:1])

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times and noise, and moves the target."""
        time_key, eps_key, dropout_key = jax.random.split(key, 3)
        x, cond = self.data(batch), self.cond(batch)
        if self.flow_map.network.dropout:
            cond["dropout"] = jax.random.split(dropout_key, x.shape[0])
        times, share = self.draw(time_key, x, schedule)
        data = (x, cond, times, share, jax.random.normal(eps_key, x.shape))

        def loss(params: Params, data: Any) -> tuple[jax.Array, Aux]:
            x, cond, times, share, eps = data
            losses = self.losses(params, frozen, state.aux, x, cond, times, eps)
            return (share * losses).mean(), Aux({"gap": times.gap.mean()})

        new, metrics, _ = self.student_part.update(state, loss, data, schedule)
        if self.target_decay is not None:
            moved = average(state.aux["target"], new.params["student"], 1.0 - schedule["target_decay"])
            moved = keep_if(metrics["skipped"] == 0, moved, state.aux["target"])
            new = dataclasses.replace(new, aux=new.aux | {"target": moved})
        return new, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyDistillationTask(ConsistencyTask):
    """Consistency distillation: a step of the teacher's probability flow gives the target's point.

    Attributes:
      teacher: the teacher's Denoiser, of the flow map's process.
      guidance: applied to the teacher.
      solver: of the step: ``heun`` (two calls of the teacher) or ``euler``.

    Raises GenError for a teacher of another process.
    """

    teacher: Any = given("teacher")
    guidance: Any = ClassifierFree()
    solver: Solver = "heun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.process != self.flow_map.process:
            raise GenError(
                f"the teacher's process is {self.teacher.process}, the student's {self.flow_map.process}; they share "
                "trajectories only where both are equal"
            )

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Does what `FlowMapMethod.start` says. Raises GenError without a teacher."""
        if "teacher" not in frozen:
            raise GenError(f"distillation needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        return super().start(key, frozen, previous)

    def earlier(self, frozen: Frozen, x: jax.Array, x_t: jax.Array, eps: jax.Array, times: Pair, cond: Cond) -> Any:
        """Gives x_r by the teacher's step from x_t."""
        del x, eps
        teacher, own = frozen["teacher"], {name: value for name, value in cond.items() if name != "dropout"}
        guided = self.guidance(self.teacher.bind(teacher), lambda c: self.teacher.net.apply(teacher, c, method="null"))

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            prediction, _ = guided(x, t, own, jnp.int32(0), self.guidance.init(x))
            found: jax.Array = prediction.velocity
            return found

        return ode_step(velocity, x_t, times.t, jnp.maximum(times.r, _LEAST), self.solver)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedTask(ConsistencyTask):
    """The second stage of truncated consistency training: only levels above the transition t' are trained.

    Below t' stands the frozen model of the first stage, the average of the previous stage's student or
    ``frozen["teacher"]``. A share of the batch starts at t' itself, where its target is that model: the boundary
    condition, without which the student collapses to a constant (arXiv 2410.14895, sec. 4).

    Attributes:
      pairs: as in the first stage; its levels are truncated from below at t'.
      share: of the batch that is held to the boundary.
      boundary: weight of the mean of its losses.

    Raises GenError for pairs without a lowest level, and a share outside [0, 1].
    """

    pairs: Any = ShrinkingPairs(LogLevels(0.0, 0.2, freedom=0.01, low=1.0, high=80.0))
    share: float = 0.25
    boundary: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = getattr(self.pairs, "levels", None)
        if getattr(levels, "low", None) is None:
            raise GenError("truncated training needs pairs whose levels end below at the transition; give them a low")
        if not 0.0 < self.share < 1.0:
            raise GenError(f"the boundary's share is {self.share:g}; expected a number between 0 and 1")

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Method.init` says: student and frozen model start as the first stage's average."""
        if previous is not None:
            first = self.student_part.averaged(previous)
            previous = dataclasses.replace(previous, params=previous.params | {"student": first})
        elif "teacher" not in frozen:
            raise GenError("truncated training goes on from a consistency model; make it the second stage of one")
        state = super().init(key, frozen, previous)
        return dataclasses.replace(state, aux=state.aux | {"below": tree_copy(state.params["student"])})

    def target(self, params: Params, state: Mapping[str, Any], x_r: jax.Array, r: jax.Array, cond: Cond) -> jax.Array:
        """Gives the student's answer from t' on and the frozen model's below."""
        above = r >= at_level(self.flow_map.process, jnp.float32(self.pairs.levels.low))
        return jnp.where(
            expand(above, x_r), super().target(params, state, x_r, r, cond), self.f(state["below"], x_r, r, cond)
        )

    def draw(self, key: jax.Array, x: jax.Array, schedule: Schedule) -> tuple[Pair, jax.Array]:
        """Draws pairs, a share of them at t'; the mean over the batch is the sum of both means."""
        level_key, order_key = jax.random.split(key)
        b = x.shape[0]
        order = jax.random.permutation(order_key, b)
        return self.pairs_of(self.pairs.levels(level_key, b), order, schedule["left"])

    def pairs_of(self, level: jax.Array, order: jax.Array, left: Any) -> tuple[Pair, jax.Array]:
        """Gives the pairs and factors of levels (B,); the samples first in `order` (B,) are those at the boundary.

        Raises GenError for a batch that is too small to hold both kinds.
        """
        b = level.shape[0]
        held = int(b * self.share)
        if not 0 < held < b:
            raise GenError(f"a batch of {b} holds {held} samples at the boundary; it needs some of both kinds")
        mask = jnp.zeros(b, bool).at[order[:held]].set(True)
        level = jnp.where(mask, self.pairs.levels.low, level)
        factor = jnp.where(mask, self.boundary * b / held, b / (b - held))
        return self.pairs.pairs(self.flow_map.process, level, left), factor
