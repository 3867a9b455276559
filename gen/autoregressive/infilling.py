"""Sampling of continuous tokens: a random order, several tokens a step, each drawn by the diffusion head.

MAR's generation (Li et al. 2024, arXiv 2406.11838). The number of tokens that stay masked falls along a cosine; one
`lax.scan` runs all steps, and each draws as many tokens as the fullest step needs, of which it keeps its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.latent_tokens import LatentTokenModel, masked_first
from gen.autoregressive.masked import entering
from gen.autoregressive.sampler import both
from gen.diffusion.denoiser import Denoiser
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.sampling.generator import GeneratorParams, LatentGenerator, changes, decode
from gen.sampling.grids import Grid, Respaced
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, integrate
from gen.sampling.noise import Noise, per_sample_noise, unit_noise
from gen.sampling.solvers import Ancestral
from gen.training.task import Model

__all__ = ["InfillingSampler", "KnownScale", "LatentTokenGenerator", "draw_tokens", "infill"]

# noise(k) is step k's start of the head's chain (B, G, C), and the noise of the chain's own steps, each (B, G, C)
InfillingNoise = Callable[[Any], tuple[jax.Array, Noise]]
_ORDER = 2**30  # beyond the number of any step


@dataclasses.dataclass(frozen=True)
class KnownScale:
    """Guidance w of the head, which grows with the share of tokens that are known after a step: 1 + (w - 1) share.

    The last step, after which all are, counts as if one were not, as published.

    Attributes:
      scale: w; 1 for no guidance.
      constant: whether it is w at all steps.
    """

    scale: float = 1.0
    constant: bool = False

    def scales(self, tokens: int, left: np.ndarray) -> np.ndarray:
        """Gives w at steps after which `left` (steps,) of the `tokens` are not known."""
        if self.constant:
            return np.full(len(left), self.scale)
        return 1.0 + (self.scale - 1.0) * (tokens - np.maximum(left, 1)) / tokens


def draw_tokens(
    denoiser: Denoiser,
    params: Params,
    z: jax.Array,
    null: jax.Array | None,
    scale: jax.Array | float,
    start: jax.Array,
    noise: Noise,
    grid: Grid,
) -> jax.Array:
    """Draws tokens (N, C) with the diffusion head: ancestral sampling with the learned variance.

    Args:
      denoiser: the head; params: its own.
      z: (N, D); null: (N, D) of the null condition, or None for no guidance by `scale`.
      start: (N, C) standard normal; noise: that of the chain's steps, times the temperature.
      grid: the times of the chain.

    The noise prediction is guided; the variance is the conditional one's.
    """
    denoise = denoiser.bind(params)
    cond = {"z": z}
    if null is not None:
        cond["scale"] = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), z.shape[:1])
        denoise = ClassifierFree(scales="scale")(denoise, lambda _: {"z": null})
    return integrate(Ancestral("learned"), Problem(denoise, start, grid, noise, cond))


def infill(
    model: LatentTokenModel,
    params: Params,
    cond: Cond,
    orders: jax.Array,
    noise: InfillingNoise,
    *,
    steps: int,
    grid: Grid,
    temperature: float = 1.0,
    guidance: KnownScale = KnownScale(),
) -> jax.Array:
    """Gives the tokens after each step, (steps, B, L, C): after the last all are known.

    Step k reads the known tokens and draws those that `orders` has from its place ``entering[k + 1]`` up to
    ``entering[k]`` (`gen.autoregressive.masked.entering`, cosine).

    Args:
      model: the model; params: of its network.
      cond: conditions by name, with leading axis B.
      orders: (B, L), a permutation in each row; the first positions stay masked longest.
      noise: the head's, by step, for as many tokens as the fullest step draws.
      grid: the head's times.
      temperature: factor on the noise of the head's steps.
    """
    counts = np.append(entering("cosine", model.length, steps), 0)
    most, guided = fullest(model, steps), guidance.scale != 1.0
    scales = guidance.scales(model.length, counts[1:])
    rows = {"k": np.arange(steps), "now": counts[:-1], "left": counts[1:]}
    inputs = {name: jnp.asarray(row, jnp.int32) for name, row in rows.items()}
    inputs["scale"] = jnp.asarray(scales, jnp.float32)
    cond = both(model, params, cond) if guided else cond
    batch = len(orders)

    def step(tokens: jax.Array, row: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mask, seen = masked_first(orders, row["now"]), tokens
        if guided:
            mask, seen = jnp.concatenate([mask, mask]), jnp.concatenate([tokens, tokens])
        z = model.z(params, seen, mask, cond)
        first = jnp.minimum(row["left"], model.length - most)
        places = jax.lax.dynamic_slice_in_dim(orders, first, most, axis=1)
        mine = first + jnp.arange(most)
        mine = (mine >= row["left"]) & (mine < row["now"])

        def flat(array: jax.Array) -> jax.Array:
            return array.reshape(batch * most, -1)

        own = [flat(jnp.take_along_axis(half, places[..., None], axis=1)) for half in jnp.split(z, 1 + guided)]
        start, steps_noise = noise(row["k"])
        drawn = draw_tokens(
            model.denoiser,
            params["head"],
            own[0],
            own[1] if guided else None,
            row["scale"],
            flat(start),
            lambda i: temperature * flat(steps_noise(i)),
            grid,
        )
        kept = jnp.take_along_axis(tokens, places[..., None], axis=1)
        new = jnp.where(mine[None, :, None], drawn.reshape(kept.shape), kept)
        tokens = tokens.at[jnp.arange(batch)[:, None], places].set(new)
        return tokens, tokens

    blank = jnp.zeros((batch, model.length, model.head.channels))
    _, path = jax.lax.scan(step, blank, inputs)
    return path


def fullest(model: LatentTokenModel, steps: int) -> int:
    """Tells how many tokens the fullest of `steps` steps draws."""
    counts = np.append(entering("cosine", model.length, steps), 0)
    return int((counts[:-1] - counts[1:]).max())


@dataclasses.dataclass(frozen=True)
class InfillingSampler:
    """How a model of continuous tokens is sampled, see `infill`.

    Attributes:
      steps: calls of the transformer; there cannot be more than tokens.
      head_steps: steps of the head's chain for each token.
      temperature: factor on the noise of these steps.
      guidance: scale of classifier-free guidance of the head.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for no step of either kind, and for a negative temperature.
    """

    steps: int = 64
    head_steps: int = 100
    temperature: float = 1.0
    guidance: KnownScale = KnownScale()
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.head_steps < 1 or self.temperature < 0:
            raise GenError(
                f"{self.steps} steps, {self.head_steps} steps of the head, temperature {self.temperature}; expected at "
                "least 1 step of both, and a temperature of 0 or more"
            )

    def changed(self, **settings: Any) -> "InfillingSampler":
        """Gives this sampler with other ``steps`` or ``guidance``; a number is its scale. Raises GenError for a solver
        or a grid.
        """
        given = changes(self.guidance, settings)
        if set(given) - {"steps", "guidance"}:
            raise GenError("this model fills in tokens; it has steps and guidance, and neither solver nor grid")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> "LatentTokenGenerator":
        """Gives the Generator of the model ``net`` of a run."""
        return LatentTokenGenerator(models["net"].config, self, tokenizer)


@dataclasses.dataclass(frozen=True)
class LatentTokenGenerator(LatentGenerator):
    """Keys and conditions -> continuous tokens -> inverse normaliser -> the tokenizer's image.

    Attributes:
      latent_model: the model of continuous tokens.
      sampler: draws its tokens.
      tokenizer: configuration of the tokenizer of these latents, or None: samples are then the latents.

    Raises GenError for a tokenizer of other latents, and for more steps than there are tokens.
    """

    latent_model: Any
    sampler: InfillingSampler
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.sampler.steps > self.latent_model.length:
            raise GenError(
                f"{self.sampler.steps} steps for {self.latent_model.length} tokens; each step draws at least one: use "
                "fewer"
            )
        spec = None if self.tokenizer is None else self.tokenizer.spec
        if spec is not None and (spec.kind, tuple(spec.shape)) != ("continuous", tuple(self.latent_model.shape)):
            raise GenError(
                f"the tokenizer has {spec.kind} {tuple(spec.shape)}, and the model draws latents "
                f"{self.latent_model.shape}; give the tokenizer that it was trained on"
            )

    @property
    def subject(self) -> Any:
        """Gives the model."""
        return self.latent_model

    @property
    def options(self) -> Any:
        """Gives settings of the tokenizer's decoder, as the sampler states them."""
        return self.sampler.decoding

    @property
    def nfe(self) -> int:
        """Gives the calls of the transformer per sample; the head's are small."""
        return self.sampler.steps

    def latents(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Gives the drawn latents (B, *shape) on the normalised scale that the model was trained on."""
        model, sampler = self.latent_model, self.sampler
        grid = Respaced()(model.process, sampler.head_steps)
        shape = (fullest(model, sampler.steps), model.head.channels)

        def noise(k: Any) -> tuple[jax.Array, Noise]:
            own = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
            return unit_noise(own, shape), per_sample_noise(own, shape)

        def order(key: jax.Array) -> jax.Array:
            return jax.random.permutation(jax.random.fold_in(key, _ORDER), model.length)

        path = infill(
            model,
            params["net"],
            {**cond, **model.forced(params, len(keys))},
            jax.vmap(order)(keys),
            noise,
            steps=sampler.steps,
            grid=grid,
            temperature=sampler.temperature,
            guidance=sampler.guidance,
        )
        found: jax.Array = model.stored(path[-1])
        return found

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `gen.sampling.generator.Generator.__call__` says."""
        latents = self.latents(params, keys, cond)
        return decode(self.tokenizer, params, latents, keys=keys, cond=cond, options=self.options)
