"""What U-shaped backbones on tokens share: embeddings of time and label, named features, the modulated last layer."""

import abc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import Backbone, Call, Output
from gen.nn.layers import TimeEmbedder
from gen.nn.network import Cond

__all__ = ["Staged"]


class Staged(Backbone):
    """A network that goes through named stages, each a feature: tokens (B, N, stage width) float32, row-major.

    The condition is 4 times as wide as the first stage; the sinusoids of the time turn by one radian per unit at their
    fastest. A subclass makes its layers and gives `features`, `walk` and `head`.
    """

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        condition = 4 * config.width
        self.time = TimeEmbedder(condition, rngs=rngs)
        if config.times == 2:
            self.time2 = TimeEmbedder(condition, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.label = nnx.Embed(config.num_classes + 1, condition, embedding_init=init, rngs=rngs)

    @abc.abstractmethod
    def walk(self, x: jax.Array, c: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """The features in order with their names, each computed when asked for."""

    @abc.abstractmethod
    def head(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        """The raw output, from the last feature."""

    def embed(self, times: tuple[jax.Array, ...], cond: Cond) -> jax.Array:
        """c (B, 4 width) float32: the sum of the time and label embeddings."""
        c = self.time(times[0])
        if self.config.times == 2:
            c = c + self.time2(times[1])
        return c + self.label(cond["label"] if self.config.num_classes else jnp.zeros(c.shape[0], jnp.int32))

    def forward(self, call: Call) -> Output:
        """See `Backbone`."""
        c = self.embed(call.times, call.cond)
        kept: dict[str, jax.Array] = {}
        for name, tokens in self.walk(call.x, c):
            if name in call.taps:
                kept[name] = tokens
            if call.stop and len(kept) == len(set(call.taps)):
                return tokens, kept
        return self.head(tokens, c), kept
