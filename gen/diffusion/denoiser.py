"""Denoisers: a network, the process it was trained under, and what its output means.

The network keeps its official clock and sign. The parameterization says what the raw output is and how our
time becomes the network's; it is the only place where a clock is ever reversed. The result of evaluating a
denoiser is a `Prediction`, which converts between data, noise, velocity and score.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.config import check_choices
from gen.diffusion.ddpm import DDPM
from gen.diffusion.objectives import VelocityMatching
from gen.diffusion.prediction import EARLY, Denoise, Prediction, PredictionKind
from gen.diffusion.process import EDM, Process, expand, pair
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params

__all__ = [
    "Clock",
    "Controls",
    "Denoiser",
    "EDMPrecondition",
    "Parameterization",
    "Predict",
    "Reclocked",
    "drop",
    "seen_under",
]

Controls = Mapping[str, jax.Array]  # arrays of the network's `controls`, by name; without a batch axis
Clock = Literal["time", "reversed", "index", "nearest-index", "log-half-level"]


class Parameterization(Protocol):
    """How a network is called and what comes out; see `Predict` and `EDMPrecondition`.

    Attributes:
      output: the quantity that the prediction is in.
    """

    output: PredictionKind

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Gives the network's input and its times, each (B,), for x_t at our time t (B,).

        One time, or two for a flow map's network. Raises GenError for an unsuitable process.
        """
        ...

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        """Gives the meaning of the raw output."""
        ...

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Gives what the raw output should have been for clean `x` and noise `eps`."""
        ...


@dataclasses.dataclass(frozen=True)
class Predict:
    """The raw output is x, eps, v, velocity or score, up to a sign, on one of several clocks.

    Attributes:
      output: the quantity predicted.
      clock: what the network receives: ``time`` (our t), ``reversed`` (1 - t: SiT, LightningDiT), ``index`` (the
        DDPM chain index: DiT, ADM), ``nearest-index`` (the same, rounded to the chain's nearest noise level: iDDPM in
        EDM) or ``log-half-level`` (ln(level / 2), level = sigma / alpha: score SDE's VE models).
      scale: factor on the network's time (1000 where a continuous model was built for chain indices).
      sign: -1 where the official code predicts the negative (velocities on reversed clocks).
      learned_variance: the network has twice the data's channels; the second half is the raw variance output.

    Raises GenError for a sign other than 1 and -1.

    `inputs` raises it for a chain that ends in pure noise where the network says noise alone, and for a chain's clock
    on another process.
    """

    output: PredictionKind = "velocity"
    clock: Clock = "time"
    scale: float = 1.0
    sign: int = 1
    learned_variance: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.sign not in (1, -1):
            raise GenError(f"Predict's sign is {self.sign}; expected 1, or -1 where the network gives the negative")

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        if isinstance(process, DDPM) and process.zero_snr and self.output in ("eps", "score"):
            raise GenError(f"a chain that ends in pure noise has no data in its {self.output} there; predict v or x")
        match self.clock:
            case "time":
                clock = t
            case "reversed":
                clock = 1.0 - t
            case "log-half-level":
                clock = jnp.log(0.5 * process.sigma(t) / process.alpha(t))
            case _:
                if not isinstance(process, DDPM):
                    raise GenError(
                        f"clock '{self.clock}' needs the ddpm process, not {type(process).__name__}; use that or clock "
                        "'time'"
                    )
                clock = process.index(t) if self.clock == "index" else _nearest_index(process, t)
        return x, (self.scale * clock,)

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        if self.learned_variance:
            raw, variance = jnp.split(raw, 2, axis=-1)
            extra = {**extra, "variance": variance}
        return Prediction(self.sign * raw, x, t, extra, process, self.output)

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        a, s = pair(process, t, x)
        match self.output:
            case "x":
                return self.sign * x
            case "eps":
                return self.sign * eps
            case "v":
                return self.sign * (a * eps - s * x)
            case "score":
                return self.sign * -eps / s
            case "velocity":
                return self.sign * (expand(process.dalpha(t), x) * x + expand(process.dsigma(t), x) * eps)


def _nearest_index(process: DDPM, t: jax.Array) -> jax.Array:
    """The chain index whose level sigma / alpha is nearest to that of t; -1 is clean data."""
    low = jnp.clip(jnp.floor(process.index(t)), -1, process.steps - 2)
    levels = [process.sigma(u) / process.alpha(u) for u in (process.time(low), t, process.time(low + 1.0))]
    return jnp.where(levels[1] - levels[0] <= levels[2] - levels[1], low, low + 1.0)


@dataclasses.dataclass(frozen=True)
class EDMPrecondition:
    """EDM preconditioning (Karras et al. 2022, table 1): D = c_skip x + c_out F(c_in x; ln(sigma) / 4).

    The deviation of the data that the scalings assume, sigma_data, is the process's.

    Attributes:
      scale: factor on the network's time: 1000 where EDM's recipe trains a network made for the indices of a chain.

    `inputs` raises GenError for a process that is not EDM's.
    """

    scale: float = 1.0

    output: ClassVar[PredictionKind] = "x"

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        if not isinstance(process, EDM):
            raise GenError(
                f"EDM preconditioning needs the edm process, not {type(process).__name__}; use that, or predict x"
            )
        return expand(jax.lax.rsqrt(t**2 + process.sigma_data**2), x) * x, (0.25 * self.scale * jnp.log(t),)

    def _scales(self, process: Any, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        data = process.sigma_data
        total = t**2 + data**2
        return expand(data**2 / total, x), expand(t * data * jax.lax.rsqrt(total), x)

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        skip, out = self._scales(process, x, t)
        return Prediction(skip * x + out * raw, x, t, extra, process, "x")

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        skip, out = self._scales(process, x, t)
        return (x - skip * (x + expand(t, x) * eps)) / out


def drop(network: Network, params: Params, cond: Cond, mask: jax.Array) -> Cond:
    """Replaces the conditioning of the samples where `mask` (B,) is true by the network's null condition."""
    null = network.apply(params, cond, method="null")
    return {k: jnp.where(mask.reshape(mask.shape + (1,) * (v.ndim - 1)), null[k], v) for k, v in cond.items()}


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """network + process + parameterization + native loss. Static and hashable: parameters are passed to every call.

    Attributes:
      network: the config of a backbone (a frozen dataclass with ``build(rngs)``).
      process: what noises the data, and the clock that callers speak.
      parameterization: what the network's raw output means.
      objective: the loss that the model is natively trained with (`gen.diffusion.objectives`). Pretraining uses it, and
        so does every method that trains another model of the same kind (a fake score, a policy).
    """

    network: Any
    process: Any
    parameterization: Any = Predict()
    objective: Any = VelocityMatching()

    @property
    def net(self) -> Network:
        """Gives the network as a parameter-free callable."""
        return Network(self.network)

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        t: jax.Array,
        cond: Cond,
        *,
        controls: Controls | None = None,
        taps: tuple[str, ...] = (),
    ) -> Prediction:
        """Evaluates the network at x_t.

        Args:
          params: the network's parameters.
          x: (B, ..., C) x_t.
          t: scalar or (B,), our clock.
          cond: conditioning arrays with leading axis B.
          controls, taps: passed to the network; tapped features come back in ``extra``, and the `Prediction` of an
            early head, where the network has one, as ``early``.
        """
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
        inner, times = self.parameterization.inputs(self.process, x, t)
        raw, features = self.net(params, inner, times, cond, controls=controls, taps=taps)
        if EARLY in features:
            early = self.parameterization.prediction(self.process, features[EARLY], x, t, {})
            features = {**features, EARLY: early}
        return self.parameterization.prediction(self.process, raw, x, t, features)

    def features(
        self, params: Params, x: jax.Array, t: jax.Array, cond: Cond, taps: tuple[str, ...]
    ) -> Mapping[str, jax.Array]:
        """Only the features named by `taps`; the network stops at the last of them."""
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
        inner, times = self.parameterization.inputs(self.process, x, t)
        _, features = self.net(params, inner, times, cond, taps=taps, stop=True)
        return features

    def bind(self, params: Params, controls: Controls | None = None, per_step: Controls | None = None) -> Denoise:
        """Gives the `Denoise` function of these parameters.

        Args:
          controls: the network's controls, which hold at every step.
          per_step: controls with a leading axis over a solver's steps, each of which picks its own entry
            (``Grid.extras``).
        """
        return _bind(self, params, controls, per_step)

    def under(self, process: Process) -> "Denoiser | Reclocked":
        """Gives the same denoiser on the clock of `process`; itself where that is its own."""
        return self if process == self.process else Reclocked(self, process)


