"""Objectives: the losses denoisers are natively trained with, split into random draws and a pure loss.

``draw`` makes every random number of a step; ``loss`` is a function of arrays, so that golden numbers test the
function that trains, and a distiller can train its fake score with the teacher's own loss.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.diffusion.chain import Chain, Variance, mean_over_data
from gen.diffusion.prediction import Prediction, PredictionKind
from gen.diffusion.process import EDM, expand, pair
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = [
    "Aligned",
    "DDPMLoss",
    "DataMatching",
    "Draws",
    "EDMLoss",
    "Evaluate",
    "MinSNRLoss",
    "Objective",
    "TimesAndNoise",
    "Uncertain",
    "VelocityMatching",
    "alignment",
    "cosine_similarity",
    "mean_over_data",
    "min_snr",
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
    """The native training loss of a denoiser.

    Attributes:
      taps: features of the network that the loss reads from the prediction's ``extra``.
      inputs: names of the batch's arrays that the loss reads from the condition, beside what the network takes.
    """

    taps: tuple[str, ...]
    inputs: tuple[str, ...]

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Draws times and noise for a batch x (B, ..., C)."""
        ...

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Gives per-sample losses (B,) and named per-sample terms (B,)."""
        ...


def noised(process: Any, x: jax.Array, draws: Draws) -> jax.Array:
    """Gives x_t = alpha(t) x + sigma(t) eps, (B, ...) like x, of the times (B,) and the noise drawn."""
    a, s = pair(process, draws.t, x)
    return a * x + s * draws.eps


class TimesAndNoise:
    """What objectives share that draw their own `times`, and noise beside them."""

    times: TimeSampler

    taps: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Does what `Objective.draw` says."""
        time_key, eps_key = jax.random.split(key)
        return Draws(self.times(time_key, process, x.shape[0]), jax.random.normal(eps_key, x.shape))


@dataclasses.dataclass(frozen=True)
class VelocityMatching(TimesAndNoise):
    """Flow matching: mean |v_hat - (alpha' x + sigma' eps)|^2 (arXiv 2210.02747; SiT section 2).

    Attributes:
      times: how times are drawn.
      cosine: weight of LightningDiT's direction loss: 1 - cos(v_hat, v) along the channels, mean over positions.
      weight: of the squared error by the noise level s = t of a rectified flow (Esser et al. 2024, sec. 3.1):
        ``cosmap`` 2 / (pi (1 - 2 s + 2 s^2)), ``sigma-sqrt`` s^-2, or none.
    """

    times: TimeSampler = TimeSampler()
    cosine: float = 0.0
    weight: Literal["none", "cosmap", "sigma-sqrt"] = "none"

    def weights(self, process: Any, t: jax.Array) -> jax.Array:
        """Gives the factor on the squared error at times t."""
        s = process.sigma(t)
        match self.weight:
            case "cosmap":
                return 2.0 / (math.pi * (1.0 - 2.0 * s + 2.0 * s**2))
            case "sigma-sqrt":
                return s**-2.0
        return jnp.ones_like(s)

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        target = expand(process.dalpha(draws.t), x) * x + expand(process.dsigma(draws.t), x) * draws.eps
        losses = mean_over_data(jnp.square(prediction.velocity - target))
        terms = {"velocity_mse": losses}
        if self.weight != "none":
            losses = self.weights(process, draws.t) * losses
        if self.cosine:
            terms["velocity_cosine"] = mean_over_data(1.0 - cosine_similarity(prediction.velocity, target))
            losses = losses + self.cosine * terms["velocity_cosine"]
        return losses, terms


