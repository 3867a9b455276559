"""Masked decoding: all tokens start masked, and every step keeps those that the network is surest of.

MaskGIT's parallel decoding (Chang et al. 2022, arXiv 2202.04200, section 3.2) draws tokens by their probabilities; the
confidence in one is its log-probability, with Gumbel noise that fades over the steps. In TiTok's generator (Yu et al.
2024, arXiv 2406.07550) the noise of the draws fades as well, and the confidence is the guided logit. One `lax.scan`
runs all; how many tokens each step leaves masked is known beforehand (`gen.autoregressive.masked.entering`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.decoding import ConstantScale, gumbel, mix
from gen.autoregressive.generator import TokenGenerator, TokenSamplerConfig
from gen.autoregressive.masked import MaskedModel, entering
from gen.autoregressive.sampler import both
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.sampling.generator import GeneratorParams, changes
from gen.training.task import Model

__all__ = ["MaskedSampler", "RampScale", "RisenCosineScale", "largest", "unmask"]

# draw(scores, spread, i) gives step i's candidates (B, N) of scores (B, N, vocabulary) by softmax(scores / spread)
Draw = Callable[[jax.Array, jax.Array, Any], jax.Array]
# order(i) is the Gumbel noise of step i on the confidences (B, N)
Order = Callable[[Any], jax.Array]


def largest(noise: Callable[[Any], jax.Array]) -> Draw:
    """Gives the draw that takes the largest of score + spread noise(i), Gumbel noise (B, N, vocabulary)."""
    return lambda scores, spread, i: jnp.argmax(scores + spread * noise(i), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class RampScale:
    """Gives w_i = 1 + (w - 1) i / steps: TiTok's linear guidance, whose scripts call w - 1 the scale.

    Attributes:
      scale: w; 1 for no guidance.
    """

    scale: float = 1.0

    @property
    def guides(self) -> bool:
        """Does what `gen.autoregressive.decoding.ScaleSchedule.guides` says."""
        return self.scale != 1.0

    def scales(self, steps: int) -> np.ndarray:
        """Does what `gen.autoregressive.decoding.ScaleSchedule.scales` says."""
        return 1.0 + (self.scale - 1.0) * np.arange(steps) / steps


@dataclasses.dataclass(frozen=True)
class RisenCosineScale:
    """Gives w_i = 2 + (w - 2) (1 - cos(pi (i + 1) / steps)) / 2: MaskGen's guidance, whose code calls w - 1 the scale.

    Attributes:
      scale: w; 1 for no guidance.
    """

    scale: float = 1.0

    @property
    def guides(self) -> bool:
        """Does what `gen.autoregressive.decoding.ScaleSchedule.guides` says."""
        return self.scale != 1.0

    def scales(self, steps: int) -> np.ndarray:
        """Does what `gen.autoregressive.decoding.ScaleSchedule.scales` says."""
        risen = (1.0 - np.cos(np.pi * np.arange(1, steps + 1) / steps)) / 2.0
        return 2.0 + (self.scale - 2.0) * risen if self.guides else np.ones(steps)


def unmask(
    model: MaskedModel,
    params: Params,
    cond: Cond,
    draw: Draw,
    order: Order,
    blank: jax.Array,
    *,
    steps: int,
    temperature: float,
    annealed: bool,
    token_temperature: float | None = None,
    guidance: Any = ConstantScale(),
) -> jax.Array:
    """Gives the tokens after each step, (steps, B, N) int32: after the last none is masked.

    With r = (i + 1) / steps and T = temperature (1 - r), step i draws a candidate for each masked token from
    softmax(score / S), and masks again those of which score + T noise is least. In TiTok's rule the score is the logit
    and S = T; in MaskGIT's it is log softmax(logit / token_temperature) and S = 1.

    Args:
      model: the masked model; params: of its network.
      cond: conditions by name, with leading axis B.
      draw: gives the candidates of a step; see `largest`.
      order: Gumbel noise on the confidences, by step.
      blank: (B, N) int32, all masked.
      annealed: whether the guided logits are divided by 0.5 + 0.8 (1 - r) first.
      token_temperature: that of MaskGIT's rule; None for TiTok's.
      guidance: a `gen.autoregressive.decoding.ScaleSchedule`.
    """
    guided, done = guidance.guides, np.arange(1, steps + 1) / steps
    left = np.append(entering(model.schedule, model.length, steps)[1:], 0)
    columns = {
        "scale": guidance.scales(steps),
        "heat": temperature * (1.0 - done),
        "divisor": 0.5 + 0.8 * (1.0 - done) if annealed else np.ones(steps),
    }
    inputs = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    inputs |= {"i": jnp.arange(steps), "left": jnp.asarray(left, jnp.int32)}
    cond = both(model, params, cond) if guided else cond

    def step(ids: jax.Array, row: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(params, jnp.concatenate([ids, ids]) if guided else ids, cond)
        if guided:
            own, null = jnp.split(logits, 2)
            logits = mix(own, null, row["scale"])
        scores, spread = logits / row["divisor"], row["heat"]
        if token_temperature is not None:
            scores, spread = jax.nn.log_softmax(scores / token_temperature, axis=-1), jnp.ones(())
        found = draw(scores, spread, row["i"])
        score = jnp.take_along_axis(scores, found[..., None], axis=-1)[..., 0]
        masked = ids == model.vocabulary
        surety = jnp.where(masked, score + row["heat"] * order(row["i"]), jnp.inf)
        rank = jnp.argsort(jnp.argsort(surety, axis=-1), axis=-1)
        ids = jnp.where(rank < row["left"], model.vocabulary, jnp.where(masked, found, ids))
        return ids, ids

    _, path = jax.lax.scan(step, blank, inputs)
    return path


@dataclasses.dataclass(frozen=True)
class MaskedSampler(TokenSamplerConfig):
    """How a masked model is sampled, see `unmask`.

    Attributes:
      steps: network calls, of which each decides some of the tokens.
      temperature: of the noise on the confidences at the first step; it falls to 0 at the last. A large one unmasks
        in random order. It is in units of the guided, annealed logits: with another guidance another one is best.
      annealed: whether the logits are divided by 1.3 at first and by 0.5 at last.
      token_temperature: divides the logits, by which tokens are then drawn at every step, as in MaskGIT (whose code
        calls the other one ``choice_temperature``); None to draw tokens with the falling noise too, as TiTok does.
      guidance: the scale of classifier-free guidance by step (`gen.autoregressive.decoding.ScaleSchedule`).
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for no step, a negative temperature, and a `token_temperature` that is not above 0.
    """

    steps: int = 8
    temperature: float = 1.0
    annealed: bool = True
    token_temperature: float | None = None
    guidance: Any = ConstantScale()
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.temperature < 0:
            raise GenError(
                f"masked decoding in {self.steps} steps at temperature {self.temperature}; expected at least 1 step, "
                "and a temperature of 0 or more"
            )
        if self.token_temperature is not None and not self.token_temperature > 0:
            raise GenError(f"tokens drawn at temperature {self.token_temperature}; expected one above 0, or none")

    def changed(self, **settings: Any) -> "MaskedSampler":
        """Gives this sampler with other ``steps`` or ``guidance``; a number is its scale. Raises GenError for a solver
        or a grid.
        """
        given = changes(self.guidance, settings)
        if set(given) - {"steps", "guidance"}:
            raise GenError("this model unmasks tokens; it has steps and guidance, and neither solver nor grid")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> TokenGenerator:
        """Gives the Generator of the masked model ``net`` of a run."""
        return TokenGenerator(models["net"].config, self, tokenizer)

    def calls(self, model: Any) -> int:
        """Gives one call for each step."""
        del model
        return self.steps

    def tokens(self, model: Any, params: GeneratorParams, keys: jax.Array, cond: Cond, tokenizer: Any) -> jax.Array:
        """Does what `TokenSamplerConfig.tokens` says."""
        del tokenizer

        def own(i: Any) -> jax.Array:
            return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i)), out_axes=1)(keys)

        draw = largest(lambda i: gumbel(own(i)[0], (model.length, model.vocabulary)))
        return self.unmasked(model, params, cond, len(keys), draw, lambda i: gumbel(own(i)[1], (model.length,)))

    def unmasked(
        self, model: Any, params: GeneratorParams, cond: Cond, batch: int, draw: Draw, order: Order
    ) -> jax.Array:
        """Gives the tokens (batch, N) int32 of `unmask` with these settings."""
        blank = jnp.full((batch, model.length), model.vocabulary, jnp.int32)
        path = unmask(
            model,
            params["net"],
            {**cond, **model.forced(params, blank)},
            draw,
            order,
            blank,
            steps=self.steps,
            temperature=self.temperature,
            annealed=self.annealed,
            token_temperature=self.token_temperature,
            guidance=self.guidance,
        )
        return path[-1]
