"""Networks that are not asked as they were trained, or that answer twice: parameterizations of their own.

Both are `gen.diffusion.denoiser.Parameterization`s: a network made for another process, with which any denoiser becomes
a rectified flow (`rectified`), and one that predicts data and noise together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gen.diffusion.denoiser import Clock, Denoiser, EDMPrecondition, Predict, seen_under
from gen.diffusion.prediction import Prediction, PredictionKind
from gen.diffusion.process import EDM, Linear, Process, pair

__all__ = ["MARGIN", "Converted", "DataAndNoise", "rectified"]

MARGIN = 1e-5  # nearest that the training of rectified flows comes to clean data and to pure noise


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network of another process, asked at equal log-SNR: x_t and the time are brought to it, the data come back.

    On the linear flow an EDM network D gives velocity = (x_t - D(x_t / (1 - t); t / (1 - t))) / t (2-rectified flow++,
    Lee et al. 2024, arXiv 2405.20320, prop. 1): the same weights continue as a rectified flow.

    Attributes:
      inner: the network's own parameterization.
      process: its own process, whose t_max is the noisiest time that it is asked at.
    """

    inner: Any = EDMPrecondition()
    process: Any = EDM()

    output: ClassVar[PredictionKind] = "x"

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Does what `gen.diffusion.denoiser.Parameterization.inputs` says."""
        inputs: tuple[jax.Array, tuple[jax.Array, ...]]
        inputs = self.inner.inputs(self.process, *seen_under(self.process, process, x, t))
        return inputs

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        """Gives the data prediction."""
        own = self.inner.prediction(self.process, raw, *seen_under(self.process, process, x, t), extra)
        return Prediction(own.denoised, x, t, own.extra, process, "x")

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Does what `gen.diffusion.denoiser.Parameterization.target` says."""
        _, own = seen_under(self.process, process, x, t)
        target: jax.Array = self.inner.target(self.process, x, eps, own)
        return target


def rectified(denoiser: Denoiser) -> Denoiser:
    """Gives a denoiser as a rectified flow with the same weights: itself on the linear process, else converted."""
    if denoiser.process == Linear():
        return denoiser
    own = denoiser.process
    if isinstance(own, EDM):  # asked up to the level of the latest training time
        own = dataclasses.replace(own, sigma_max=max(own.sigma_max, 1.0 / MARGIN))
    return Denoiser(denoiser.network, Linear(), Converted(denoiser.parameterization, own))


@dataclasses.dataclass(frozen=True)
class DataAndNoise:
    """A network of twice the channels predicts x and eps; both make one data prediction (arXiv 2202.00512, sec. 4).

    D = (sigma^2 x_out + alpha^2 x_of_eps) / (alpha^2 + sigma^2) with x_of_eps = (x_t - sigma eps_out) / alpha: the
    noise prediction counts near the data, the data prediction near the noise.

    Attributes:
      clock, scale: as in `gen.diffusion.denoiser.Predict`.
    """

    clock: Clock = "time"
    scale: float = 1.0

    output: ClassVar[PredictionKind] = "x"

    def inputs(self, process: Process, x: jax.Array, t: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Does what `gen.diffusion.denoiser.Parameterization.inputs` says."""
        return Predict("x", self.clock, self.scale).inputs(process, x, t)

    def prediction(
        self, process: Process, raw: jax.Array, x: jax.Array, t: jax.Array, extra: Mapping[str, Any]
    ) -> Prediction:
        """Gives the data prediction that both outputs make."""
        data, eps = jnp.split(raw, 2, axis=-1)
        a, s = pair(process, t, x)
        return Prediction((s**2 * data + a * (x - s * eps)) / (a**2 + s**2), x, t, extra, process, "x")

    def target(self, process: Process, x: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """Gives both quantities, x before eps, on the channel axis."""
        del process, t
        return jnp.concatenate([x, eps], axis=-1)
