"""What U-shaped backbones on tokens share: embeddings of time and label, named features, the modulated last layer."""

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.errors import GenError
from gen.nn.layers import TimeEmbedder
from gen.nn.network import Cond

__all__ = ["Staged"]


class Staged(nnx.Module):
    """A network that goes through named stages, each a feature that can be tapped.

    Its configuration has size, channels, width, num_classes and times; the condition is 4 times as wide as the first
    stage. A subclass makes its layers and gives `stages`, `features` and `head`.
    """

    title: ClassVar[str]

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.config = config
        condition = 4 * config.width
        self.time = TimeEmbedder(condition, rngs=rngs)
        if config.times == 2:
            self.time2 = TimeEmbedder(condition, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.label = nnx.Embed(config.num_classes + 1, condition, embedding_init=init, rngs=rngs)

    @abc.abstractmethod
    def stages(self) -> list[str]:
        """The names of the features, in order."""

    @abc.abstractmethod
    def features(self, x: jax.Array, c: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """The features in order, each computed when asked for."""

    @abc.abstractmethod
    def head(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        """The raw output, from the last feature."""

    def null(self, cond: Cond) -> Cond:
        """The same condition with the null label; GenError when the network has no labels."""
        if not self.config.num_classes:
            raise GenError(f"this {self.title} is unconditional; sample with guidance 1 and train with dropout 0")
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def embed(self, times: tuple[jax.Array, ...], cond: Cond) -> jax.Array:
        """c (B, 4 width) float32: the sum of the time and label embeddings."""
        c = self.time(times[0])
        if self.config.times == 2:
            c = c + self.time2(times[1])
        return c + self.label(cond["label"] if self.config.num_classes else jnp.zeros(c.shape[0], jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        times: tuple[jax.Array, ...],
        cond: Cond,
        *,
        controls: Mapping[str, jax.Array] | None = None,
        taps: tuple[str, ...] = (),
        stop: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The raw output and the features named by `taps`.

        Args:
          x: (B, H, W, channels).
          times: one (B,) array, or two; the sinusoids turn by one radian per unit of time at their fastest.
          cond: ``label`` (B,) int32 in [0, num_classes], where num_classes is the null label.
          controls: none are known; GenError when any is given.
          taps: names among `stages`: (B, N, stage width) float32, row-major.
          stop: end at the last tap; the output is then that tap's tokens.

        Returns:
          (B, H, W, channels or 2 channels) float32, and the features by name.
        """
        self._check(x, times, controls, taps)
        c = self.embed(times, cond)
        kept: dict[str, jax.Array] = {}
        for name, tokens in self.features(x, c):
            if name in taps:
                kept[name] = tokens
            if stop and len(kept) == len(set(taps)):
                return tokens, kept
        return self.head(tokens, c), kept

    def _check(self, x: jax.Array, times: tuple[jax.Array, ...], controls: Any, taps: tuple[str, ...]) -> None:
        expected = (*self.config.size, self.config.channels)
        if x.shape[1:] != expected:
            raise GenError(f"{self.title} input is {x.shape[1:]}; expected {expected}, the network's size and channels")
        if len(times) != self.config.times:
            raise GenError(f"{self.title} was given {len(times)} times; expected {self.config.times}")
        if controls:
            raise GenError(f"{self.title} knows no control '{next(iter(controls))}'; remove it")
        for tap in taps:
            if tap not in self.stages():
                raise GenError(f"{self.title} has no feature '{tap}'; {suggest(tap, self.stages())}")
