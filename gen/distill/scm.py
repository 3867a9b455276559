"""Continuous-time consistency models, sCM (Lu and Song 2024, arXiv 2410.11081): sCT trains, sCD distils.

The gap between the two times of a consistency loss goes to zero. What is left is a tangent: the change of f along the
trajectory, which one forward-mode derivative of the network gives. TrigFlow keeps every factor of it bounded,

    x_t = cos t x + sin t z,    f(x_t, t) = cos t x_t - sin t sigma_data F(x_t / sigma_data, t),

and the tangent is normalised. A small network learns how large errors are at each time and weighs them alike.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.config import check_choices
from gen.diffusion.flowmap import Value
from gen.diffusion.process import TrigFlow, expand, pair
from gen.distill.pairs import LogLevels
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params
from gen.sampling.guidance import ClassifierFree
from gen.training.method import FlowMapMethod, given
from gen.training.optim import OptimConfig
from gen.training.part import Aux, Part
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["SCDTask", "SCMTask", "Scaling", "TimeWeight", "normalised", "scm_loss", "squared_error", "tangent"]

Scaling = Literal["mean", "sum"]


def tangent(value: jax.Array, moved: jax.Array, velocity: jax.Array, x: jax.Array, t: jax.Array, r: Any) -> jax.Array:
    """Gives g = -cos^2 t (sigma_data F - dx/dt) - r (cos t sin t x_t + sigma_data dF/dt) (algorithm 1), unnormalised.

    With r = 1 it is cos t df/dt.

    Args:
      value: sigma_data F (B, ...), the network's velocity.
      moved: its derivative along (cos t sin t dx/dt, cos t sin t) in (x_t, t).
      velocity: dx/dt of the trajectory.
      x: x_t; t: (B,) angles.
      r: rises from 0 to 1, the warm-up of the part with the derivative.
    """
    cos, sin = expand(jnp.cos(t), x), expand(jnp.sin(t), x)
    return -cos * cos * (value - velocity) - r * (cos * sin * x + moved)


def normalised(g: jax.Array, c: float, scaling: Scaling) -> jax.Array:
    """Gives g / (||g|| + c) over each sample of (B, ...): the root of the sum of squares, or of their mean."""
    flat = g.reshape(g.shape[0], -1)
    norm = jnp.linalg.norm(flat, axis=1) * (flat.shape[1] ** -0.5 if scaling == "mean" else 1.0)
    return g / expand(norm + c, g)


def squared_error(F: jax.Array, g: jax.Array) -> jax.Array:
    """Gives mean (F - sg(F) - g)^2 (B,), whose gradient in F is -2 g / D; in value it is the mean of g^2."""
    error = jnp.square(F - jax.lax.stop_gradient(F + g))
    return error.reshape(error.shape[0], -1).mean(1)


def scm_loss(error: jax.Array, logvar: jax.Array, prior: jax.Array, size: int, scaling: Scaling) -> jax.Array:
    """Gives prior exp(-logvar) error + logvar (B,); ``mean`` divides the first term by D = `size`.

    Args:
      error: (B,) `squared_error`.
      logvar: (B,) the learned -w(t).
      prior: (B,) a fixed factor, 1 / (sigma_data tan t).
    """
    return prior * jnp.exp(-logvar) * error / (size if scaling == "mean" else 1) + logvar


@dataclasses.dataclass(frozen=True)
class TimeWeight:
    """The learned weight of a time: one linear layer on a sinusoidal embedding of ln(level) / 4, zero at the start.

    Attributes:
      width: of the embedding.
    """

    width: int = 128

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the module, which takes levels (B,) to logarithms of variances (B,)."""
        return _TimeWeight(self, rngs)


