"""Consistency functions of any denoiser: flow maps of one time, whose only jump is the one to the data.

`gen.diffusion.flowmap.Consistency` has the scalings of the first consistency models. Here are those that continue a
trained denoiser without a change: its own data prediction as the jump, in its own process or under TrigFlow.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import Consistency, FlowMap, Inputs
from gen.diffusion.prediction import Prediction, PredictionKind
from gen.diffusion.process import EDM, Process, TrigFlow, expand, pair
from gen.errors import GenError

__all__ = ["DataPrediction", "TrigPrecondition", "TrigVelocity", "consistency_map", "data_map", "deviation", "trig_map"]


@dataclasses.dataclass(frozen=True)
class DataPrediction:
    """The jump to the data is the network's data prediction: f(x_t, t) = E[x | x_t] of a denoiser, trained on.

    On processes that reach clean data it is the identity there (flows: f = x_t - t v). On EDM's it misses that at
    sigma_min by c_out F, about 0.2 %: easy consistency tuning trains it so (Geng et al. 2024, arXiv 2406.14548).

    Attributes:
      inner: the denoiser's parameterization.
    """

    inner: Any = EDMPrecondition()

    times: ClassVar[int] = 1
    anywhere: ClassVar[bool] = False
    diagonal: ClassVar[None] = None

    def inputs(self, process: Process, x: jax.Array, t: jax.Array, s: jax.Array) -> Inputs:
        """Does what `gen.diffusion.flowmap.TwoTimes.inputs` says."""
        del s
        inputs: Inputs = self.inner.inputs(process, x, t)
        return inputs

    def value(self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Gives f, which the raw output means."""
        f: jax.Array = self.inner.prediction(process, raw, x, t, {}).denoised
        return f

    def end(self, process: Process, value: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        """Gives f itself."""
        del process, x, t, s
        return value


@dataclasses.dataclass(frozen=True)
class TrigPrecondition:
    """TrigFlow's parameterization: velocity = sigma_data F(x / sigma_data, c) (arXiv 2410.11081, sec. 3.1).

    A network that was trained with EDM's preconditioning is one of these, exactly: D(x, sigma) at sigma = sigma_data
    tan t is cos t x_t - sin t sigma_data F with F = -F_raw(x_t / sigma_data, ln(sigma) / 4) (app. B.1).

    Attributes:
      clock: what the network receives: the angle ``time``, or ``quarter-log-level``, EDM's ln(sigma) / 4.
      sign: -1 for EDM's networks.
      scale: factor on the network's time.

    `inputs` raises GenError for a process that is not TrigFlow's.
    """

    clock: Literal["time", "quarter-log-level"] = "time"
    sign: int = 1
    scale: float = 1.0

    output: ClassVar[PredictionKind] = "velocity"

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        if not isinstance(process, TrigFlow):
            raise GenError(
                f"TrigFlow's preconditioning needs the trig-flow process, not {type(process).__name__}; use that, or "
                "predict the velocity"
            )
        clock = t if self.clock == "time" else 0.25 * jnp.log(process.sigma_data * jnp.tan(t))
        return x / process.sigma_data, (self.scale * clock,)

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        assert isinstance(process, TrigFlow)  # `inputs` refuses others
        return Prediction(self.sign * process.sigma_data * raw, x, t, extra, process, "velocity")

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        assert isinstance(process, TrigFlow)
        da, ds = expand(process.dalpha(t), x), expand(process.dsigma(t), x)
        return self.sign * (da * x + ds * eps) / process.sigma_data


@dataclasses.dataclass(frozen=True)
class TrigVelocity:
    """What is learned is the velocity under TrigFlow, and the jump to the data is f = cos t x_t - sin t velocity.

    At t = 0 f is x for every network: no boundary condition is left to be built in (arXiv 2410.11081, eq. 5). The
    continuous-time losses differentiate the velocity.

    Attributes:
      inner: the parameterization of the network.
      own: the process that the network was made for; it is asked at equal log-SNR. None where that is TrigFlow.
    """

    inner: Any = TrigPrecondition()
    own: Any = None

    times: ClassVar[int] = 1
    anywhere: ClassVar[bool] = False
    diagonal: ClassVar[None] = None

    def inputs(self, process: Process, x: jax.Array, t: jax.Array, s: jax.Array) -> Inputs:
        """Does what `gen.diffusion.flowmap.TwoTimes.inputs` says."""
        del s
        if not isinstance(process, TrigFlow):
            raise GenError(f"the trig-velocity map needs the trig-flow process, not {type(process).__name__}; use that")
        own, x, u = self._own(process, x, t)
        inputs: Inputs = self.inner.inputs(own, x, u)
        return inputs

    def value(self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Gives the velocity under TrigFlow, which the raw output means."""
        own, inner, u = self._own(process, x, t)
        prediction: Prediction = self.inner.prediction(own, raw, inner, u, {})
        if self.own is not None:
            prediction = Prediction(prediction.denoised, x, t, {}, process, "x")
        return prediction.velocity

    def end(self, process: Process, value: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        """Gives f, cos t x_t - sin t value."""
        del process, s
        return expand(jnp.cos(t), x) * x - expand(jnp.sin(t), x) * value

    def _own(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[Process, jax.Array, jax.Array]:
        """The network's process, and x_t and t as it knows them."""
        if self.own is None:
            return process, x, t
        u = jnp.minimum(self.own.time_of(process.logsnr(t)), self.own.t_max)
        # the ratio of the alphas (and of the sigmas), safe where either is 0
        size, own_size = (jnp.hypot(*pair(p, time, x)) for p, time in ((process, t), (self.own, u)))
        return self.own, own_size / size * x, u


def deviation(process: Process) -> float:
    """Gives the standard deviation of the data that a process assumes; 1 for those that assume none, whose data are
    normalised.
    """
    return process.sigma_data if isinstance(process, EDM | TrigFlow) else 1.0


def data_map(denoiser: Denoiser) -> FlowMap:
    """Gives the consistency function that a denoiser's data prediction is, for any process (`DataPrediction`)."""
    return FlowMap(denoiser.network, denoiser.process, DataPrediction(denoiser.parameterization))


def consistency_map(denoiser: Denoiser) -> FlowMap:
    """Gives the consistency function that starts as a denoiser: with the scalings of arXiv 2303.01469 for a network of
    EDM's preconditioning, its own data prediction for all others.
    """
    if isinstance(denoiser.parameterization, EDMPrecondition):
        return FlowMap(denoiser.network, denoiser.process, Consistency(denoiser.parameterization.scale))
    return data_map(denoiser)


def trig_map(denoiser: Denoiser, sigma_max: float = 80.0) -> FlowMap:
    """Gives the consistency function under TrigFlow that starts as a denoiser of any process.

    Args:
    sigma_max: the level where sampling starts.
    """
    process, inner = denoiser.process, denoiser.parameterization
    if isinstance(process, TrigFlow):
        return FlowMap(denoiser.network, process, TrigVelocity(inner))
    if isinstance(process, EDM) and isinstance(inner, EDMPrecondition):
        parameterization = TrigVelocity(TrigPrecondition("quarter-log-level", -1, inner.scale))
        return FlowMap(denoiser.network, TrigFlow(process.sigma_data, sigma_max), parameterization)
    return FlowMap(denoiser.network, TrigFlow(deviation(process), sigma_max), TrigVelocity(inner, process))
