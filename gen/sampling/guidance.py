"""Guidance: functions from Denoise to Denoise. Scale w = 1 means none.

Conditional and unconditional inputs run as one batched network call. Guidances compose (`Chained`); what they
remember from step to step is a dict of arrays by name, threaded through the sampler's scan.

Notation: c is the conditional prediction, u the unconditional one (autoguidance: a weaker model's). Classifier-free
guidance, intervals and autoguidance are linear and mean the same in any quantity; rescaling, APG and CFG-Zero* are
not, so each says in which quantity it acts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.prediction import Denoise, Prediction, PredictionKind
from gen.diffusion.process import expand, pair
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = [
    "AdaptiveProjected",
    "Arch",
    "Autoguidance",
    "Chained",
    "ClassifierFree",
    "ClassifierGradient",
    "Clip",
    "Guidance",
    "Interval",
    "ZeroStar",
]

Null = Callable[[Cond], Cond]
Carry = Mapping[str, jax.Array]


class Guidance(Protocol):
    """Wraps a Denoise; `null` maps a condition to the unconditional one."""

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Gives the guided Denoise function.

        Args:
          weak: the weaker model of autoguidance; other guidances pass it on to those they hold.
        """
        ...

    def init(self, x: jax.Array) -> Carry:
        """Gives the initial carry for a batch shaped like x; ``{}`` for stateless guidance."""
        ...


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Per-sample inner products, (B, 1, ..., 1)."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _rescaled(value: jax.Array, c: jax.Array, share: float) -> jax.Array:
    """`value` moved by `share` towards the standard deviation of c, per sample (Lin et al. 2024, sec. 3.4)."""
    if share == 0.0:
        return value
    axes = tuple(range(1, c.ndim))
    spread = jnp.std(value, axis=axes, keepdims=True)
    ratio = jnp.std(c, axis=axes, keepdims=True) / jnp.where(spread > 0.0, spread, 1.0)
    return value * (1.0 - share + share * ratio)


def _both(
    denoise: Denoise, null: Null, x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any
) -> tuple[Prediction, jax.Array, Any]:
    """(conditional prediction, value of the unconditional one, carry) from one call on the doubled batch."""
    if not cond:
        raise GenError("guidance on a model without conditioning; use scale 1")
    unconditional = null(cond)
    both = {k: jnp.concatenate([v, unconditional[k]]) for k, v in cond.items()}
    t2 = jnp.concatenate([t, t]) if jnp.ndim(t) else t
    double, carry = denoise(jnp.concatenate([x, x]), t2, both, step, carry)
    first = jax.tree.map(lambda v: v[: x.shape[0]] if jnp.ndim(v) else v, double)
    return first, double.value[x.shape[0] :], carry


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """u + w (c - u) in the network's own output space (arXiv 2207.12598).

    Attributes:
      scale: w; 1 is the conditional model, and then no unconditional call is made.
      channels: guide only the first k channels, as the official DiT and SiT scripts do (k = 3); None guides all.
      rescale: share phi, in [0, 1], by which the result is given the standard deviation of c (Lin et al. 2024).
      scales: name of an entry (B,) of the condition that holds each sample's own w, in place of `scale`; the network
        does not see it. None for one scale.
    """

    scale: float = 1.0
    channels: int | None = None
    rescale: float = 0.0
    scales: str | None = None

    def init(self, x: jax.Array) -> Carry:
        """Carries no state from call to call."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says. Raises GenError when there is no condition to drop, or none with the
        samples' scales.
        """
        del weak
        if self.scale == 1.0 and self.scales is None:
            return denoise

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            scale: Any = self.scale
            if self.scales is not None:
                if self.scales not in cond:
                    raise GenError(
                        f"no entry '{self.scales}' with each sample's guidance scale; add it to the condition"
                    )
                scale = expand(cond[self.scales], x)
                cond = {k: v for k, v in cond.items() if k != self.scales}
            first, u, carry = _both(denoise, null, x, t, cond, step, carry)
            c = first.value
            value = u + scale * (c - u)
            if self.channels is not None:
                value = jnp.concatenate([value[..., : self.channels], c[..., self.channels :]], axis=-1)
            return first.with_value(_rescaled(value, c, self.rescale)), carry

        return guided


@dataclasses.dataclass(frozen=True)
class Arch:
    """A guidance scale that is 1 at both ends of a flow: w(t) = 1 + height t (1 - t)."""

    height: float

    def __call__(self, t: jax.Array) -> jax.Array:
        """Gives w at t in [0, 1]."""
        return 1.0 + self.height * t * (1.0 - t)


