"""Guidance: functions from Denoise to Denoise. Scale w = 1 means none.

Conditional and unconditional inputs run as one batched network call. Guidances compose (`Chained`); what they
remember from step to step is a dict of arrays by name, threaded through the sampler's scan.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Denoise, Prediction, PredictionKind
from gen.diffusion.process import expand, pair
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = ["Chained", "ClassifierFree", "ClassifierGradient", "Clip", "Guidance", "Interval"]

Null = Callable[[Cond], Cond]
Carry = Mapping[str, jax.Array]


class Guidance(Protocol):
    """Wraps a Denoise; `null` maps a condition to the unconditional one."""

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """The guided Denoise."""
        ...

    def init(self, x: jax.Array) -> Carry:
        """The initial carry for a batch shaped like x; ``{}`` for stateless guidance."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """u + w (c - u) in the network's own output space (Ho & Salimans 2022).

    Attributes:
      scale: w; 1 is the conditional model, and then no unconditional call is made.
      channels: guide only the first k channels, as the official DiT and SiT scripts do (k = 3); None guides all.
    """

    scale: float = 1.0
    channels: int | None = None

    def init(self, x: jax.Array) -> Carry:
        """No state."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """See `Guidance`. Raises GenError when there is no condition to drop."""
        if self.scale == 1.0:
            return denoise

        def guided(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            if not cond:
                raise GenError(f"guidance scale {self.scale:g} on a model without conditioning; use scale 1")
            unconditional = null(cond)
            both = {k: jnp.concatenate([v, unconditional[k]]) for k, v in cond.items()}
            t2 = jnp.concatenate([t, t]) if jnp.ndim(t) else t
            double, carry = denoise(jnp.concatenate([x, x]), t2, both, step, carry)
            c, u = jnp.split(double.value, 2)
            value = u + self.scale * (c - u)
            if self.channels is not None:
                value = jnp.concatenate([value[..., : self.channels], c[..., self.channels :]], axis=-1)
            first = jax.tree.map(lambda v: v[: x.shape[0]] if jnp.ndim(v) else v, double)
            return first.with_value(value), carry

        return guided


@dataclasses.dataclass(frozen=True)
class Interval:
    """Another guidance inside an interval, none outside (Kynkäänniemi et al. 2024).

    Outside, only the conditional half of the batch is evaluated, where all samples share their time (solvers).

    Attributes:
      guidance: what acts inside.
      low, high: bounds of the time of each evaluation, low <= t < high, on the clock of the sampled process (EDM: the
        noise level); with ``by="step"`` of the solver's step index. Official codes differ: they
        limit by the time of the evaluation, or by step, where a method evaluates the network twice a step.
      by: ``time`` or ``step``.
    """

    guidance: Any = ClassifierFree()
    low: float = 0.0
    high: float = float("inf")
    by: Literal["time", "step"] = "time"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise GenError(f"guidance interval from {self.low:g} to {self.high:g} is empty; expected low < high")

    def init(self, x: jax.Array) -> Carry:
        """The inner guidance's state."""
        return self.guidance.init(x)

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """See `Guidance`."""
        guided = self.guidance(denoise, null)

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
        """No state."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """See `Guidance`."""
        del null

        def clipped(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
            prediction, carry = denoise(x, t, cond, step, carry)
            return prediction.with_denoised(jnp.clip(prediction.denoised, self.low, self.high)), carry

        return clipped


@dataclasses.dataclass(frozen=True)
class ClassifierGradient:
    """Classifier guidance (Dhariwal & Nichol 2021): moves the prediction along a gradient of log p(cond | x_t).

    Not a configuration, since it holds a function.

    Attributes:
      gradient: ``(x_t, t, cond) -> `` array like x_t, already times the guidance scale.
      on: ``score`` adds it to the score (their alg. 2, any solver), ``mean`` to the mean of the ancestral
        transition, times its variance (their alg. 1, ancestral solver only).
    """

    gradient: Callable[[jax.Array, jax.Array, Cond], jax.Array]
    on: Literal["score", "mean"] = "score"

    def init(self, x: jax.Array) -> Carry:
        """No state."""
        del x
        return {}

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """See `Guidance`."""
        del null

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
        """The states of all parts."""
        return {k: v for part in self.parts for k, v in part.init(x).items()}

    def __call__(self, denoise: Denoise, null: Null) -> Denoise:
        """See `Guidance`."""
        for part in self.parts:
            denoise = part(denoise, null)
        return denoise
