"""What U-shaped backbones on tokens share: embeddings of time and label, named features, the modulated last layer."""

import abc
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import Backbone, Call, Factors, Output, branch_factors
from gen.nn.layers import TimeEmbedder
from gen.nn.network import Cond
from gen.training.sharding import constrain

__all__ = ["Staged"]


class Staged(Backbone):
    """A network that goes through named stages, each a feature: tokens (B, N, stage width), row-major, float32 outside.

    The condition is 4 times as wide as the first stage; the sinusoids of the time turn by one radian per unit at their
    fastest; where there are two, their embeddings are added, and the second one's last layer starts at zero. A subclass
    makes its layers and gives `features`, `depths`, `walk` and `head`.

    Controls: ``blocks`` (n,), factors on the residual branches of the n blocks, numbered in the order of computation;
    and one for each of the `branches` alone.
    """

    branches: ClassVar[tuple[str, ...]]  # names of the residual branches of a block, in order

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        condition = 4 * config.width
        self.time = TimeEmbedder(condition, rngs=rngs)
        if config.times == 2:
            self.time2 = TimeEmbedder(condition, silent=True, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.label = nnx.Embed(config.num_classes + 1, condition, embedding_init=init, rngs=rngs)

    @abc.abstractmethod
    def depths(self) -> dict[str, int]:
        """Gives the number of blocks of each stage, in the order of computation."""

    @abc.abstractmethod
    def walk(self, x: jax.Array, c: jax.Array, factors: Mapping[str, Factors]) -> Iterator[tuple[str, jax.Array]]:
        """Gives the features in order with their names, each computed when asked for; `factors` by stage."""

    @abc.abstractmethod
    def head(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        """Gives the raw output, from the last feature."""

    def controls(self) -> dict[str, tuple[int, ...]]:
        """Gives the controls: blocks and the branches."""
        return dict.fromkeys(("blocks", *self.branches), (sum(self.depths().values()),))

    def factors(self, controls: Mapping[str, jax.Array]) -> dict[str, Factors]:
        """Gives the factors on the branches of each stage's blocks."""
        depths = self.depths()
        whole = branch_factors(controls, self.branches, sum(depths.values()))
        ends = itertools.accumulate(depths.values())
        return {
            name: None if whole is None else tuple(branch[end - depth : end] for branch in whole)
            for (name, depth), end in zip(depths.items(), ends, strict=True)
        }

    def embed(self, times: tuple[jax.Array, ...], cond: Cond) -> jax.Array:
        """Gives c (B, 4 width) float32: the sum of the time and label embeddings."""
        c = self.time(times[0])
        if self.config.times == 2:
            c = c + self.time2(times[1])
        return c + self.label(cond["label"] if self.config.num_classes else jnp.zeros(c.shape[0], jnp.int32))

    def forward(self, call: Call) -> Output:
        """Does what `Backbone.forward` says."""
        c = constrain(self.embed(call.times, call.cond))
        kept: dict[str, jax.Array] = {}
        for name, tokens in self.walk(call.x, c, self.factors(call.controls)):
            if name in call.taps:
                kept[name] = tokens.astype(jnp.float32)
            if call.stop and len(kept) == len(set(call.taps)):
                return tokens.astype(jnp.float32), kept
        return self.head(tokens, c), kept
