"""Text to images with FlowTok (He et al. 2025, arXiv 2503.10772, section 3): the flow starts from the caption itself.

A caption's features give a Gaussian over latent tokens; what is drawn from it is the start of the flow, and the only
noise. The tokenizer's decoder reads the same features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.prediction import Denoise
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params
from gen.sampling.generator import GeneratorParams, LatentGenerator, changes, decode
from gen.sampling.grids import Grid
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, integrate
from gen.sampling.noise import unit_noise
from gen.sampling.solvers import Euler
from gen.tokenizers.flowtok import SIGMA_MIN, FlowTokConfig, velocity_denoiser
from gen.training.task import Model

__all__ = ["FlowTokGenerator", "FlowTokSampler"]


@dataclasses.dataclass(frozen=True)
class FlowTokSampler:
    """Euler's method from text to image, with the published times.

    Of N steps from time 1 (text) to 1e-5 (image) each has the same length, but the network is called at N times that
    are spread over both ends: the last call is at the image, though the last step begins before it.

    Attributes:
      steps: calls of the network, guided ones on two halves.
      guidance: how text that means something is set against text that does not; its scale w.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for no step.
    """

    steps: int = 20
    guidance: Any = ClassifierFree(2.0)
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise GenError(f"a sampler of {self.steps} steps; expected at least 1")

    def changed(self, **settings: Any) -> "FlowTokSampler":
        """Gives this sampler with other ``steps`` or ``guidance``; a number is its scale. Raises GenError for a solver
        or a grid.
        """
        given = changes(self.guidance, settings)
        if set(given) - {"steps", "guidance"}:
            raise GenError("FlowTok is sampled by Euler's method at its own times; leave out solver and grid")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> "FlowTokGenerator":
        """Gives the Generator of the FlowTok ``net`` of a run."""
        return FlowTokGenerator(models["net"].config, self, tokenizer)

    def called(self) -> np.ndarray:
        """Gives the times (steps,) at which the network is called, on our clock."""
        return np.linspace(1.0, SIGMA_MIN, self.steps)

    def __call__(self, config: FlowTokConfig, params: Params, start: jax.Array) -> jax.Array:
        """Gives image latents (B, tokens, channels) of text latents of the same shape.

        Args:
          params: of the velocity network.
        """
        denoiser, times = velocity_denoiser(config.velocity), jnp.asarray(self.called(), jnp.float32)
        null = {"label": jnp.full(len(start), 1, jnp.int32)}
        guided = self.guidance(denoiser.bind(params), lambda cond: null)
        grid = Grid(np.linspace(1.0, SIGMA_MIN, self.steps + 1), denoiser.process)
        cond = {"label": jnp.zeros(len(start), jnp.int32)}
        # no noise enters on the way
        problem = Problem(
            at(guided, times), start, grid, lambda i: jnp.zeros_like(start), cond, self.guidance.init(start)
        )
        return integrate(Euler(), problem)


def at(denoise: Denoise, times: jax.Array) -> Denoise:
    """Gives `denoise` called at the times (N,) of the steps' numbers, whatever time the solver names."""

    def called(x: jax.Array, t: jax.Array, cond: Cond, step: jax.Array, carry: Any) -> tuple[Any, Any]:
        del t
        return denoise(x, times[step], cond, step, carry)

    return called


@dataclasses.dataclass(frozen=True)
class FlowTokGenerator(LatentGenerator):
    """Keys and captions -> text latents -> image latents -> inverse normaliser -> the tokenizer's image.

    Attributes:
      config: both networks.
      sampler: integrates the flow.
      tokenizer: configuration of the tokenizer of the image latents, or None: samples are then the latents.

    Raises GenError for a tokenizer of other latents.
    """

    config: FlowTokConfig
    sampler: FlowTokSampler = FlowTokSampler()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        spec = None if self.tokenizer is None else self.tokenizer.spec
        if spec is not None and (spec.kind, tuple(spec.shape)) != ("continuous", self.config.shape):
            raise GenError(
                f"the tokenizer has {spec.kind} {tuple(spec.shape)}, and the flow leads to latents "
                f"{self.config.shape}; give the tokenizer that it was trained on"
            )

    @property
    def subject(self) -> FlowTokConfig:
        """Gives the configuration of both networks."""
        return self.config

    @property
    def network(self) -> FlowTokConfig:
        """Gives the same: both networks are one model's."""
        return self.config

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder, as the sampler states them."""
        return self.sampler.decoding

    @property
    def nfe(self) -> int:
        """Gives the calls of the velocity network per sample."""
        return self.sampler.steps

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the image latents (B, *shape) on the normalised scale of training."""
        posterior, _ = Network(self.config.text).apply(params["net"]["text"], cond["text"])
        start = posterior.mean + jnp.exp(0.5 * posterior.logvar) * unit_noise(keys, self.config.shape)
        return self.sampler(self.config, params["net"]["velocity"], start)

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says."""
        latents = self.latents(params, keys, cond)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)
