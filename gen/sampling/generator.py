"""Generators: everything that makes images, as ``(params, keys, cond) -> images``."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.denoiser import Controls, Denoiser
from gen.diffusion.prediction import Denoise
from gen.nn.network import Cond, Params
from gen.sampling.grids import Grid, Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.noise import per_sample_noise, prior, unit_noise
from gen.sampling.solvers import Heun

__all__ = ["DiffusionGenerator", "Generator", "OneStepGenerator", "Sampler"]

# arrays by role: "net" the sampled network, "guide" the weaker one of autoguidance, "tokenizer", "normalizer"
# {"shift", "scale"}
GeneratorParams = Mapping[str, Any]


class Generator(Protocol):
    """What ``gen sample`` and evaluation call."""

    @property
    def nfe(self) -> int | None:
        """Network calls per sample; None where they are measured, by a method ``counted`` that returns them too."""
        ...

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Images (B, H, W, C) float32 in [-1, 1], unclipped.

        Args:
          params: arrays by role: ``net``, and ``tokenizer`` and ``normalizer`` where the model is latent.
          keys: (B,) typed PRNG keys; sample i depends on keys[i] and cond[i] alone.
          cond: conditioning arrays with leading axis B.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a denoiser is sampled: solver, grid, number of steps, guidance.

    Attributes:
      process: the process that is integrated; None for the one the denoiser was trained under. Another one sees
        the denoiser by equal log-SNR (`Denoiser.under`).
      guide: the weaker denoiser of autoguidance; None where it differs from the sampled one in parameters only.
    """

    solver: Any = Heun()
    grid: Any = Uniform()
    steps: int = 50
    guidance: Any = ClassifierFree()
    process: Any = None
    guide: Any = None

    def times(self, process: Any) -> Grid:
        """The grid for a denoiser trained under `process`. Raises GenError when the options do not suit."""
        return self.grid(self.process or process, self.steps)

    def nfe(self, process: Any) -> int:
        """Network calls per sample for a denoiser trained under `process` (a guided call counts once)."""
        return nfe(self.solver, self.times(process))

    def __call__(
        self,
        denoiser: Denoiser,
        params: Params,
        keys: jax.Array,
        shape: tuple[int, ...],
        cond: Cond,
        *,
        guide: Params | None = None,
        trajectory: bool = False,
    ) -> jax.Array:
        """Samples (B, *shape); with `trajectory` the states after each step, (N, B, *shape).

        Args:
          params: the denoiser's parameters.
          keys: (B,) typed PRNG keys; sample i depends on keys[i] and cond alone.
          guide: parameters of the weaker denoiser, for autoguidance.
        """
        grid = self.times(denoiser.process)
        x = prior(grid, keys, shape)
        guided = self.guided(denoiser, params, guide, grid.extras)
        problem = Problem(guided, x, grid, per_sample_noise(keys, shape), cond, self.guidance.init(x))
        return states(self.solver, problem).x if trajectory else integrate(self.solver, problem)

    def guided(
        self, denoiser: Denoiser, params: Params, guide: Params | None = None, per_step: Controls | None = None
    ) -> Denoise:
        """The guided Denoise on the clock of the sampled process.

        Args:
          params, guide: as in a call.
          per_step: the denoiser's controls by step, see `Denoiser.bind`.
        """
        process = self.process or denoiser.process
        weak = None if guide is None else (self.guide or denoiser).under(process).bind(guide)
        bound = denoiser.under(process).bind(params, per_step=per_step)
        return self.guidance(bound, lambda c: denoiser.net.apply(params, c, method="null"), weak)


@dataclasses.dataclass(frozen=True)
class DiffusionGenerator:
    """Prior noise -> solver -> inverse normaliser -> tokenizer decode.

    Attributes:
      denoiser: the sampled `Denoiser`.
      shape: shape of one latent (or image), channels last.
      sampler: solver, grid, steps, guidance.
      tokenizer: a tokenizer config, or None for pixel models.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    sampler: Sampler = Sampler()
    tokenizer: Any = None

    @property
    def nfe(self) -> int:
        """Network calls per sample (a guided call counts once)."""
        return self.sampler.nfe(self.denoiser.process)

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """The sampled latents (B, *shape) on the normalised scale the denoiser was trained on."""
        return self.sampler(self.denoiser, params["net"], keys, self.shape, cond, guide=params.get("guide"))

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """See `Generator`."""
        return decode(self.tokenizer, params, self.latents(params, keys, cond))


@dataclasses.dataclass(frozen=True)
class OneStepGenerator:
    """A distilled student: x = denoised prediction at one fixed time from pure noise.

    Students of several steps are a `DiffusionGenerator` with the solver `gen.sampling.solvers.Renoise` on their times.

    Attributes:
      denoiser: the student, in its teacher's parameterization.
      shape: shape of one latent, channels last.
      t: the time of the one evaluation; None for the noise end of the process.
      noise_scale: standard deviation of the noise that is evaluated; None for sigma(t), which is 80 for EDM's t = 80.
        Students that take unit noise for x_t at an earlier time t (DMD2's one-step SDXL) say 1.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    t: float | None = None
    tokenizer: Any = None
    noise_scale: float | None = None

    nfe = 1

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """The generated latents (B, *shape) on the normalised scale; same noise as the teacher for a key."""
        process = self.denoiser.process
        t = process.t_max if self.t is None else self.t
        scale = process.sigma(np.float64(t)) if self.noise_scale is None else self.noise_scale
        x = jnp.asarray(scale, jnp.float32) * unit_noise(keys, self.shape)
        return self.denoiser(params["net"], x, jnp.float32(t), cond).denoised

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """See `Generator`."""
        return decode(self.tokenizer, params, self.latents(params, keys, cond))


def decode(tokenizer: Any, params: GeneratorParams, latents: jax.Array) -> jax.Array:
    """Undoes the latent normaliser and decodes; the identity for pixel models."""
    if "normalizer" in params:
        latents = latents * params["normalizer"]["scale"] + params["normalizer"]["shift"]
    return latents if tokenizer is None else tokenizer.decode(params["tokenizer"], latents)
