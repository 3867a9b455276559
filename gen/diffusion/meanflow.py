"""MeanFlow: one-step generation by learning the average velocity of a flow (Geng et al. 2025, arXiv 2505.13447).

The average velocity u(x_t, t, s) over [s, t] satisfies u = v - (t - s) du/dt, where d/dt goes along the flow with s
fixed. The right-hand side, with the network's own derivative, is the target of a regression: no teacher, no schedule,
one network. With a teacher its (guided) velocity takes the place of the conditional one, and the flow map starts from
the teacher's weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gen.diffusion.conversions import rectified
from gen.diffusion.denoiser import Denoiser, Predict, drop
from gen.diffusion.flowmap import AverageVelocity, FlowMap
from gen.diffusion.objectives import Draws, noised
from gen.diffusion.process import expand
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.training.method import FlowMapMethod
from gen.training.part import Aux
from gen.training.task import Batch, Frozen, Metrics, Schedule, State

__all__ = ["AverageVelocityMethod", "MeanFlowTask", "adaptive_loss", "average_map", "guided_velocity"]


def average_map(denoiser: Denoiser, second: Literal["duration", "halvings"] = "duration") -> FlowMap:
    """Gives the flow map that starts as a denoiser seen as a rectified flow: its network with a second time.

    So MeanFlow (arXiv 2505.13447) and shortcut models (arXiv 2410.12557) start from a teacher's weights.

    Args:
      second: what that time is, see `AverageVelocity`; a duration on the scale of the network's own time.
    """
    flow = rectified(denoiser)
    scale = flow.parameterization.scale if isinstance(flow.parameterization, Predict) else 1.0
    network = dataclasses.replace(flow.network, times=2)
    return FlowMap(network, flow.process, AverageVelocity(second, scale, flow.parameterization))


def guided_velocity(
    v: jax.Array, unconditional: jax.Array, conditional: jax.Array | None, omega: jax.Array, kappa: jax.Array
) -> jax.Array:
    """Gives omega v + (1 - omega - kappa) v_u + kappa v_c (arXiv 2505.13447): the guided velocity that is learned.

    Its scale of classifier-free guidance is omega / (1 - kappa).

    Args:
      v: (B, ...) velocity of the sample.
      unconditional, conditional: the network's own velocities v_u and v_c; no v_c where kappa is 0.
      omega, kappa: (B,).
    """
    omega, kappa = expand(omega, v), expand(kappa, v)
    guided = omega * v + (1.0 - omega - kappa) * unconditional
    return guided if conditional is None else guided + kappa * conditional


def adaptive_loss(squares: jax.Array, power: float, floor: float) -> jax.Array:
    """Gives S / stopgrad((S + floor)^power) for squared errors S (B,), summed over the data (arXiv 2505.13447).

    With power 1 the value is about 1 whatever the error.
    """
    return squares / jax.lax.stop_gradient((squares + floor) ** power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageVelocityMethod(FlowMapMethod):
    """What methods share that train a flow map's average velocity, from data alone or from a teacher as well.

    Attributes:
      dropout: share of samples trained on the network's null condition.
      teacher: a Denoiser of any process, ``frozen["teacher"]``, whose velocity is learned in place of the samples' own;
        None for none. A network of the teacher's family takes over its arrays that fit.
      guidance: of the teacher (`gen.sampling.guidance`); None for none.

    Raises GenError for a dropout outside [0, 1), guidance without a teacher, and a teacher of other data.
    """

    dropout: float = 0.1
    teacher: Any = None
    guidance: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise GenError(f"label dropout is {self.dropout}; expected a share in [0, 1)")
        if self.guidance is not None and self.teacher is None:
            raise GenError("the guidance is a teacher's, and there is none; give a teacher, or leave it out")
        if self.teacher is not None and self.teacher.network.shape != self.flow_map.network.shape:
            raise GenError(
                f"the teacher's data are {self.teacher.network.shape} and the flow map's "
                f"{self.flow_map.network.shape}; give the student the size and channels of its teacher"
            )

    @property
    def classes_at(self) -> str:
        """Gives the path of the network's number of classes; "" where that is a teacher's."""
        return "" if self.teacher is not None else super().classes_at

    def start(self, key: jax.Array, frozen: Frozen, previous: State | None) -> Mapping[str, Any]:
        """Gives the previous stage's weights, what fits of a teacher of the same family, or random ones.

        Raises GenError for a missing frozen teacher, where the configuration has one.
        """
        if self.teacher is not None and "teacher" not in frozen:
            raise GenError(f"this flow map learns from the frozen role 'teacher'; got {', '.join(frozen) or 'none'}")
        if self.teacher is None or type(self.teacher.network) is not type(self.flow_map.network):
            frozen = {}
        return super().start(key, frozen, previous)

    def velocity(self, frozen: Frozen, x_t: jax.Array, x: jax.Array, cond: Cond, draws: Draws) -> jax.Array:
        """Gives d x_t / d t: of the sample, or the teacher's mean over all samples that pass x_t; no gradient."""
        process = self.flow_map.process
        if self.teacher is None:
            return expand(process.dalpha(draws.t), x) * x + expand(process.dsigma(draws.t), x) * draws.eps
        params, teacher = frozen["teacher"], self.teacher
        denoise, carry = teacher.under(process).bind(params), ()
        if self.guidance is not None:
            carry = self.guidance.init(x_t)
            denoise = self.guidance(denoise, lambda c: teacher.net.apply(params, c, method="null"))
        prediction, _ = denoise(x_t, draws.t, cond, jnp.int32(0), carry)
        return jax.lax.stop_gradient(prediction.velocity)

    def dropped(self, params: Params, cond: Cond, mask: jax.Array) -> Cond:
        """Gives the conditions, the null one where `mask` (B,) is true."""
        return drop(self.flow_map.net, params, cond, mask) if self.dropout and self.conditions else cond


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlowTask(AverageVelocityMethod):
    """Trains ``student`` to give the average velocity between any two times.

    Attributes:
      times: law of t and s, drawn independently and put in order.
      instant: share of the batch, its first rows, that has s = t: plain flow matching.
      omega, kappa: of the guidance that is learned without a teacher (`guided_velocity`); 1 and 0 for none.
      guided_from, guided_to: the times t between which it acts.
      power, floor: see `adaptive_loss`.

    Raises GenError for shares out of range, and omega or kappa beside a teacher or without classes.
    """

    times: TimeSampler = TimeSampler("logit-normal", -0.4, 1.0)
    instant: float = 0.75
    omega: float = 1.0
    kappa: float = 0.0
    guided_from: float = 0.0
    guided_to: float = 1.0
    power: float = 1.0
    floor: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.instant <= 1.0:
            raise GenError(f"{self.instant} of the batch has two equal times; expected a share in [0, 1]")
        if not 0.0 <= self.kappa < 1.0:
            raise GenError(f"kappa is {self.kappa}; the guidance scale omega / (1 - kappa) needs it in [0, 1)")
        if self.guides and (self.teacher is not None or not self.conditions):
            raise GenError(
                "omega and kappa guide a class-conditional network without a teacher; leave them at 1 and 0, and give "
                "a teacher's guidance"
            )

    @property
    def guides(self) -> bool:
        """Tells whether guidance is learned from the network's own velocities."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    def draw(self, key: jax.Array, x: jax.Array) -> Draws:
        """Draws both times (``extra["s"]`` the earlier), the noise, and which rows lose their condition.

        These are the first ones of the batch, as in the official code: the null condition is learned at s = t alone.
        """
        t_key, s_key, eps_key, drop_key = jax.random.split(key, 4)
        process, b = self.flow_map.process, x.shape[0]
        t, s = self.ordered(self.times(t_key, process, b), self.times(s_key, process, b))
        dropped = self.first((jax.random.uniform(drop_key, (b,)) < self.dropout).sum(), b)
        return Draws(t, jax.random.normal(eps_key, x.shape), {"s": s, "dropped": dropped})

    def ordered(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives (t, s), the later of two times and the earlier; s = t for the first rows (see `instant`)."""
        t = jnp.maximum(a, b)
        same = self.first(int(self.instant * len(a)), len(a))
        return t, jnp.where(same, t, jnp.minimum(a, b))

    @staticmethod
    def first(count: jax.Array | int, batch: int) -> jax.Array:
        """Gives a mask (batch,) of the first `count` rows."""
        return jnp.arange(batch) < count

    def guided(self, params: Params, v: jax.Array, x_t: jax.Array, cond: Cond, draws: Draws) -> jax.Array:
        """Gives the velocity that is learned: guided by the network itself, and plain where the condition is dropped.

        No gradient.
        """
        if not self.guides:
            return v
        params, t = jax.lax.stop_gradient(params), draws.t
        null = self.flow_map.net.apply(params, cond, method="null")
        own = self.flow_map.value(params, x_t, t, t, null).value
        conditional = self.flow_map.value(params, x_t, t, t, cond).value if self.kappa else None
        within = (t >= self.guided_from) & (t <= self.guided_to)
        omega, kappa = jnp.where(within, self.omega, 1.0), jnp.where(within, self.kappa, 0.0)
        return jnp.where(expand(draws.extra["dropped"], v), v, guided_velocity(v, own, conditional, omega, kappa))

    def loss(self, params: Params, frozen: Frozen, x: jax.Array, cond: Cond, draws: Draws) -> tuple[jax.Array, Aux]:
        """Gives the loss, and as metrics its squared errors against the target and against the velocity.

        The target is v - (t - s) du/dt with the derivative along (v, 1, 0) in (x_t, t, s).
        """
        t, s = draws.t, draws.extra["s"]
        x_t = noised(self.flow_map.process, x, draws)
        v = self.velocity(frozen, x_t, x, cond, draws)
        target_v = self.guided(params, v, x_t, cond, draws)
        own = self.dropped(params, cond, draws.extra["dropped"])
        u = self.flow_map.jvp(params, (x_t, t, s), (target_v, jnp.float32(1.0), jnp.float32(0.0)), own)
        target = jax.lax.stop_gradient(target_v - expand(t - s, x) * u.tangent)
        axes = tuple(range(1, x.ndim))
        squares = jnp.square(u.value - target).sum(axes)
        metrics = {"u_loss": squares.mean(), "v_loss": jnp.square(u.value - v).sum(axes).mean()}
        return adaptive_loss(squares, self.power, self.floor).mean(), Aux(metrics)

    def update(
        self, state: State, frozen: Frozen, batch: Batch, schedule: Schedule, key: jax.Array
    ) -> tuple[State, Metrics]:
        """Makes one step at freshly drawn times and noise."""
        x, cond = self.data(batch), self.cond(batch)
        data = (x, cond, self.draw(key, x))
        state, metrics, _ = self.student_part.update(state, lambda p, d: self.loss(p, frozen, *d), data, schedule)
        return state, metrics