def seen_under(inner: Process, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives x_t and t (B,) of `process` as `inner` has them at equal log-SNR; at its noisiest time for noisier ones."""
    own = jnp.minimum(inner.time_of(process.logsnr(t)), inner.t_max)
    # the ratio of the alphas (and of the sigmas), safe where either is 0
    size, own_size = (jnp.hypot(p.alpha(u), p.sigma(u)) for p, u in ((process, t), (inner, own)))
    return expand(own_size / size, x) * x, own


@dataclasses.dataclass(frozen=True)
class Reclocked:
    """A denoiser seen under another process by equal log-SNR: the two inputs are then equal up to a scale.

    Noisier times than the denoiser knows are its noisiest.

    Attributes:
      denoiser: the denoiser under the process that it was trained with.
      process: the process whose x_t and clock callers speak.
    """

    denoiser: Denoiser
    process: Process

    def __call__(self, params: Params, x: jax.Array, t: jax.Array, cond: Cond, **kwargs: Any) -> Prediction:
        """Does what `Denoiser.__call__` says."""
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])
        found = self.denoiser(params, *seen_under(self.denoiser.process, self.process, x, t), cond, **kwargs)
        return Prediction(found.denoised, x, t, found.extra, self.process, "x")

    def bind(self, params: Params, controls: Controls | None = None, per_step: Controls | None = None) -> Denoise:
        """Does what `Denoiser.bind` says."""
        return _bind(self, params, controls, per_step)


def _bind(
    denoiser: Denoiser | Reclocked, params: Params, controls: Controls | None, per_step: Controls | None
) -> Denoise:
    def denoise(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Prediction, Any]:
        now = {k: jnp.asarray(v)[step] for k, v in (per_step or {}).items()}
        return denoiser(params, x, t, cond, controls={**(controls or {}), **now}), carry

    return denoise