@dataclasses.dataclass(frozen=True)
class AdaptiveProjected:
    """APG (arXiv 2410.02416): the guidance direction without its part along c, in data space.

    d = D_c - D_u + momentum d_prev is shortened to the length `norm`, split into parts along and across D_c, and
    D = D_c + (w - 1) (across + eta along).

    Attributes:
      scale: w, a number or an `Arch`; 1 is no guidance, whatever the rest.
      eta: share kept of the part along D_c; 1 is classifier-free guidance.
      norm: greatest length of d, per sample; 0 for no bound.
      momentum: weight of the previous (unshortened) d; the paper's are negative. Not advanced on unguided calls.
      base: what the update is added to: ``conditional`` as in the paper, or ``unconditional`` with the weight w,
        which differs unless eta = 1 without bound and momentum.
      rescale: as in `ClassifierFree`.
      space: what D is: the ``data``, as in the paper, or the ``velocity``, as in FlexTok's code.
    """

    scale: float | Arch = 4.0
    eta: float = 0.0
    norm: float = 0.0
    momentum: float = 0.0
    base: Literal["conditional", "unconditional"] = "conditional"
    rescale: float = 0.0
    space: Literal["data", "velocity"] = "data"

    def init(self, x: jax.Array) -> Carry:
        """Gives the running direction, where there is momentum."""
        return {"apg": jnp.zeros_like(x)} if self.momentum else {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says."""
        del weak
        if self.scale == 1.0:
            return denoise

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            first, u, carry = _both(denoise, null, x, t, cond, step, carry)
            c, u = (self._value(p) for p in (first, first.with_value(u)))
            d = c - u
            if self.momentum:
                d = d + self.momentum * carry["apg"]
                carry = {**carry, "apg": d}
            if self.norm > 0.0:
                length = jnp.sqrt(_inner(d, d))
                d = d * jnp.minimum(1.0, self.norm / jnp.where(length > 0.0, length, 1.0))
            along = c * _inner(d, c) / jnp.maximum(_inner(c, c), jnp.finfo(c.dtype).tiny)
            update = d - along + self.eta * along
            scale = expand(self.scale(t), x) if isinstance(self.scale, Arch) else self.scale
            value = c + (scale - 1.0) * update if self.base == "conditional" else u + scale * update
            value = _rescaled(value, c, self.rescale)
            if self.space == "data":
                return first.with_denoised(value), carry
            return dataclasses.replace(first, value=value, kind="velocity"), carry

        return guided

    def _value(self, prediction: Prediction) -> jax.Array:
        return prediction.denoised if self.space == "data" else prediction.velocity


@dataclasses.dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero* (arXiv 2503.18886) on the velocity: s u + w (c - s u) with s = <c, u> / |u|^2 per sample.

    Attributes:
      scale: w; 1 leaves c as it is.
      zero_steps: in the first so many steps the velocity is 0.
      rescale: as in `ClassifierFree`.
    """

    scale: float = 4.0
    zero_steps: int = 1
    rescale: float = 0.0

    def init(self, x: jax.Array) -> Carry:
        """Carries no state from call to call."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says."""
        del weak

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            if self.scale == 1.0:
                first, carry = denoise(x, t, cond, step, carry)
                value = first.velocity
            else:
                first, u, carry = _both(denoise, null, x, t, cond, step, carry)
                c, u = first.velocity, first.with_value(u).velocity
                u = u * _inner(c, u) / (_inner(u, u) + 1e-8)
                value = _rescaled(u + self.scale * (c - u), c, self.rescale)
            value = jnp.where(step < self.zero_steps, 0.0, value)
            return dataclasses.replace(first, value=value, kind="velocity"), carry

        return guided


@dataclasses.dataclass(frozen=True)
class Autoguidance:
    """u + w (c - u) where u is a weaker model's prediction for the same input (arXiv 2406.02507).

    The weaker network (smaller, less trained, or one without classes) is called once beside the main one.

    Attributes:
      scale: w; 1 leaves the weaker model out.
      rescale: as in `ClassifierFree`.
    """

    scale: float = 1.0
    rescale: float = 0.0

    def init(self, x: jax.Array) -> Carry:
        """Carries no state from call to call."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says. Raises GenError without a weaker model."""
        del null
        if self.scale == 1.0:
            return denoise
        if weak is None:
            raise GenError("autoguidance without a weaker model; give the parameters of one as 'guide'")

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            first, carry = denoise(x, t, cond, step, carry)
            c, u = first.value, weak(x, t, cond, step, {})[0].as_kind(first.kind)
            return first.with_value(_rescaled(u + self.scale * (c - u), c, self.rescale)), carry

        return guided


@dataclasses.dataclass(frozen=True)
class Interval:
    """Another guidance inside an interval, none outside (arXiv 2404.07724).

    Outside, only the conditional half of the batch is evaluated, where all samples share their time (solvers).

    Attributes:
      guidance: what acts inside.
      low, high: bounds of the time of each evaluation, low <= t < high, on the clock of the sampled process (EDM: the
        noise level); with ``by="step"`` of the solver's step index. Official codes differ: they
        limit by the time of the evaluation, or by step, where a method evaluates the network twice a step.
      by: ``time`` or ``step``.

    Raises GenError for an empty interval.
    """

    guidance: Any = ClassifierFree()
    low: float = 0.0
    high: float = float("inf")
    by: Literal["time", "step"] = "time"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise GenError(f"guidance interval from {self.low:g} to {self.high:g} is empty; expected low < high")

    def init(self, x: jax.Array) -> Carry:
        """Gives the inner guidance's state."""
        return self.guidance.init(x)

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says."""
        guided = self.guidance(denoise, null, weak)

        def limited(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            kinds: list[PredictionKind] = []

            def outside() -> tuple[Prediction, Any]:
                prediction, after = denoise(x, t, cond, step, carry)
                kinds.append(prediction.kind)
                return prediction, after

            def inside() -> tuple[Prediction, Any]:
                prediction, after = guided(x, t, cond, step, carry)
                # guidance in data space changes the kind; both branches must give the same (traced in this order)
                kind = kinds[0] if kinds else prediction.kind
                return dataclasses.replace(prediction, value=prediction.as_kind(kind), kind=kind), after

            place = step if self.by == "step" else t
            active = (place >= self.low) & (place < self.high)
            if jnp.ndim(active):  # times of their own, as distillers draw them
                plain, _ = outside()
                chosen, after = inside()
                return chosen.with_value(jnp.where(expand(active, x), chosen.value, plain.value)), after
            return jax.lax.cond(~active, outside, inside)

        return limited


@dataclasses.dataclass(frozen=True)
class Clip:
    """Clips the denoised prediction to [low, high] (``clip_denoised`` of the DDPM code family)."""

    low: float = -1.0
    high: float = 1.0

    def init(self, x: jax.Array) -> Carry:
        """Carries no state from call to call."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says."""
        del null, weak

        def clipped(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            prediction, carry = denoise(x, t, cond, step, carry)
            return prediction.with_denoised(jnp.clip(prediction.denoised, self.low, self.high)), carry

        return clipped


@dataclasses.dataclass(frozen=True)
class ClassifierGradient:
    """Classifier guidance (arXiv 2105.05233): moves the prediction along a gradient of log p(cond | x_t).

    Not a configuration, since it holds a function.

    Attributes:
      gradient: ``(x_t, t, cond) -> `` array like x_t, already times the guidance scale.
      on: ``score`` adds it to the score (their alg. 2, any solver), ``mean`` to the mean of the ancestral
        transition, times its variance (their alg. 1, ancestral solver only).
    """

    gradient: Callable[[jax.Array, jax.Array, Cond], jax.Array]
    on: Literal["score", "mean"] = "score"

    def init(self, x: jax.Array) -> Carry:
        """Carries no state from call to call."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says."""
        del null, weak

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            prediction, carry = denoise(x, t, cond, step, carry)
            gradient = self.gradient(x, t, cond)
            if self.on == "mean":
                return dataclasses.replace(prediction, extra={**prediction.extra, "mean_gradient": gradient}), carry
            sigma = pair(prediction.process, prediction.t, x)[1]
            return dataclasses.replace(prediction, value=prediction.eps - sigma * gradient, kind="eps"), carry

        return guided


@dataclasses.dataclass(frozen=True)
class Chained:
    """Guidances one around the other; the first is applied first (innermost)."""

    parts: tuple[Any, ...] = ()

    def init(self, x: jax.Array) -> Carry:
        """Gives the states of all parts."""
        return {k: v for part in self.parts for k, v in part.init(x).items()}

    def __call__(self, denoise: Denoise, null: Null, weak: Denoise | None = None) -> Denoise:
        """Does what `Guidance.__call__` says."""
        for part in self.parts:
            denoise = part(denoise, null, weak)
        return denoise
