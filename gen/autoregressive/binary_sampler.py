"""Sampling of diffusion over bits: from fair coins to an image's bits along falling times."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.bernoulli import posterior
from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.decoding import mix
from gen.autoregressive.generator import TokenGenerator, TokenSamplerConfig
from gen.autoregressive.sampler import both
from gen.config import check_choices
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.sampling.generator import GeneratorParams
from gen.training.task import Model

__all__ = ["BinarySampler", "denoise_bits"]

Rule = Literal["posterior", "renoise", "forward"]
Uniforms = Callable[[Any], jax.Array]  # step -> numbers in [0, 1) that draw its bits, (B, N, K)


def denoise_bits(
    model: BinaryDiffusion,
    params: Params,
    first: jax.Array,
    times: np.ndarray,
    uniforms: Uniforms,
    cond: Cond,
    *,
    rule: Rule = "posterior",
    guidance: float = 1.0,
    temperature: float = 1.0,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Gives bits (B, N, K) of 0.0 and 1.0 at time 0: at each time the clean bits are guessed, then those of the next.

    Args:
      first: bits at the first time: fair coins.
      times: (steps,) float64, falling; from the last the likelier values are taken.
      uniforms: draws; not used at the last step.
      rule: "posterior" draws from `gen.autoregressive.bernoulli.posterior` with the guess in the place of the data
        (arXiv 2304.04820, algorithm 2), exact where the guess is certain; "renoise" from the guess with fresh noise of
        the next time; "forward" is the posterior whose kernel keeps a share 1 - (t - s) from s to t, as Instella's
        second protocol.
      guidance: scale w on the network's outputs; 1 for none.
      temperature: divides the guided outputs.
      known: (mask, bits) broadcast to (B, N, K): bits that are given, where the mask is 1 (in-painting).
    """
    process, guided = model.process, guidance != 1.0
    given = both(model, params, cond) if guided else cond
    rows = {"t": times, "s": np.append(times[1:], 0.0)}
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = process.keep(rows["t"]) / process.keep(rows["s"])
    rows["share"] = 1.0 - (rows["t"] - rows["s"]) if rule == "forward" else exact
    rows["keep"] = process.keep(rows["s"])

    def impose(x: jax.Array) -> jax.Array:
        return x if known is None else known[0] * known[1] + (1.0 - known[0]) * x

    def step(x: jax.Array, row: Any) -> tuple[jax.Array, None]:
        t = jnp.full(len(x), row["t"])
        if guided:
            halves = model.output(params, jnp.concatenate([x, x]), jnp.concatenate([t, t]), given)
            own, null = jnp.split(halves, 2)
            output = mix(own, null, guidance)
        else:
            output = model.output(params, x, t, given)
        clean = jax.nn.sigmoid(model.clean(output / temperature, x))
        chance = row["keep"] * clean + (1.0 - row["keep"]) / 2.0
        if rule != "renoise":
            chance = posterior(chance, x, row["share"])
        last = row["s"] == 0.0
        drawn = jnp.where(last, clean > 0.5, uniforms(row["i"]) < chance)
        return impose(drawn.astype(jnp.float32)), None

    columns = {name: jnp.asarray(column, jnp.float32) for name, column in rows.items()}
    found, _ = jax.lax.scan(step, impose(first), columns | {"i": jnp.arange(len(times))})
    return found


@dataclasses.dataclass(frozen=True)
class BinarySampler(TokenSamplerConfig):
    """How a diffusion model over bits is sampled.

    Attributes:
      steps: network calls; a model of levels visits as many of them, evenly spread.
      rule: see `denoise_bits`.
      guidance: scale w of classifier-free guidance; 1 for none. (Official scales count from 0: w - 1.)
      temperature: divides the guided outputs of the network.
      power: the times are (1 - i / steps)^power; of a model of levels, those that are nearest below.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for no step, and a temperature or a power that is not above 0.
    """

    steps: int = 20
    rule: Rule = "posterior"
    guidance: float = 1.0
    temperature: float = 1.0
    power: float = 1.0
    decoding: Any = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 1 or not self.temperature > 0 or not self.power > 0:
            raise GenError(
                f"{self.steps} steps at temperature {self.temperature} with power {self.power}; expected at least one "
                "step and numbers above 0"
            )

    def changed(self, **settings: Any) -> "BinarySampler":
        """Gives this sampler with other ``steps`` or another ``guidance`` scale. Raises GenError for anything else."""
        given = {name: value for name, value in settings.items() if value is not None}
        if set(given) - {"steps", "guidance"} or not isinstance(given.get("guidance", 1.0), int | float):
            raise GenError("diffusion over bits has steps and a guidance scale; leave out solver, grid and guidances")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> TokenGenerator:
        """Gives the Generator of the model ``net`` of a run. Raises GenError for times that the model does not have."""
        self.times(models["net"].config)
        return TokenGenerator(models["net"].config, self, tokenizer)

    def calls(self, model: BinaryDiffusion) -> int:
        """Gives one call for each step."""
        del model
        return self.steps

    def times(self, model: BinaryDiffusion) -> np.ndarray:
        """Gives the times of the steps, (steps,) float64, falling from 1.

        Raises GenError for more steps than the model has levels.
        """
        if model.levels is None:
            return np.asarray((1.0 - np.arange(self.steps) / self.steps) ** self.power)
        if self.steps > model.levels:
            raise GenError(f"{self.steps} steps along {model.levels} levels; give at most as many steps as levels")
        if self.steps == 1 or (self.steps == model.levels and self.power == 1.0):
            return np.arange(model.levels, model.levels - self.steps, -1) / model.levels
        spread = np.linspace(0.0, 1.0, self.steps) ** self.power  # cut to integers as the official code does
        return (1 + (spread * (model.levels - 1)).astype(int))[::-1] / model.levels

    def tokens(self, model: Any, params: GeneratorParams, keys: jax.Array, cond: Cond, tokenizer: Any) -> jax.Array:
        """Does what `TokenSamplerConfig.tokens` says."""
        del tokenizer
        shape = (model.length, model.shape[-1])

        def uniforms(step: Any) -> jax.Array:
            return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), shape))(keys)

        first = (uniforms(self.steps) < 0.5).astype(jnp.float32)
        found = denoise_bits(
            model,
            params["net"],
            first,
            self.times(model),
            uniforms,
            cond,
            rule=self.rule,
            guidance=self.guidance,
            temperature=self.temperature,
        )
        return found.astype(jnp.int32)
