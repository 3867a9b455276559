"""Generators: everything that makes images, as ``(params, keys, cond) -> images``."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.denoiser import Controls, Denoiser
from gen.diffusion.prediction import Denoise
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Params
from gen.sampling.grids import Explicit, Grid, Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.noise import decode_keys, per_sample_noise, prior, unit_noise
from gen.sampling.solvers import Heun, Renoise
from gen.training.task import Model

__all__ = [
    "DenoiserGenerator",
    "DiffusionGenerator",
    "FewSteps",
    "Generator",
    "LatentGenerator",
    "OneStepGenerator",
    "SampledGenerator",
    "Sampler",
    "SamplerConfig",
]

# arrays by role: "net" the sampled network, "guide" the weaker one of autoguidance, "tokenizer", "normalizer"
# {"shift", "scale"}
GeneratorParams = Mapping[str, Any]


class Generator(Protocol):
    """What ``gen sample`` and evaluation call. It says itself what it needs and what it makes."""

    @property
    def nfe(self) -> int | None:
        """Gives the network calls per sample; None where they are measured, by a method ``counted`` that returns them
        too.
        """
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the shape of one sample, channels last: an image, or latents where nothing decodes them."""
        ...

    @property
    def conditions(self) -> Conditions:
        """Gives what it is conditioned on, by name; what its decoder takes as well."""
        ...

    @property
    def networks(self) -> Mapping[str, Any]:
        """Gives configurations of the networks that it calls, by the role of their parameters."""
        ...

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives samples (B, *shape) float32, images in [-1, 1] and unclipped.

        Args:
          params: arrays by role: those of `networks`, and ``normalizer`` where the model is latent.
          keys: (B,) typed PRNG keys; sample i depends on keys[i] and cond[i] alone.
          cond: conditioning arrays with leading axis B.
        """
        ...


class SamplerConfig(Protocol):
    """How a run makes samples: a configuration that turns what the run trained into a Generator."""

    def changed(self, **settings: Any) -> "SamplerConfig":
        """This sampler with other steps, solver, grid or guidance. Raises GenError for one that has no such setting."""
        ...

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> Generator:
        """Gives the Generator of a run's models (by role) and the tokenizer that decodes them, None for none."""
        ...


