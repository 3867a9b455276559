"""Sampling of next-scale models: one map after the other, with the keys and values of the coarser maps kept."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gen.autoregressive.decoding import LinearScale, Pick, drawn, filtered, mix
from gen.autoregressive.generator import TokenGenerator, TokenSamplerConfig
from gen.autoregressive.sampler import both
from gen.autoregressive.var import VARConfig
from gen.errors import GenError
from gen.nn.network import Cond, Network, Params
from gen.sampling.generator import GeneratorParams, changes
from gen.training.task import Model

__all__ = ["ScaleSampler", "decode_scales"]


def decode_scales(
    model: VARConfig,
    params: Params,
    quantizer: Params,
    cond: Cond,
    pick: Pick,
    guidance: Any = LinearScale(),
    *,
    begun: jax.Array | None = None,
    count: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Decides the tokens of all maps, coarse to fine (arXiv 2404.02905, figure 4).

    Args:
      params, quantizer: arrays of the transformer, and of the tokenizer's quantizer.
      cond: "label" (B,) int32.
      pick: chooses a map's tokens from its guided logits (B, N, vocabulary).
      guidance: a `gen.autoregressive.decoding.ScaleSchedule` over the maps.
      begun: (B, n) the tokens of the first maps, which are read in one call; None for none.
      count: how many tokens are decided, `begun` among them; None for all.

    Returns:
      ids (B, tokens) int32, and the sum of the maps (B, N, N, width) that the tokenizer decodes.

    Raises GenError for tokens that are no whole maps.
    """
    net, codes = model.net.module(params), Network(model.quantizer).module(quantizer)
    scales, batch, side = guidance.scales(len(model.scales)), len(cond["label"]), model.scales[-1]
    c, given = net.condition((both(model, params, cond) if guidance.guides else cond)["label"])
    total = jnp.zeros((batch, side, side, model.quantizer.width))
    x, past, found, at = net.first(c), None, [], 0
    stop = _maps(model, model.length if count is None else count)
    if begun is not None:
        found = jnp.split(begun, np.cumsum(model.groups)[: _maps(model, begun.shape[1]) - 1], axis=1)
        parts = [x]
        for i, ids in enumerate(found):
            total, inputs = codes.grow(total, ids, i)
            at += ids.shape[1]
            parts.append(net.later(jnp.concatenate([inputs] * (len(c) // batch)), at))
        past = net.run(jnp.concatenate(parts[:-1], axis=1), given, mask=net.mask()[:at, :at]).outputs
        x = parts[-1]
    for i, w in list(enumerate(scales))[len(found) : stop]:
        done = net.run(x, given, past=past)
        logits = net.logits(done.x, c)
        if guidance.guides:
            own, null = jnp.split(logits, 2)
            logits = mix(own, null, float(w))
        found.append(pick(logits, i))
        total, inputs = codes.grow(total, found[-1], i)
        if inputs is not None:
            new, at = done.outputs, at + found[-1].shape[1]
            past = new if past is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), past, new)
            x = net.later(jnp.concatenate([inputs] * (len(c) // batch)), at)
    return jnp.concatenate(found, axis=1), total


def _maps(model: VARConfig, tokens: int) -> int:
    """The number of maps that hold so many tokens."""
    ends = list(itertools.accumulate(model.groups))
    if tokens not in ends:
        raise GenError(f"{tokens} tokens of a model whose maps end after {ends}; give one of these")
    return ends.index(tokens) + 1


@dataclasses.dataclass(frozen=True)
class ScaleSampler(TokenSamplerConfig):
    """How a next-scale model is sampled: one call for each map.

    The defaults are those of VAR's published scores (arXiv 2404.02905, appendix; its ``cfg`` counts from 0).

    Attributes:
      guidance: the scale of classifier-free guidance by map (`gen.autoregressive.decoding.ScaleSchedule`).
      top_k: how many of the likeliest tokens may be drawn; 0 for all.
      top_p: probability of the likeliest tokens that may be drawn; 1 for all.
      decoding: settings of a tokenizer's decoder that samples; None for the tokenizer's own.

    Raises GenError for negative settings, and `top_p` above 1.
    """

    guidance: Any = LinearScale(2.5)
    top_k: int = 900
    top_p: float = 0.96
    decoding: Any = None

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise GenError(f"top_k {self.top_k}, top_p {self.top_p}; expected numbers from 0 on, and top_p up to 1")

    def changed(self, **settings: Any) -> "ScaleSampler":
        """Gives this sampler with another ``guidance``; a number is its scale. Raises GenError for steps, solver or
        grid, which the scales decide.
        """
        given = changes(self.guidance, settings)
        if set(given) - {"guidance"}:
            raise GenError("this model decides one token map after the other; leave out steps, solver and grid")
        return dataclasses.replace(self, **given)

    def generator(self, models: Mapping[str, Model], tokenizer: Any) -> TokenGenerator:
        """Gives the Generator of the next-scale model ``net`` of a run."""
        return TokenGenerator(models["net"].config, self, tokenizer)

    def calls(self, model: VARConfig) -> int:
        """Gives one call for each map."""
        return len(model.scales)

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
        """Does what `TokenSamplerConfig.tokens` says; `begun` and `count` as in `decode_scales`.

        Raises GenError without a tokenizer, whose codes it reads.
        """
        if tokenizer is None:
            raise GenError(
                "VAR reads code vectors while it draws; give its tokenizer (gen convert FILE --vae TOKENIZER)"
            )

        def pick(logits: jax.Array, scale: Any) -> jax.Array:
            return drawn(keys, filtered(logits, k=self.top_k, p=self.top_p), scale)

        quantizer = params["tokenizer"]["quantizer"]
        ids, _ = decode_scales(model, params["net"], quantizer, cond, pick, self.guidance, begun=begun, count=count)
        return ids
