"""Flow maps: networks of two times that jump from x_t to x_s along the probability flow.

A flow map is not a `Denoiser`, because what it says between two times has no score. Its parameterization (`TwoTimes`)
says which times the network sees, what is learned (the `value`: an average velocity, a data prediction) and how a jump
follows from that. Times are on our clock (0 = data), s <= t.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gen.config import check_choices
from gen.diffusion.denoiser import Controls, Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import VelocityMatching
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, Process, expand, pair
from gen.errors import GenError
from gen.nn.forward_mode import forward_mode
from gen.nn.network import Cond, Network, Params

__all__ = ["AverageVelocity", "Consistency", "Diagonal", "FlowMap", "Jump", "TwoTimes", "Value", "jump_map"]

Inputs = tuple[jax.Array, tuple[jax.Array, ...]]


class TwoTimes(Protocol):
    """How a flow map's network is called and what comes out.

    Attributes:
      times: how many times the network takes.
      anywhere: whether a jump may end at any s; False for the data end alone.
      diagonal: what the raw output means on s = t, as a `gen.diffusion.denoiser.Parameterization`; None where the map
        does not know that case.
    """

    @property
    def times(self) -> int: ...

    @property
    def anywhere(self) -> bool: ...

    @property
    def diagonal(self) -> Any: ...

    def inputs(self, process: Process, x: jax.Array, t: jax.Array, s: jax.Array) -> Inputs:
        """Gives the network's input and times for x_t and (t, s), each (B,). Raises GenError for an unsuitable
        process.
        """
        ...

    def value(self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Gives what is learned, from the raw output."""
        ...

    def end(self, process: Process, value: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        """Gives x_s from the value at (x_t, t, s)."""
        ...


@dataclasses.dataclass(frozen=True)
class AverageVelocity:
    """The network gives u, the mean of the velocity over [s, t]: x_s = x_t - (t - s) u (MeanFlow, arXiv 2505.13447).

    On s = t it is the velocity.

    Attributes:
      second: the network's second time: the ``duration`` t - s (MeanFlow), the ``end`` s, or the ``halvings`` of the
        whole time that make the duration, log2(1 / (t - s)) as a whole number (shortcut models, arXiv 2410.12557).
      scale: factor on the duration, and on our clock where there is no `inner`.
      inner: how the network sees x_t and the time, and how u comes out of it as a denoiser's velocity does: the
        parameterization of a denoiser that the map starts from. None for a network that gives u on our clock.
      finest: with halvings, how many of the shortest jumps make the whole; the velocity is asked as such a jump.

    Raises GenError for a finest grid that is no power of two.
    """

    second: Literal["duration", "end", "halvings"] = "duration"
    scale: float = 1.0
    inner: Any = None
    finest: int = 128

    times: ClassVar[int] = 2
    anywhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choices(self)
        if self.finest < 1 or self.finest & (self.finest - 1):
            raise GenError(f"a finest grid of {self.finest} jumps is not reached by halving; give a power of two")

    @property
    def diagonal(self) -> Any:
        """Gives the meaning at s = t: the velocity."""
        return Predict("velocity", scale=self.scale) if self.inner is None else self.inner

    def inputs(self, process: Process, x: jax.Array, t: jax.Array, s: jax.Array) -> Inputs:
        """Does what `TwoTimes.inputs` says."""
        inner, first = self.diagonal.inputs(process, x, t)
        match self.second:
            case "duration":
                second = self.scale * (t - s)
            case "end":
                (second,) = self.diagonal.inputs(process, x, jnp.maximum(s, process.t_min))[1]
            case "halvings":
                second = jnp.round(-jnp.log2(jnp.maximum(t - s, 1.0 / self.finest)))
        return inner, (*first, second)

    def value(self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Gives the mean velocity u, which the raw output means."""
        u: jax.Array = self.diagonal.prediction(process, raw, x, t, {}).velocity
        return u

    def end(self, process: Process, value: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        """Does what `TwoTimes.end` says."""
        del process
        return x - expand(t - s, x) * value


@dataclasses.dataclass(frozen=True)
class Jump:
    """The network gives g, a data prediction for the jump: x_s = (sigma_s / sigma_t) (x_t - alpha_t g) + alpha_s g.

    On the EDM process this is CTM's x_s = (s / t) x_t + (1 - s / t) g (arXiv 2310.02279, eq. 9), on flows the DDIM map
    of IMM (arXiv 2503.07565). The jump from t to t is x_t for every g; g on s = t is the denoised prediction.

    Attributes:
      inner: how g comes out of the network, a one-time parameterization. The network sees its clock of t and of s;
        where s is nearer to the data than the process's t_min it sees t_min.
    """

    inner: Any = EDMPrecondition()

    times: ClassVar[int] = 2
    anywhere: ClassVar[bool] = True

    @property
    def diagonal(self) -> Any:
        """Gives the meaning at s = t, which is that of g."""
        return self.inner

    def inputs(self, process: Process, x: jax.Array, t: jax.Array, s: jax.Array) -> Inputs:
        """Does what `TwoTimes.inputs` says."""
        inner, first = self.inner.inputs(process, x, t)
        return inner, first + self.inner.inputs(process, x, jnp.maximum(s, process.t_min))[1]

    def value(self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Gives g, which the raw output means."""
        g: jax.Array = self.inner.prediction(process, raw, x, t, {}).denoised
        return g

    def end(self, process: Process, value: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        """Does what `TwoTimes.end` says."""
        (a, sigma), (a_end, sigma_end) = pair(process, t, x), pair(process, s, x)
        return sigma_end / sigma * (x - a * value) + a_end * value


@dataclasses.dataclass(frozen=True)
class Consistency:
    """A consistency model (arXiv 2303.01469, app. C): the jump to the data end t_min alone, whatever s; EDM process.

    f = c_skip x + c_out F(c_in x; ln(t) / 4) with d = sigma_data, c_skip = d^2 / ((t - t_min)^2 + d^2),
    c_out = (t - t_min) d / sqrt(t^2 + d^2), c_in = 1 / sqrt(t^2 + d^2); hence f is the identity at t_min.

    Attributes:
      scale: factor on the network's time, see `gen.diffusion.denoiser.EDMPrecondition`.
    """

    scale: float = 1.0

    times: ClassVar[int] = 1
    anywhere: ClassVar[bool] = False
    diagonal: ClassVar[None] = None

    def inputs(self, process: Process, x: jax.Array, t: jax.Array, s: jax.Array) -> Inputs:
        """Does what `TwoTimes.inputs` says."""
        del s
        return EDMPrecondition(self.scale).inputs(process, x, t)

    def value(self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Gives f, which the raw output means."""
        assert isinstance(process, EDM)  # `inputs` refuses others
        data, above = process.sigma_data, t - process.t_min
        skip, out = data**2 / (above**2 + data**2), above * data * jax.lax.rsqrt(t**2 + data**2)
        return expand(skip, x) * x + expand(out, x) * raw

    def end(self, process: Process, value: jax.Array, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
        """Gives f itself, which is x at the end."""
        del process, x, t, s
        return value


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The one-time parameterization of a flow map's network on s = t; see `FlowMap.diagonal`.

    Attributes:
      of: the flow map's parameterization.
    """

    of: Any

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> Inputs:
        """Does what `gen.diffusion.denoiser.Parameterization.inputs` says."""
        inputs: Inputs = self.of.inputs(process, x, t, t)
        return inputs

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        """Does what `gen.diffusion.denoiser.Parameterization.prediction` says."""
        prediction: Prediction = self.of.diagonal.prediction(process, raw, x, t, extra)
        return prediction

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Does what `gen.diffusion.denoiser.Parameterization.target` says."""
        target: jax.Array = self.of.diagonal.target(process, x, eps, t)
        return target


class Value(NamedTuple):
    """What a flow map's network says about (x_t, t, s).

    Attributes:
      value: the quantity that the parameterization learns, shaped like x.
      tangent: its derivative along a direction; None where none was asked for.
      extra: the tapped features by name.
    """

    value: jax.Array
    tangent: jax.Array | None
    extra: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class FlowMap:
    """network + process + two-time parameterization. Static and hashable: parameters are passed to every call.

    Attributes:
      network: the config of a backbone, with as many times as the parameterization has.
      process: the process whose probability flow is followed.
      parameterization: see `TwoTimes`.

    Raises GenError for a network of another number of times than the parameterization.
    """

    network: Any
    process: Process
    parameterization: Any = AverageVelocity()

    def __post_init__(self) -> None:
        if self.network.times != self.parameterization.times:
            raise GenError(
                f"flow map {type(self.parameterization).__name__} with a network of {self.network.times} times; set "
                f"the network's times to {self.parameterization.times}"
            )

    @property
    def net(self) -> Network:
        """Gives the network as a parameter-free callable."""
        return Network(self.network)

    def __call__(
        self, params: Params, x: jax.Array, t: jax.Array, s: jax.Array, cond: Cond, *, controls: Controls | None = None
    ) -> jax.Array:
        """Gives x_s for x_t.

        Args:
          params: the network's parameters.
          x: (B, ..., C) x_t.
          t, s: scalars or (B,), where the jump starts and ends.
          cond: conditioning arrays with leading axis B.
          controls: passed to the network.
        """
        t, s = _times(x, t), _times(x, s)
        value = self.value(params, x, t, s, cond, controls=controls).value
        end: jax.Array = self.parameterization.end(self.process, value, x, t, s)
        return end

    def value(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        s: jax.Array,
        cond: Cond,
        *,
        controls: Controls | None = None,
        taps: tuple[str, ...] = (),
    ) -> Value:
        """Gives what the parameterization learns at (x_t, t, s), which losses compare; arguments as in a call."""
        t, s = _times(x, t), _times(x, s)
        inner, times = self.parameterization.inputs(self.process, x, t, s)
        raw, features = self.net(params, inner, times, cond, controls=controls, taps=taps)
        return Value(self.parameterization.value(self.process, raw, x, t), None, features)

    def jvp(
        self,
        params: Params,
        point: tuple[jax.Array, jax.Array, jax.Array],
        tangents: tuple[jax.Array, jax.Array, jax.Array],
        cond: Cond,
        *,
        controls: Controls | None = None,
        taps: tuple[str, ...] = (),
    ) -> Value:
        """Gives the value at ``point = (x, t, s)`` and its derivative along `tangents`, by forward mode.

        MeanFlow's d u / d t along the flow has the tangents (velocity, 1, 0). This is the one place where forward mode
        is taken: layers calculate in forms that have it (`gen.nn.forward_mode`).

        Args:
          tangents: one for each entry of the point, of its shape or broadcast to it.
        """
        x = point[0]
        primal = (x, _times(x, point[1]), _times(x, point[2]))
        direction = tuple(
            jnp.broadcast_to(jnp.asarray(d, p.dtype), p.shape) for d, p in zip(tangents, primal, strict=True)
        )

        def value(x: jax.Array, t: jax.Array, s: jax.Array) -> tuple[jax.Array, Mapping[str, jax.Array]]:
            found = self.value(params, x, t, s, cond, controls=controls, taps=taps)
            return found.value, found.extra

        with forward_mode():
            found, tangent, extra = jax.jvp(value, primal, direction, has_aux=True)
        return Value(found, tangent, extra)

    def diagonal(self, objective: Any = None) -> Denoiser:
        """Gives the denoiser on s = t. Raises GenError where the parameterization knows none.

        Args:
          objective: its native loss; None for velocity matching.
        """
        if self.parameterization.diagonal is None:
            raise GenError(
                f"flow map {type(self.parameterization).__name__} knows no jump of length 0; it gives no denoiser"
            )
        return Denoiser(self.network, self.process, Diagonal(self.parameterization), objective or VelocityMatching())


def jump_map(denoiser: Denoiser) -> FlowMap:
    """Gives the flow map that starts as a denoiser: its network with a second time, its parameterization as the g of a
    `Jump`.

    Raises GenError for a network that cannot take two times.
    """
    if "times" not in {field.name for field in dataclasses.fields(denoiser.network)}:
        raise GenError(
            f"{type(denoiser.network).__name__} takes one time and a flow map's network two; give a student of another "
            "family, or a method that needs one time"
        )
    network = dataclasses.replace(denoiser.network, times=2)
    return FlowMap(network, denoiser.process, Jump(denoiser.parameterization))


def _times(x: jax.Array, t: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