def changes(guidance: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the settings that are not None; a number as guidance becomes `guidance`, if any, with that scale.

    Raises GenError where `guidance` has no scale of its own.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if guidance is not None and isinstance(given.get("guidance"), int | float):
        if "scale" not in (field.name for field in dataclasses.fields(guidance)):
            raise GenError(f"{type(guidance).__name__} has no scale of its own; give a whole guidance")
        given["guidance"] = dataclasses.replace(guidance, scale=float(given["guidance"]))
    return given


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a denoiser is sampled: solver, grid, number of steps, guidance.

    Attributes:
      process: the process that is integrated; None for the one the denoiser was trained under. Another one sees
        the denoiser by equal log-SNR (`Denoiser.under`).
      guide: the weaker denoiser of autoguidance; None where it differs from the sampled one in parameters only.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for fewer steps than 1.
    """

    solver: Any = Heun()
    grid: Any = Uniform()
    steps: int = 50
    guidance: Any = ClassifierFree()
    process: Any = None
    guide: Any = None
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise GenError(f"a sampler of {self.steps} steps; expected at least 1")

    def changed(self, **settings: Any) -> "Sampler":
        """With the settings ``steps``, ``solver``, ``grid``, ``guidance`` that are not None; a number is a scale.

        Raises GenError for a scale of guidance that has none.
        """
        return dataclasses.replace(self, **changes(self.guidance, settings))

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> "DiffusionGenerator":
        """Gives the Generator that samples the denoiser ``net`` of a run."""
        return DiffusionGenerator(models["net"].config, self, tokenizer)

    def times(self, process: Any) -> Grid:
        """Gives the grid for a denoiser trained under `process`. Raises GenError when the options do not suit."""
        return self.grid(self.process or process, self.steps)

    def nfe(self, process: Any) -> int:
        """Gives the network calls per sample for a denoiser trained under `process` (a guided call counts once)."""
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
        scale: float | None = None,
        trajectory: bool = False,
    ) -> jax.Array:
        """Gives samples (B, *shape); with `trajectory` the states after each step, (N, B, *shape).

        Args:
          params: the denoiser's parameters.
          keys: (B,) typed PRNG keys; sample i depends on keys[i] and cond alone.
          guide: parameters of the weaker denoiser, for autoguidance.
          scale: standard deviation of the noise at the start; None for sigma at the grid's first time.
        """
        grid = self.times(denoiser.process)
        x = prior(grid, keys, shape) if scale is None else scale * unit_noise(keys, shape)
        guided = self.guided(denoiser, params, guide, grid.extras)
        problem = Problem(guided, x, grid, per_sample_noise(keys, shape), cond, self.guidance.init(x))
        return states(self.solver, problem).x if trajectory else integrate(self.solver, problem)

    def guided(
        self, denoiser: Denoiser, params: Params, guide: Params | None = None, per_step: Controls | None = None
    ) -> Denoise:
        """Gives the guided Denoise on the clock of the sampled process.

        Args:
          params, guide: as in a call.
          per_step: the denoiser's controls by step, see `Denoiser.bind`.
        """
        process = self.process or denoiser.process
        weak = None if guide is None else (self.guide or denoiser).under(process).bind(guide)
        bound = denoiser.under(process).bind(params, per_step=per_step)
        return self.guidance(bound, lambda c: denoiser.net.apply(params, c, method="null"), weak)


class LatentGenerator(abc.ABC):
    """What generators around one network share, whose samples a tokenizer decodes."""

    tokenizer: Any

    @property
    @abc.abstractmethod
    def subject(self) -> Any:
        """Gives what is sampled, as a run's `gen.training.task.Model` names it; it has a ``network``."""

    @property
    def network(self) -> Any:
        """Gives the configuration of the sampled network."""
        return self.subject.network

    @property
    def guide(self) -> Denoiser | None:
        """Gives what guides, where it is another denoiser."""
        return None

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder."""
        return None

    @property
    def latent(self) -> tuple[int, ...]:
        """Gives the shape of what the network makes."""
        shape: tuple[int, ...] = self.network.shape
        return shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Does what `Generator.shape` says."""
        return self.latent if self.tokenizer is None else tuple(self.tokenizer.spec.image)

    @property
    def conditions(self) -> Conditions:
        """Does what `Generator.conditions` says."""
        decoder = {} if self.tokenizer is None else self.tokenizer.spec.conditions
        return {**decoder, **self.network.conditions}

    @property
    def networks(self) -> Mapping[str, Any]:
        """Does what `Generator.networks` says."""
        found = {"net": self.network, "tokenizer": self.tokenizer}
        found["guide"] = None if self.guide is None else self.guide.network
        return {role: network for role, network in found.items() if network is not None}


class DenoiserGenerator(LatentGenerator):
    """A `LatentGenerator` whose network is a denoiser's."""

    denoiser: Denoiser

    @property
    def subject(self) -> Denoiser:
        """Gives the denoiser."""
        return self.denoiser


class SampledGenerator(DenoiserGenerator):
    """A `DenoiserGenerator` whose sampler states what guides and how the tokenizer decodes."""

    sampler: Any

    @property
    def guide(self) -> Denoiser | None:
        """Gives the weaker denoiser of autoguidance, as the sampler states it."""
        guide: Denoiser | None = self.sampler.guide
        return guide

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder, as the sampler states them."""
        return self.sampler.decoding


@dataclasses.dataclass(frozen=True)
class DiffusionGenerator(SampledGenerator):
    """Prior noise -> solver -> inverse normaliser -> tokenizer decode.

    Attributes:
      denoiser: the sampled `Denoiser`.
      sampler: solver, grid, steps, guidance.
      tokenizer: a tokenizer config, or None for pixel models.
      noise_scale: standard deviation of the noise at the start; None for sigma at the first time.
    """

    denoiser: Denoiser
    sampler: Sampler = Sampler()
    tokenizer: Any = None
    noise_scale: float | None = None

    @property
    def nfe(self) -> int:
        """Gives the network calls per sample (a guided call counts once)."""
        return self.sampler.nfe(self.denoiser.process)

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the sampled latents (B, *latent) on the normalised scale the denoiser was trained on."""
        guide, scale = params.get("guide"), self.noise_scale
        return self.sampler(self.denoiser, params["net"], keys, self.latent, cond, guide=guide, scale=scale)

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `Generator.__call__` says."""
        latents = self.latents(params, keys, cond)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)


@dataclasses.dataclass(frozen=True)
class OneStepGenerator(DenoiserGenerator):
    """A distilled student: x = denoised prediction at one fixed time from pure noise.

    Attributes:
      denoiser: the student, in its teacher's parameterization.
      t: the time of the one evaluation; None for the noise end of the process.
      tokenizer: a tokenizer config, or None for pixel models.
      noise_scale: standard deviation of the noise that is evaluated; None for sigma(t), which is 80 for EDM's t = 80.
        Students that take unit noise for x_t at an earlier time t (DMD2's one-step SDXL) say 1.
      options: settings of the tokenizer's decoder; None for its own.
    """

    denoiser: Denoiser
    t: float | None = None
    tokenizer: Any = None
    noise_scale: float | None = None
    options: Any = None

    nfe = 1

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the generated latents (B, *latent) on the normalised scale; same noise as the teacher for a key."""
        process = self.denoiser.process
        t = process.t_max if self.t is None else self.t
        scale = process.sigma(np.float64(t)) if self.noise_scale is None else self.noise_scale
        x = jnp.asarray(scale, jnp.float32) * unit_noise(keys, self.latent)
        return self.denoiser(params["net"], x, jnp.float32(t), cond).denoised

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `Generator.__call__` says."""
        latents = self.latents(params, keys, cond)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)


@dataclasses.dataclass(frozen=True)
class FewSteps:
    """The sampler of distilled students, whose times are part of what was trained.

    Attributes:
      steps: the network calls that are asked for, which have to be those that it was trained for; None for any.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.
    """

    steps: int | None = None
    decoding: Any = None

    def changed(self, **settings: Any) -> Self:
        """Gives this sampler, asked for so many ``steps``. Raises GenError for any other setting."""
        given = changes(None, settings)
        if set(given) - {"steps"}:
            raise GenError(
                "this is a student that makes images in the steps it was trained for; leave out solver, grid and "
                "guidance"
            )
        return dataclasses.replace(self, **given)

    def expect(self, times: Sequence[float]) -> None:
        """Raises GenError for a student without times, and one of another number of steps than is asked for."""
        if not times:
            raise GenError("this model has no times of a student; give it a sampler with a solver (sampler)")
        if self.steps not in (None, len(times)):
            raise GenError(
                f"this is a student that makes images in the steps it was trained for, {len(times)}, and not in "
                f"{self.steps}; leave out steps"
            )

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> Generator:
        """One call for students of one time; renoising along the student's times otherwise.

        Raises GenError for a model that was not trained for few steps, or for so many.
        """
        model = models["net"]
        self.expect(model.times)
        if len(model.times) == 1:
            return OneStepGenerator(model.config, model.times[0], tokenizer, model.noise_scale, self.decoding)
        grid = Explicit((*model.times, 0.0))
        sampler = Sampler(Renoise(), grid, len(model.times), decoding=self.decoding)
        return DiffusionGenerator(model.config, sampler, tokenizer, model.noise_scale)


def decode(
    tokenizer: Any, params: GeneratorParams, latents: jax.Array, *, keys: jax.Array, cond: Cond, options: Any
) -> jax.Array:
    """Undoes the latent normaliser and decodes; the identity for pixel models.

    Args:
      keys: (B,) keys of the samples; a decoder that samples draws from a stream of its own.
      cond, options: passed on to the tokenizer (`gen.tokenizers.base.Tokenizer`).
    """
    if "normalizer" in params:
        latents = latents * params["normalizer"]["scale"] + params["normalizer"]["shift"]
    if tokenizer is None:
        return latents
    wanted = {n for name, c in tokenizer.spec.conditions.items() for n in (name, c.mask)}
    own = {name: value for name, value in cond.items() if name in wanted}
    images: jax.Array = tokenizer.decode(
        params["tokenizer"], latents, cond=own, keys=decode_keys(keys), options=options
    )
    return images
