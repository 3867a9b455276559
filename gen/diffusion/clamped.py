"""Velocities of a linear flow whose division by the time is clamped (RAEv2, JiT).

With x_t = (1 - t) x + t eps the velocity of a data prediction is v = (x_t - x) / t. Near t = 0 it magnifies every error
of x; published codes divide by max(t, least), in the prediction, in the target and in the sampler alike. The
parameterization says it, and its predictions carry it to the objective.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from gen.config import check_choices
from gen.diffusion.objectives import Draws, Evaluate, TimesAndNoise, mean_over_data, noised
from gen.diffusion.prediction import EARLY, Prediction
from gen.diffusion.process import Linear, expand
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = ["Clamped", "ClampedMatching", "EarlyHead", "clamped_velocity", "early_of"]


def clamped_velocity(x_t: jax.Array, x: jax.Array, t: jax.Array, least: float) -> jax.Array:
    """Gives (x_t - x) / max(t, least) for t (B,)."""
    return (x_t - x) / expand(jnp.maximum(t, least), x)


@dataclasses.dataclass(frozen=True)
class Clamped:
    """The prediction is a clamped velocity, of data or as it comes from the network, which gets t itself.

    Attributes:
      output: the raw output: x, of which the velocity is made, or the velocity.
      least: by which is divided at times below it, in the prediction and in the target of `ClampedMatching`.
    """

    output: Literal["x", "velocity"] = "x"
    least: float = 0.05

    def __post_init__(self) -> None:
        check_choices(self)

    def inputs(self, process: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Does what `gen.diffusion.denoiser.Parameterization.inputs` says."""
        if process != Linear():
            raise GenError(f"clamped velocities are of the linear process, not {process}; use that, or predict x")
        return x, (t,)

    def prediction(
        self, process: Any, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        """Gives the clamped velocity."""
        velocity = clamped_velocity(x, raw, t, self.least) if self.output == "x" else raw
        return Prediction(velocity, x, t, extra, process, "velocity", self.least)

    def target(self, process: Any, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Gives the data, or their clamped velocity."""
        return x if self.output == "x" else clamped_velocity(noised(process, x, Draws(t, eps)), x, t, self.least)


@dataclasses.dataclass(frozen=True)
class ClampedMatching(TimesAndNoise):
    """Mean |v_hat - (x_t - x) / max(t, least)|^2 on the linear process, with the prediction's own `least`.

    Attributes:
      times: how times are drawn.
    """

    times: TimeSampler = TimeSampler("logit-normal")

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `gen.diffusion.objectives.Objective.loss` says."""
        x_t = noised(process, x, draws)
        found = evaluate(x_t, draws.t, cond)
        losses = mean_over_data(jnp.square(found.velocity - clamped_velocity(x_t, x, draws.t, found.least)))
        return losses, {"velocity_mse": losses}


@dataclasses.dataclass(frozen=True)
class EarlyHead:
    """Another objective of a network's output, plus the same objective of its early head's (internal guidance).

    Attributes:
      objective: what both are trained with.
      weight: factor on the early head's.
    """

    objective: Any = ClampedMatching()
    weight: float = 1.0

    inputs: ClassVar[tuple[str, ...]] = ()
    taps: ClassVar[tuple[str, ...]] = ()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Gives the inner objective's draws."""
        draws: Draws = self.objective.draw(key, process, x)
        return draws

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `gen.diffusion.objectives.Objective.loss` says. Raises GenError for a network without such a
        head.
        """
        seen: list[Prediction] = []

        def watched(x_t: jax.Array, t: jax.Array, cond: Cond) -> Prediction:
            seen.append(evaluate(x_t, t, cond))
            return seen[-1]

        losses, terms = self.objective.loss(watched, process, x, cond, draws)
        early, _ = self.objective.loss(lambda x_t, t, cond: early_of(seen[0]), process, x, cond, draws)
        return losses + self.weight * early, {**terms, "early": early}


def early_of(prediction: Prediction) -> Prediction:
    """Gives the prediction of the early head. Raises GenError where the network has none."""
    if EARLY not in prediction.extra:
        raise GenError("this network has no early head; train one that has (rae-v2), or guide by another model")
    early: Prediction = prediction.extra[EARLY]
    return early
