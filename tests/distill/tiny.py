"""A network small enough to compile in a blink: two token-wise layers, time and label added in between."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.diffusion.backbones.backbone import BackboneConfig


@dataclasses.dataclass(frozen=True)
class Tiny(BackboneConfig):
    channels: int = 3
    width: int = 16
    classes: int = 3
    times: int = 1
    size: tuple[int, ...] = (4,)

    @property
    def num_classes(self) -> int:
        return self.classes

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Tiny(self, rngs)


class _Tiny(nnx.Module):
    def __init__(self, config: Tiny, rngs: nnx.Rngs) -> None:
        self.config = config
        self.inner = nnx.Linear(config.channels, config.width, rngs=rngs)
        self.label = nnx.Linear(config.classes + 1, config.width, rngs=rngs)
        self.outer = nnx.Linear(config.width, config.channels, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        times: tuple[jax.Array, ...],
        cond: Mapping[str, jax.Array],
        *,
        controls: Any = None,
        taps: tuple[str, ...] = (),
        stop: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        where = jax.nn.one_hot(cond["label"], self.config.classes + 1) + sum(times)[:, None]
        h = jnp.tanh(self.inner(x) + self.label(where)[:, None])
        return (x if stop else self.outer(h)), dict.fromkeys(taps, h)

    def null(self, cond: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return {"label": jnp.full_like(cond["label"], self.config.classes)}