class _TimeWeight(nnx.Module):
    def __init__(self, config: TimeWeight, rngs: nnx.Rngs) -> None:
        self.half = config.width // 2
        self.out = nnx.Linear(config.width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, level: jax.Array) -> jax.Array:
        frequencies = 100.0 ** (-np.arange(self.half) / self.half) * np.pi
        angles = 0.25 * jnp.log(level)[:, None] * jnp.asarray(frequencies, jnp.float32)
        return self.out(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1))[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCMTask(FlowMapMethod):
    """Continuous-time consistency training, sCT: the trajectory's velocity is that of data and noise.

    The flow map is one on TrigFlow (`gen.diffusion.consistency_maps.trig_map`). Log the raw norm ``tangent`` and not
    the loss, whose value hardly moves.

    Attributes:
      levels: the law of the noise levels sigma_data tan t.
      warmup: steps over which the part with the derivative comes in.
      c: in the normalisation of the tangent.
      scaling: ``sum``, the paper's norm of the tangent; or ``mean``, the root mean square and a loss over D, with which
        gradients are sqrt(D) smaller.
      weight_optim: the optimiser of the learned weight.

    Raises GenError for a flow map that is not TrigFlow's, and numbers that are not positive.
    """

    levels: LogLevels = LogLevels(-1.0, 1.4)
    warmup: int = 10_000
    c: float = 0.1
    scaling: Scaling = "sum"
    weight_optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        check_choices(self)
        if not isinstance(self.flow_map.process, TrigFlow):
            raise GenError(
                f"continuous-time consistency models live on the trig-flow process, not "
                f"{type(self.flow_map.process).__name__}; make the flow map by gen.diffusion.consistency_maps.trig_map"
            )
        if self.warmup < 1 or self.c <= 0.0:
            raise GenError(f"a warm-up of {self.warmup} steps and c = {self.c:g}; both are positive")

    @property
    def weight_part(self) -> Part:
        """Gives the part of the learned weight."""
        return Part("weight", TimeWeight(), self.weight_optim)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gives the student and the learned weight."""
        return (self.student_part, self.weight_part)

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Does what `FlowMapMethod.start` says; the weight starts at 1."""
        weight = Network(TimeWeight()).init(jax.random.fold_in(key, 1))
        return {**super().start(key, frozen, previous), "weight": weight}

    def schedules(self, step: int, steps: int) -> Mapping[str, Any]:
        """Gives ``r``, the share of the part with the derivative."""
        del steps
        return {"r": np.float32(min(1.0, step / self.warmup))}

    def velocity(
        self, frozen: Frozen, x: jax.Array, eps: jax.Array, x_t: jax.Array, t: jax.Array, cond: Cond
    ) -> jax.Array:
        """Gives dx/dt = cos t z - sin t x of data and noise."""
        del frozen, x_t, cond
        process = self.flow_map.process
        return expand(process.dalpha(t), x) * x + expand(process.dsigma(t), x) * eps

    def derivative(self, params: Params, x_t: jax.Array, t: jax.Array, velocity: jax.Array, cond: Cond) -> Value:
        """Gives sigma_data F and its derivative along (cos t sin t dx/dt, cos t sin t), in one pass."""
        speed = jnp.cos(t) * jnp.sin(t)
        direction = (expand(speed, x_t) * velocity, speed, jnp.zeros_like(t))
        return self.flow_map.jvp(params, (x_t, t, jnp.zeros_like(t)), direction, cond)

    def errors(
        self, params: Params, frozen: Frozen, x: jax.Array, cond: Cond, t: jax.Array, eps: jax.Array, r: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Gives `squared_error` (B,), differentiable in F alone, and the raw norms of the tangents (B,).

        Args:
          x, eps: (B, ...) data and unit normal noise; t: (B,) angles; r: see `tangent`.
        """
        a, s = pair(self.flow_map.process, t, x)
        x_t = a * x + s * eps
        velocity = self.velocity(frozen, x, eps, x_t, t, {name: v for name, v in cond.items() if name != "dropout"})
        found = self.derivative(params, x_t, t, velocity, cond)
        assert found.tangent is not None  # `derivative` asks for one
        g = jax.lax.stop_gradient(tangent(found.value, found.tangent, velocity, x_t, t, r))
        error = squared_error(found.value / self.flow_map.process.sigma_data, normalised(g, self.c, self.scaling))
        return error, jnp.linalg.norm(g.reshape(g.shape[0], -1), axis=1)

    def loss(self, error: jax.Array, weight: Params, t: jax.Array) -> jax.Array:
        """Gives the weighted mean loss () of errors (B,) at angles t (B,)."""
        level = self.flow_map.process.sigma_data * jnp.tan(t)
        size = int(np.prod(self.shape))
        return scm_loss(error, Network(TimeWeight())(weight, level), 1.0 / level, size, self.scaling).mean()

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step of the student, and one of the weight on the same errors."""
        level_key, eps_key, dropout_key = jax.random.split(key, 3)
        x, cond, process = self.data(batch), self.cond(batch), self.flow_map.process
        if self.flow_map.network.dropout:
            cond["dropout"] = jax.random.split(dropout_key, x.shape[0])
        t = jnp.arctan(self.levels(level_key, x.shape[0]) / process.sigma_data)
        data = (x, cond, t, jax.random.normal(eps_key, x.shape))
        weight = state.params["weight"]

        def student(params: Params, data: Any) -> tuple[jax.Array, Aux]:
            x, cond, t, eps = data
            error, norms = self.errors(params, frozen, x, cond, t, eps, schedule["r"])
            return self.loss(error, weight, t), Aux({"tangent": norms.mean()}, out=jax.lax.stop_gradient(error))

        state, metrics, error = self.student_part.update(state, student, data, schedule)
        state, more, _ = self.weight_part.update(
            state, lambda w, d: (self.loss(d[0], w, d[1]), Aux()), (error, t), schedule
        )
        return state, {**self.student_part.named(metrics), **self.weight_part.named(more)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SCDTask(SCMTask):
    """Continuous-time consistency distillation, sCD: the teacher gives the trajectory's velocity.

    Attributes:
      teacher: the teacher's Denoiser, of any process.
      guidance: applied to the teacher.
    """

    teacher: Any = given("teacher")
    guidance: Any = ClassifierFree()

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Does what `SCMTask.start` says. Raises GenError without a teacher."""
        if "teacher" not in frozen:
            raise GenError(f"distillation needs the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        return super().start(key, frozen, previous)

    def velocity(
        self, frozen: Frozen, x: jax.Array, eps: jax.Array, x_t: jax.Array, t: jax.Array, cond: Cond
    ) -> jax.Array:
        """Gives dx/dt as the guided teacher says."""
        del x, eps
        teacher = frozen["teacher"]
        guided = self.guidance(
            self.teacher.under(self.flow_map.process).bind(teacher),
            lambda c: self.teacher.net.apply(teacher, c, method="null"),
        )
        prediction, _ = guided(x_t, t, cond, jnp.int32(0), self.guidance.init(x_t))
        return jax.lax.stop_gradient(prediction.velocity)
