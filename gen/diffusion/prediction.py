"""Predictions: what a denoiser says about x_t, converted between data, noise, velocity and score."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax

from gen.diffusion.process import Process, expand, pair
from gen.nn.network import Cond

__all__ = ["EARLY", "Denoise", "Prediction", "PredictionKind"]

EARLY = "early"  # in ``extra``: the prediction of an early head of the network
PredictionKind = Literal["x", "eps", "v", "velocity", "score"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a denoiser says about x_t. All arrays are shaped like `x`.

    Attributes:
      value: the prediction, in the quantity named by `kind`.
      x: the noisy input x_t.
      t: its time, a scalar or (B,), on the clock of `process`.
      extra: further outputs by name: ``variance`` (learned variance, raw), feature taps.
      process: the process under which the conversions hold.
      kind: x (data), eps (noise), v (alpha eps - sigma x), velocity (d x_t / d t) or score.
      least: times below it count as it wherever data are made a velocity (`gen.diffusion.clamped`); 0 for none.
    """

    value: jax.Array
    x: jax.Array
    t: jax.Array
    extra: Mapping[str, Any]
    process: Process = dataclasses.field(metadata={"static": True})
    kind: PredictionKind = dataclasses.field(metadata={"static": True})
    least: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def denoised(self) -> jax.Array:
        """Gives E[x | x_t]."""
        a, s = pair(self.process, self.t, self.x)
        match self.kind:
            case "x":
                return self.value
            case "eps":
                return (self.x - s * self.value) / a
            case "v":
                return (a * self.x - s * self.value) / (a * a + s * s)
            case "score":
                return (self.x + s * s * self.value) / a
            case "velocity":
                da, ds = self._rates()
                return (ds * self.x - s * self.value) / (a * ds - s * da)

    @property
    def eps(self) -> jax.Array:
        """Gives E[eps | x_t]."""
        a, s = pair(self.process, self.t, self.x)
        match self.kind:
            case "eps":
                return self.value
            case "x":
                return (self.x - a * self.value) / s
            case "v":
                return (s * self.x + a * self.value) / (a * a + s * s)
            case "score":
                return -s * self.value
            case "velocity":
                da, ds = self._rates()
                return (a * self.value - da * self.x) / (a * ds - s * da)

    @property
    def velocity(self) -> jax.Array:
        """Gives d x_t / d t of the probability flow, on the clock of `process` (time 0 = data)."""
        if self.kind == "velocity":
            return self.value
        da, ds = self._rates()
        if self.kind == "x":
            # written around the data prediction: exact where alpha is 1 and at sigma -> 0 the caller stops
            a, s = pair(self.process, self.t, self.x)
            return da * self.value + ds * (self.x - a * self.value) / s
        if self.kind in ("eps", "score"):
            a, s = pair(self.process, self.t, self.x)
            return da / a * self.x + (ds - da * s / a) * self.eps
        return da * self.denoised + ds * self.eps

    @property
    def score(self) -> jax.Array:
        """Gives the gradient of log p(x_t): -eps / sigma."""
        return self.value if self.kind == "score" else -self.eps / pair(self.process, self.t, self.x)[1]

    def with_denoised(self, x: jax.Array) -> "Prediction":
        """Gives the same prediction with its denoised image replaced (clipping, guidance in data space)."""
        return dataclasses.replace(self, value=x, kind="x")

    def with_value(self, value: jax.Array) -> "Prediction":
        """Gives the same kind of prediction with another value (guidance in the network's own space)."""
        return dataclasses.replace(self, value=value)

    def as_kind(self, kind: PredictionKind) -> jax.Array:
        """This prediction's value in another quantity."""
        match kind:
            case "x":
                return self.denoised
            case "eps":
                return self.eps
            case "velocity":
                return self.velocity
            case "score":
                return self.score
            case "v":
                a, s = pair(self.process, self.t, self.x)
                return self.value if self.kind == "v" else a * self.eps - s * self.denoised

    def _rates(self) -> tuple[jax.Array, jax.Array]:
        return expand(self.process.dalpha(self.t), self.x), expand(self.process.dsigma(self.t), self.x)


class Denoise(Protocol):
    """A denoiser with its parameters bound, as solvers and guidance see it.

    ``step`` is the solver's step index (int32 scalar), for step-dependent guidance; ``carry`` is guidance
    state threaded through the sampler's scan (APG's momentum), ``()`` where there is none.
    """

    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any
    ) -> tuple[Prediction, Any]: ...
