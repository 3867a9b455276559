"""Objectives: the losses denoisers are natively trained with, split into random draws and a pure loss.

``draw`` makes every random number of a step; ``loss`` is a function of arrays, so that golden numbers test the
function that trains, and a distiller can train its fake score with the teacher's own loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.chain import Chain, Variance, mean_over_data
from gen.diffusion.denoiser import Prediction
from gen.diffusion.process import EDM, expand, pair
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = [
    "DDPMLoss",
    "Draws",
    "EDMLoss",
    "Evaluate",
    "Objective",
    "TimeSampler",
    "VelocityMatching",
    "mean_over_data",
    "noised",
]

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


@dataclasses.dataclass(frozen=True)
class DDPMLoss:
    """The losses of the discrete DDPM chain: simple, hybrid (DiT, ADM) and variational (Nichol & Dhariwal 2021).

    Attributes:
      term: ``mse`` in the network's own quantity, plus the variational term where the variance is learned; or ``kl``:
        the variational term alone, times the length of the chain.
      variance: of the reverse step; ``learned`` needs a network with learned variance.
      bound_weight: factor on the variational term beside the mse. It trains the variance only: the mean is held
        constant in it.
      kept: original indices of a respaced chain; all when empty.
    """

    term: Literal["mse", "kl"] = "mse"
    variance: Variance = "learned"
    bound_weight: float = 1.0
    kept: tuple[int, ...] = ()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Uniform over the steps of the chain. Raises GenError for a process other than ddpm."""
        time_key, eps_key = jax.random.split(key)
        chain = Chain(process, self.kept)
        step = jax.random.randint(time_key, x.shape[:1], 0, len(chain.indices))
        return Draws(chain.times(step), jax.random.normal(eps_key, x.shape))

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """See `Objective`; terms ``mse`` and ``vb`` (bits per dimension) as far as they are part of the loss."""
        chain = Chain(process, self.kept)
        step = chain.steps(draws.t)
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        if self.term == "kl":
            bound = chain.bound(prediction, x, step, self.variance)
            return len(chain.indices) * bound, {"vb": bound}
        mse = mean_over_data(jnp.square(_target(prediction, process, x, draws) - prediction.value))
        if self.variance != "learned":
            return mse, {"mse": mse}
        held = prediction.with_value(jax.lax.stop_gradient(prediction.value))
        bound = self.bound_weight * chain.bound(held, x, step, self.variance)
        return mse + bound, {"mse": mse, "vb": bound}


def _target(prediction: Prediction, process: Any, x: jax.Array, draws: Draws) -> jax.Array:
    """What the prediction's value should have been. Raises GenError for score predictions."""
    match prediction.kind:
        case "x":
            return x
        case "eps":
            return draws.eps
        case "v":
            a, s = pair(process, draws.t, x)
            return a * draws.eps - s * x
    raise GenError(f"the ddpm loss trains networks that predict x, eps or v, not {prediction.kind}; change one of them")


@dataclasses.dataclass(frozen=True)
class EDMLoss:
    """EDM's denoising loss (Karras et al. 2022, table 1): lambda(sigma) mean |D(x + sigma eps; sigma) - x|^2.

    ln sigma is normal, lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with the process's sigma_data.

    Attributes:
      mean, std: of ln sigma.
    """

    mean: float = -1.2
    std: float = 1.2

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Log-normal noise levels."""
        time_key, eps_key = jax.random.split(key)
        sigma = jnp.exp(self.mean + self.std * jax.random.normal(time_key, x.shape[:1]))
        return Draws(sigma, jax.random.normal(eps_key, x.shape))

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """See `Objective`. Raises GenError for a process other than edm."""
        if not isinstance(process, EDM):
            raise GenError(f"the edm loss needs the edm process, not {type(process).__name__}; use that")
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        weight = (draws.t**2 + process.sigma_data**2) / (draws.t * process.sigma_data) ** 2
        error = mean_over_data(jnp.square(prediction.denoised - x))
        return weight * error, {"denoised_mse": error}