def cosine_similarity(a: jax.Array, b: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Gives cos(a, b) along the last axis (B, ..., C) -> (B, ...), float32; 0, without gradient, where a norm product <
    eps.

    A network whose last layer starts at zero predicts no direction in its first step: the limit's gradient there
    would be of size 1 / eps and would stay in Adam's second moment for hundreds of steps.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.square(a).sum(-1) * jnp.square(b).sum(-1)
    live = squares > eps**2
    return jnp.where(live, (a * b).sum(-1) * jax.lax.rsqrt(jnp.where(live, squares, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class DataMatching(TimesAndNoise):
    """Mean |x_hat - x|^2 of the denoised data without a weight, as NVlabs/FastGen trains fake scores.

    Attributes:
      times: how times are drawn.
    """

    times: TimeSampler = TimeSampler()

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        losses = mean_over_data(jnp.square(evaluate(noised(process, x, draws), draws.t, cond).denoised - x))
        return losses, {"mse": losses}


@dataclasses.dataclass(frozen=True)
class MinSNRLoss(TimesAndNoise):
    """Mean squared error weighted to min(SNR, gamma) on the data (arXiv 2303.09556), in the network's own quantity.

    Attributes:
      gamma: where the weight stops to grow.
      times: how times are drawn; uniform over the chain on the ddpm process.
    """

    gamma: float = 5.0
    times: TimeSampler = TimeSampler()

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `Objective.loss` says. Raises GenError for networks that predict other than x, eps or v."""
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        error = mean_over_data(jnp.square(_target(prediction, process, x, draws) - prediction.value))
        snr = jnp.square(process.alpha(draws.t) / process.sigma(draws.t))
        return min_snr(snr, self.gamma, prediction.kind) * error, {"mse": error}


def min_snr(snr: jax.Array, gamma: float, kind: PredictionKind) -> jax.Array:
    """Gives the weights on the squared error of an x, eps or v prediction that amount to min(snr, gamma) on the
    data.

    Raises GenError for a network that predicts neither x, eps nor v.
    """
    match kind:
        case "x":
            return jnp.minimum(snr, gamma)
        case "eps":  # min(snr, gamma) / snr, whose limit at snr = 0 is 1
            return jnp.minimum(1.0, gamma / jnp.maximum(snr, jnp.finfo(jnp.float32).tiny))
        case "v":
            return jnp.minimum(snr, gamma) / (snr + 1.0)
    raise GenError(f"min-SNR weights are for networks that predict x, eps or v, not {kind}; change the objective")


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Another objective plus REPA's alignment (arXiv 2410.06940): -cos(projection, encoder feature), mean over tokens.

    The network is an `gen.diffusion.backbones.aligned.AlignedConfig`. The condition carries the frozen encoders'
    features of the clean images: ``encoder_0`` ... (B, N, widths[i]), in the order of the network's tokens.

    Attributes:
      objective: what is trained besides.
      weight: factor on the alignment.
      encoders: how many.
    """

    objective: Any = VelocityMatching()
    weight: float = 0.5
    encoders: int = 1

    @property
    def taps(self) -> tuple[str, ...]:
        """Gives the projections, which `evaluate` must return as well."""
        return tuple(f"aligned_{i}" for i in range(self.encoders))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Gives the encoders' features by name."""
        return tuple(f"encoder_{i}" for i in range(self.encoders))

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Gives the inner objective's draws."""
        draws: Draws = self.objective.draw(key, process, x)
        return draws

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `Objective.loss` says; the term ``alignment`` is in [-1, 1], -1 at best."""
        seen: list[Prediction] = []

        def watched(x_t: jax.Array, t: jax.Array, cond: Cond) -> Prediction:
            seen.append(evaluate(x_t, t, cond))
            return seen[-1]

        losses, terms = self.objective.loss(watched, process, x, cond, draws)
        features = [cond[f"encoder_{i}"].astype(jnp.float32) for i in range(self.encoders)]  # caches hold halves
        parts = [alignment(seen[0].extra[tap], f) for tap, f in zip(self.taps, features, strict=True)]
        aligned = sum(parts[1:], parts[0]) / len(parts)
        return losses + self.weight * aligned, {**terms, "alignment": aligned}


def alignment(projected: jax.Array, features: jax.Array) -> jax.Array:
    """Gives -cos of two sets of tokens (B, N, C), mean over the tokens: (B,). Raises GenError for different shapes."""
    if projected.shape != features.shape:
        raise GenError(
            f"the network's features are {projected.shape}, the encoder's {features.shape}; resize the encoder's input "
            "so that both have as many tokens, and give the projectors its width"
        )
    return -mean_over_data(cosine_similarity(projected, features))


@dataclasses.dataclass(frozen=True)
class DDPMLoss:
    """The losses of the discrete DDPM chain: simple, hybrid (DiT, ADM) and variational (arXiv 2102.09672).

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

    taps: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Draws steps uniformly over the chain."""
        time_key, eps_key = jax.random.split(key)
        chain = Chain(process, self.kept)
        step = jax.random.randint(time_key, x.shape[:1], 0, len(chain.indices))
        return Draws(chain.times(step), jax.random.normal(eps_key, x.shape))

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `Objective.loss` says; terms ``mse`` and ``vb`` (bits per dimension) as far as they are part of the
        loss.
        """
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
    """EDM's denoising loss (arXiv 2206.00364, table 1): lambda(sigma) mean |D(x + sigma eps; sigma) - x|^2.

    ln sigma is normal, lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with the process's sigma_data.

    Attributes:
      mean, std: of ln sigma.
    """

    mean: float = -1.2
    std: float = 1.2

    taps: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Draws log-normal noise levels."""
        time_key, eps_key = jax.random.split(key)
        sigma = jnp.exp(self.mean + self.std * jax.random.normal(time_key, x.shape[:1]))
        return Draws(sigma, jax.random.normal(eps_key, x.shape))

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `Objective.loss` says. Raises GenError for a process other than edm."""
        if not isinstance(process, EDM):
            raise GenError(f"the edm loss needs the edm process, not {type(process).__name__}; use that")
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        weight = (draws.t**2 + process.sigma_data**2) / (draws.t * process.sigma_data) ** 2
        error = mean_over_data(jnp.square(prediction.denoised - x))
        return weight * error, {"denoised_mse": error}


@dataclasses.dataclass(frozen=True)
class Uncertain:
    """Another loss L, weighted by the network's own uncertainty u: L exp(-u) + u (arXiv 2312.02696, eq. 15).

    u is the feature "logvar" that the network returns, learned along; it is used in training only.
    """

    inner: Any = EDMLoss()

    taps: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()

    def draw(self, key: jax.Array, process: Any, x: jax.Array) -> Draws:
        """Gives the inner loss's draws."""
        draws: Draws = self.inner.draw(key, process, x)
        return draws

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Does what `Objective.loss` says. Raises GenError for a network that learns no uncertainty."""
        seen: list[jax.Array] = []

        def watched(x_t: jax.Array, t: jax.Array, cond: Cond) -> Prediction:
            prediction = evaluate(x_t, t, cond)
            if "logvar" not in prediction.extra:
                raise GenError("this network learns no uncertainty; use the plain loss, or an EDM2 network with one")
            seen.append(prediction.extra["logvar"])
            return prediction

        losses, terms = self.inner.loss(watched, process, x, cond, draws)
        u = seen[0]
        return losses * jnp.exp(-u) + u, {**terms, "weighted": losses, "logvar": u}
