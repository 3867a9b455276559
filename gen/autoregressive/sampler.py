"""Sampling of models that write one token at a time: one cached call for each, under one `lax.scan`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from gen.autoregressive.base import CachedModel
from gen.autoregressive.decoding import ConstantScale, Pick, drawn, filtered, mix
from gen.autoregressive.generator import TokenGenerator, TokenSamplerConfig
from gen.errors import GenError
from gen.nn.network import Cond, Params
from gen.sampling.generator import GeneratorParams, changes
from gen.training.task import Model

__all__ = ["TokenSampler", "WritingSampler", "both", "write"]


def both(model: Any, params: Params, cond: Cond) -> Cond:
    """Gives the conditions of a guided batch (2B, ...): the samples' own, then the null ones."""
    null = model.null(params, cond)
    return {name: jnp.concatenate([value, null[name]]) for name, value in cond.items()}


def write(
    model: CachedModel,
    params: Params,
    cond: Cond,
    batch: int,
    pick: Pick,
    guidance: Any = ConstantScale(),
    *,
    begun: jax.Array | None = None,
    count: int | None = None,
) -> jax.Array:
    """Writes sequences (B, N) int32 token by token, with the guided logits of each.

    Args:
      model: the token model; params: of its network.
      cond: conditions by name, (B, ...); batch: B.
      pick: chooses token i from its logits (B, 1, V).
      guidance: a `gen.autoregressive.decoding.ScaleSchedule` over the tokens.
      begun: (B, n) the first tokens, which are read in one call; None for none.
      count: how many tokens a sequence gets, `begun` among them; None for all.
    """
    scales, guided = jnp.asarray(guidance.scales(model.length), jnp.float32), guidance.guides
    cond = both(model, params, cond) if guided else cond

    def chosen(logits: jax.Array, at: Any) -> jax.Array:
        if guided:
            own, null = jnp.split(logits, 2)
            logits = mix(own, null, scales[at])
        return pick(logits, at)

    def step(carry: Any, at: jax.Array) -> tuple[Any, jax.Array]:
        cache, ids = carry
        cache, logits = model.step(params, cache, jnp.concatenate([ids, ids]) if guided else ids, at, cond)
        return (cache, chosen(logits, at + 1)), ids[:, 0]

    cache, logits = model.prefill(params, cond, 2 * batch if guided else batch)
    at, end = 0, model.length if count is None else count
    if begun is not None:
        at, known = begun.shape[1], jnp.concatenate([begun, begun]) if guided else begun
        cache, logits = model.step(params, cache, known, jnp.int32(0), cond)
    last, written = jax.lax.scan(step, (cache, chosen(logits[:, -1:], at)), jnp.arange(at, end - 1))
    found = jnp.concatenate([jnp.swapaxes(written, 0, 1), last[1]], axis=1)
    return found if begun is None else jnp.concatenate([begun, found], axis=1)


@dataclasses.dataclass(frozen=True)
class WritingSampler(TokenSamplerConfig):
    """What the samplers share of models that write one token, or the bits of one position, at a time.

    Attributes:
      guidance: the scale of classifier-free guidance by token (`gen.autoregressive.decoding.ScaleSchedule`).
    """

    guidance: Any = ConstantScale()

    def changed(self, **settings: Any) -> Self:
        """Gives this sampler with another ``guidance``; a number is its scale. Raises GenError for steps, solver or
        grid, which the number of tokens decides.
        """
        given = changes(self.guidance, settings)
        if set(given) - {"guidance"}:
            raise GenError("this model writes token by token; leave out steps, solver and grid")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> TokenGenerator:
        """Gives the Generator of the token model ``net`` of a run."""
        return TokenGenerator(models["net"].config, self, tokenizer)

    def calls(self, model: CachedModel) -> int:
        """Gives one call for each token."""
        return model.length


@dataclasses.dataclass(frozen=True)
class TokenSampler(WritingSampler):
    """How a model is sampled that writes one token at a time.

    Attributes:
      guidance: the scale of classifier-free guidance by token (`gen.autoregressive.decoding.ScaleSchedule`).
      temperature: divides the guided logits.
      top_k: how many of the likeliest tokens may be drawn; 0 for all.
      top_p: probability of the likeliest tokens that may be drawn; 1 for all.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for negative settings, and `top_p` above 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise GenError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; expected numbers from 0 on, "
                "and top_p up to 1"
            )

    def tokens(
        self,
        model: Any,
        params: GeneratorParams,
        keys: jax.Array,
        cond: Cond,
        tokenizer: Any,
        *,
        begun: jax.Array | None = None,
        count: int | None = None,
    ) -> jax.Array:
        """Does what `TokenSamplerConfig.tokens` says; `begun` and `count` as in `write`."""
        del tokenizer

        def pick(logits: jax.Array, at: Any) -> jax.Array:
            kept = filtered(logits, temperature=self.temperature, k=self.top_k, p=self.top_p)
            return drawn(keys, kept, at)

        return write(model, params["net"], cond, len(keys), pick, self.guidance, begun=begun, count=count)
