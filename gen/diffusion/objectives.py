"""Objectives: the losses denoisers are natively trained with, split into random draws and a pure loss.

``draw`` makes every random number of a step; ``loss`` is a function of arrays, so that golden numbers test the
function that trains, and a distiller can train its fake score with the teacher's own loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Prediction
from gen.diffusion.process import expand, pair
from gen.nn.network import Cond

__all__ = ["Draws", "Evaluate", "Objective", "TimeSampler", "VelocityMatching", "mean_over_data", "noised"]

# (x_t, t, cond) -> Prediction, with label dropout already applied to cond by the caller
Evaluate = Callable[[jax.Array, jax.Array, Cond], Prediction]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """All randomness of one loss evaluation.

    Attributes:
      t: (B,) times on the process's clock.
      eps: like x, standard normal.
      extra: further draws by name (second times, auxiliary noises).
    """

    t: jax.Array
    eps: jax.Array
    extra: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """The native training loss of a denoiser."""

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Draws times and noise for a batch x (B, ..., C)."""
        ...

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Per-sample losses (B,) and named per-sample terms (B,)."""
        ...


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """How training times are drawn: u in [0, 1] by `law`, then the process's ``at(u)``.

    Attributes:
      law: ``uniform``, or ``logit-normal`` (u = sigmoid(mean + std n); Esser et al. 2024).
      mean, std: location and scale of the logit-normal.
      shift: resolution shift u' = shift u / (1 + (shift - 1) u); 1 for none.
    """

    law: Literal["uniform", "logit-normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __call__(self, key: jax.Array, process: Any, count: int) -> jax.Array:
        """(count,) float32 times."""
        if self.law == "uniform":
            u = jax.random.uniform(key, (count,))
        else:
            u = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (count,)))
        u = self.shift * u / (1.0 + (self.shift - 1.0) * u)
        return process.at(u)


def noised(process: Any, x: jax.Array, draws: Draws) -> jax.Array:
    """x_t = alpha(t) x + sigma(t) eps."""
    a, s = pair(process, draws.t, x)
    return a * x + s * draws.eps


def mean_over_data(value: jax.Array) -> jax.Array:
    """Mean over all axes but the first."""
    return value.reshape(value.shape[0], -1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class VelocityMatching:
    """Flow matching: mean |v_hat - (alpha' x + sigma' eps)|^2 (Lipman et al. 2023; SiT section 2)."""

    times: TimeSampler = TimeSampler()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        time_key, eps_key = jax.random.split(key)
        return Draws(self.times(time_key, process, x.shape[0]), jax.random.normal(eps_key, x.shape))

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        target = expand(process.dalpha(draws.t), x) * x + expand(process.dsigma(draws.t), x) * draws.eps
        losses = mean_over_data(jnp.square(prediction.velocity - target))
        return losses, {"velocity_mse": losses}
