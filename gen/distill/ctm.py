"""Consistency trajectory models, CTM (Kim et al. 2024, arXiv 2310.02279): jumps from any time to any earlier one.

    G(x_t, t, s) = (s / t) x_t + (1 - s / t) g(x_t, t, s)

is a flow map (`gen.diffusion.flowmap.Jump`). It learns from a teacher that a long jump t -> s agrees with a few of the
teacher's steps t -> u followed by its own jump u -> s, both compared at the data end (soft consistency); that g on
s = t denoises; and, in a second stage, that its images deceive a discriminator. The further terms are weighted so that
they pull as hard as the first at the network's last layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.arrays import flatten
from gen.config import suggest
from gen.diffusion.objectives import Draws
from gen.diffusion.process import expand, pair
from gen.distill.consistency import ode_step
from gen.distill.distances import Norm
from gen.errors import GenError
from gen.nn.adversarial import AdaptiveWeight, hinge_discriminator_loss, linear_generator_loss
from gen.nn.network import Cond, Network, Params, param_shapes, tree_copy
from gen.sampling.guidance import ClassifierFree
from gen.tokenizers.losses import expect_frozen
from gen.training.ema import average
from gen.training.method import FlowMapMethod, given
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part, keep_if, with_buffers
from gen.training.task import Batch, Frozen, Metrics, Program, Schedule, State

__all__ = ["CTMDraws", "CTMTask", "Judges", "discriminator_loss", "generator_loss", "step_law"]

Judges = tuple[jax.Array, ...]  # logits of each of a discriminator's heads


def step_law(most: int) -> np.ndarray:
    """Gives the probabilities (most,) of 1 .. `most` solver steps: in proportion to their number."""
    steps = np.arange(1, most + 1, dtype=np.float64)
    return steps / steps.sum()


def generator_loss(fake: Judges) -> jax.Array:
    """Gives the mean over the heads of the negative mean logit of generated samples."""
    return jnp.stack([linear_generator_loss(logits) for logits in fake]).mean()


def discriminator_loss(real: Judges, fake: Judges) -> jax.Array:
    """Gives the mean over the heads of mean relu(1 - real logit) + mean relu(1 + fake logit)."""
    return jnp.stack([2.0 * hinge_discriminator_loss(a, b) for a, b in zip(real, fake, strict=True)]).mean()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CTMDraws:
    """All randomness of one step. Every array has leading axis B; times are counted on the grid from the noise end.

    Attributes:
      steps: (B,) int32, all equal: solver steps of the teacher.
      start, end: (B,) int32 points of t and of s; u is `steps` behind t.
      eps: like x, the noise of x_t.
      dsm: times and noise of the denoising term.
    """

    steps: jax.Array
    start: jax.Array
    end: jax.Array
    eps: jax.Array
    dsm: Draws


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTMTask(FlowMapMethod):
    """Trains ``student`` and, where there is one, ``discriminator``; even steps move the first, odd ones the second.

    Without a discriminator there is one program. The published recipe is a stage without, then one with. The target
    that both jumps pass through to the data end is an average of the student, through which gradients flow.

    Attributes:
      teacher: the teacher's Denoiser, of the flow map's process.
      guidance: applied to the teacher.
      points: N of the grid ``process.at(0 .. 1)``.
      most: largest number of the teacher's steps between t and u.
      distance: at the data end (`gen.distill.distances`).
      last_layer: "/"-joined path of the student's parameter at which the terms' gradients are compared.
      dsm: weight of the denoising term, the teacher's own objective on s = t; 0 for none.
      high, span: of the denoising term: the share of the batch whose times are ``process.at(1 - span v)``, v uniform,
        instead of the objective's own.
      target_decay: of the target's average.
      discriminator: the network (`gen.nn.discriminators`) that tells samples from data; None for none.
      seen: what it sees of images: a frozen network's tokens (`gen.tokenizers.losses.EncoderTokens`); None for the
        samples themselves.
      discriminator_optim: its optimiser.
      gan: weight of the GAN term.
      gan_range: the adaptive part of that weight is clipped to it.

    Raises GenError for a teacher of another process, a flow map that does not know s = t, and numbers out of range.
    """

    teacher: Any = given("teacher")
    guidance: Any = ClassifierFree()
    points: int = 18
    most: int = 17
    distance: Any = Norm()
    last_layer: str
    dsm: float = 1.0
    high: float = 0.5
    span: float = 0.7
    target_decay: float = 0.999
    discriminator: Any = None
    seen: Any = None
    discriminator_optim: OptimConfig = OptimConfig(2e-3, betas=(0.5, 0.9))
    gan: float = 1.0
    gan_range: tuple[float, float] = (0.01, 10.0)

    def __post_init__(self) -> None:
        if self.teacher.process != self.flow_map.process:
            raise GenError(
                f"the teacher's process is {self.teacher.process}, the student's {self.flow_map.process}; they share "
                "trajectories only where both are equal"
            )
        if not self.flow_map.parameterization.anywhere or self.flow_map.parameterization.diagonal is None:
            raise GenError(
                "a trajectory model jumps anywhere and knows s = t; gen.diffusion.flowmap.jump_map makes one"
            )
        if self.points < 3 or not 1 <= self.most < self.points:
            raise GenError(f"up to {self.most} steps on {self.points} points; expected 1 to points - 1, of 3 at least")
        if min(self.dsm, self.gan) < 0.0 or not (0.0 <= self.high <= 1.0 and 0.0 < self.span <= 1.0):
            raise GenError(
                f"dsm {self.dsm:g}, gan {self.gan:g}, high {self.high:g}, span {self.span:g}; weights are >= 0, the "
                "others shares"
            )
        if not 0.0 <= self.target_decay < 1.0:
            raise GenError(f"target_decay is {self.target_decay:g}; expected a number in [0, 1)")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student, and the discriminator where there is one."""
        if self.discriminator is None:
            return (self.student_part,)
        return (self.student_part, Part("discriminator", self.discriminator, self.discriminator_optim))

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Does what `FlowMapMethod.start` says; a discriminator goes on from the previous stage's or starts afresh."""
        if "teacher" not in frozen:
            raise GenError(f"distillation needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        paths = flatten(param_shapes(self.flow_map.network))
        if self.last_layer not in paths:
            raise GenError(f"the student has no parameter '{self.last_layer}'; {suggest(self.last_layer, paths)}")
        self.distance.expect(frozen)
        found = super().start(key, frozen, previous)
        if self.discriminator is None:
            return found
        if self.seen is not None:
            expect_frozen(frozen, self.seen)
        if previous is not None and "discriminator" in previous.params:
            return {**found, "discriminator": previous.params["discriminator"]}
        return {**found, "discriminator": Network(self.discriminator).init(jax.random.fold_in(key, 1))}

    def init(self, key: jax.Array, frozen: Frozen, previous: State | None) -> State:
        """Does what `Method.init` says; the target goes on, or starts as the student."""
        state = super().init(key, frozen, previous)
        before = {} if previous is None else previous.aux
        target = tree_copy(before.get("target", state.params["student"]))
        return dataclasses.replace(state, aux=state.aux | {"target": target})

    @property
    def programs(self) -> Mapping[str, Program]:
        """Gives ``student`` and, where there is a discriminator, ``discriminator``."""
        programs: dict[str, Program] = {"student": self.update}
        return programs if self.discriminator is None else programs | {"discriminator": self.update_discriminator}

    def select(self, step: int) -> str:
        """Alternates where there is a discriminator."""
        return "student" if self.discriminator is None or step % 2 == 0 else "discriminator"

    def updates(self, part: str, steps: int) -> int:
        """Counts half of the steps for each of two parts."""
        if self.discriminator is None:
            return steps
        return (steps + 1) // 2 if part == "student" else steps // 2

    @property
    def times(self) -> np.ndarray:
        """Gives the grid (points,) float64, noise end first."""
        return np.asarray(self.flow_map.process.at(np.linspace(1.0, 0.0, self.points)), np.float64)

    def draw(self, key: jax.Array, x: jax.Array) -> CTMDraws:
        """Draws all random numbers of a step for data shaped like x (B, ...)."""
        keys, b = jax.random.split(key, 6), x.shape[0]
        steps = 1 + jax.random.choice(keys[0], self.most, (), p=jnp.asarray(step_law(self.most), jnp.float32))
        start = self._below(keys[1], b, self.points - steps)
        end = start + steps + self._below(keys[2], b, self.points - start - steps)
        dsm = self.teacher.objective.draw(keys[4], self.flow_map.process, x)
        dsm = dataclasses.replace(dsm, t=self.dsm_times(dsm.t, jax.random.uniform(keys[5], (b,))))
        return CTMDraws(jnp.full((b,), steps, jnp.int32), start, end, jax.random.normal(keys[3], x.shape), dsm)

    @staticmethod
    def _below(key: jax.Array, count: int, bound: jax.Array) -> jax.Array:
        """Uniform integers (count,) in [0, bound), whose bound is traced."""
        drawn = jnp.floor(jax.random.uniform(key, (count,)) * bound).astype(jnp.int32)
        return jnp.minimum(drawn, bound - 1)

    def dsm_times(self, own: jax.Array, v: jax.Array) -> jax.Array:
        """Gives the denoising term's times: the objective's `own` (B,), and for the last samples those of `v` (B,)."""
        b = own.shape[0]
        high = self.flow_map.process.at(1.0 - self.span * v)
        return jnp.where(jnp.arange(b) < b - int(b * self.high), own, high)

    def jump(self, params: Params, x: jax.Array, t: jax.Array, s: jax.Array, cond: Cond) -> jax.Array:
        """Gives G(x_t, t, s); x itself where t is at the data end already."""
        first = float(self.times[-1])
        least = float(self.times[-2])  # stands for t at the data end, where no noise is left to divide by
        moves = t > first
        jumped = self.flow_map(params, x, jnp.where(moves, t, least), s, cond)
        return jnp.where(expand(moves, x), jumped, x)

    def at_end(self, target: Params, x: jax.Array, s: jax.Array, cond: Cond) -> jax.Array:
        """Gives the target's jump from x_s to the data end."""
        return self.jump(target, x, s, jnp.full_like(s, float(self.times[-1])), cond)

    def solve(self, teacher: Params, x: jax.Array, draws: CTMDraws, cond: Cond) -> jax.Array:
        """Gives x_u, the (guided) teacher's Heun steps from x_t over neighbouring points of the grid; no gradient."""
        guided = self.guidance(self.teacher.bind(teacher), lambda c: self.teacher.net.apply(teacher, c, method="null"))
        grid = jnp.asarray(self.times, jnp.float32)

        def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
            prediction, _ = guided(x, t, cond, jnp.int32(0), self.guidance.init(x))
            found: jax.Array = prediction.velocity
            return found

        def body(i: jax.Array, x: jax.Array) -> jax.Array:
            return ode_step(velocity, x, grid[draws.start + i], grid[draws.start + i + 1], "heun")

        return jax.lax.fori_loop(0, draws.steps[0], body, jax.lax.stop_gradient(x))

    def estimate(self, params: Params, target: Params, x: jax.Array, cond: Cond, draws: CTMDraws) -> jax.Array:
        """Gives the student's jump t -> s, taken on to the data end by the target: the sample that all terms judge."""
        grid = jnp.asarray(self.times, jnp.float32)
        t, s = grid[draws.start], grid[draws.end]
        a, sigma = pair(self.flow_map.process, t, x)
        return self.at_end(target, self.jump(params, a * x + sigma * draws.eps, t, s, cond), s, cond)

    def reference(
        self, params: Params, target: Params, teacher: Params, x: jax.Array, cond: Cond, draws: CTMDraws
    ) -> jax.Array:
        """Gives what the estimate is brought to: the teacher's steps t -> u, the student's jump to s, the target's."""
        grid = jnp.asarray(self.times, jnp.float32)
        t, u, s = grid[draws.start], grid[draws.start + draws.steps], grid[draws.end]
        a, sigma = pair(self.flow_map.process, t, x)
        x_u = self.solve(teacher, a * x + sigma * draws.eps, draws, cond)
        return jax.lax.stop_gradient(self.at_end(target, self.jump(params, x_u, u, s, cond), s, cond))

    def dsm_losses(self, params: Params, x: jax.Array, cond: Cond, draws: CTMDraws) -> jax.Array:
        """Gives the denoising term (B,): the teacher's native objective on s = t."""
        objective = self.teacher.objective
        denoiser = self.flow_map.diagonal(objective)
        losses: jax.Array = objective.loss(
            lambda x_t, t, c: denoiser(params, x_t, t, c), self.flow_map.process, x, cond, draws.dsm
        )[0]
        return losses

    def judged(self, discriminator: Params, frozen: Frozen, x: jax.Array) -> tuple[Judges, Mapping[str, jax.Array]]:
        """Gives the discriminator's logits of samples (B, ...), and the new values of its buffers."""
        seen = x if self.seen is None else self.seen(frozen[self.seen.name], x)
        logits, statistics = Network(self.discriminator)(discriminator, seen)
        return logits if isinstance(logits, tuple) else (logits,), statistics

    def student_loss(
        self,
        params: Params,
        target: Params,
        discriminator: Params | None,
        frozen: Frozen,
        x: jax.Array,
        cond: Cond,
        draws: CTMDraws,
    ) -> tuple[jax.Array, Aux]:
        """Gives the student's loss and its terms, each with its weight.

        Args:
          target: parameters of the averaged target; discriminator: None for no GAN term.
        """
        reference = self.reference(params, target, frozen["teacher"], x, cond, draws)

        def consistency(params: Params) -> jax.Array:
            found: jax.Array = self.distance(frozen, self.estimate(params, target, x, cond, draws), reference).mean()
            return found

        terms: dict[str, tuple[Callable[[Params], jax.Array], float, tuple[float, float]]] = {}
        if self.dsm:
            terms["dsm"] = (lambda p: self.dsm_losses(p, x, cond, draws).mean(), self.dsm, (0.0, 1e4))
        if discriminator is not None:
            given = discriminator

            def gan(params: Params) -> jax.Array:
                return generator_loss(self.judged(given, frozen, self.estimate(params, target, x, cond, draws))[0])

            terms["gan"] = (gan, self.gan, self.gan_range)
        total = consistency(params)
        metrics = {"consistency": total}
        pull = self.pull(params, consistency)
        for name, (term, outer, (low, high)) in terms.items():
            weight = jnp.clip(AdaptiveWeight()(pull, self.pull(params, term)), low, high)
            value = term(params)
            metrics |= {name: value, f"{name}_weight": weight}
            total = total + outer * weight * value
        return total, Aux(metrics)

    def pull(self, params: Params, term: Callable[[Params], jax.Array]) -> jax.Array:
        """Gives the gradient of a term at the last layer, the other parameters held."""
        held = jax.lax.stop_gradient(params)
        return jax.grad(lambda last: term(with_buffers(held, {self.last_layer: last})))(flatten(held)[self.last_layer])

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the student, and moves the target."""
        x, target, judge = self.data(batch), state.aux["target"], state.params.get("discriminator")
        data = (x, self.cond(batch), self.draw(key, x))

        def loss(params: Params, data: Any) -> tuple[jax.Array, Aux]:
            return self.student_loss(params, target, judge, frozen, *data)

        state, metrics, _ = self.student_part.update(state, loss, data, schedule)
        moved = average(target, state.params["student"], jnp.float32(1.0 - self.target_decay))
        moved = keep_if(metrics["skipped"] == 0, moved, target)
        state = dataclasses.replace(state, aux=state.aux | {"target": moved})
        return state, metrics if self.discriminator is None else self.student_part.named(metrics)

    def update_discriminator(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one update of the discriminator against the student's samples."""
        x, target, student = self.data(batch), state.aux["target"], state.params["student"]
        data = (x, self.cond(batch), self.draw(key, x))

        def loss(params: Params, data: Any) -> tuple[jax.Array, Aux]:
            x, cond, draws = data
            fake = jax.lax.stop_gradient(self.estimate(student, target, x, cond, draws))
            on_data, first = self.judged(params, frozen, x)
            on_fake, second = self.judged(with_buffers(params, first), frozen, fake)
            return discriminator_loss(on_data, on_fake), Aux(buffers=second)

        part = self.parts[1]
        state, metrics, _ = part.update(state, loss, data, schedule)
        return state, part.named(metrics)
