"""Toy members of the tokenizers' interface: a product each way, ids of a codebook, and a decoder that samples."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.nn.conditions import Condition
from gen.nn.network import Buffer, Network
from gen.tokenizers.base import Gaussian, Quantized, TokenizerSpec

PATCH = 4


def _cut(images: jax.Array) -> jax.Array:
    """(B, 8, 8, 1) -> (B, 4, 16)."""
    b = len(images)
    return images.reshape(b, 2, PATCH, 2, PATCH).transpose(0, 1, 3, 2, 4).reshape(b, 4, PATCH**2)


def _joined(patches: jax.Array) -> jax.Array:
    b = len(patches)
    return patches.reshape(b, 2, 2, PATCH, PATCH).transpose(0, 1, 3, 2, 4).reshape(b, 8, 8, 1)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Each patch becomes the nearest of `size` code vectors, which are averages and not trained."""

    size: int = 8

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec("tokens", (2, 2), (8, 8, 1), vocabulary=self.size, width=PATCH**2)

    last_layer = "scale"

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Codebook(self, rngs)

    def encode(self, params: Any, images: jax.Array, *, cond: Any = None, keys: Any = None) -> Quantized:
        return self.snap(params, Network(self).module(params).scale[...] * _cut(images))

    def embed(self, params: Any, ids: jax.Array) -> jax.Array:
        return Network(self).module(params).codes[...][ids.reshape(len(ids), -1)]

    def snap(self, params: Any, codes: jax.Array) -> Quantized:
        book = Network(self).module(params).codes[...]
        distance = jnp.square(codes[:, :, None] - book).sum(-1)
        ids = distance.argmin(-1).astype(jnp.int32)
        used = jnp.zeros(self.size).at[ids.reshape(-1)].add(1.0) / ids.size
        losses = {"commitment": distance.min(-1).mean(-1)}
        return Quantized(
            ids.reshape(-1, 2, 2), codes + jax.lax.stop_gradient(book[ids] - codes), losses, {"used": used}
        )

    def decode(self, params: Any, codes: jax.Array, *, cond: Any = None, keys: Any = None, options: Any = None) -> Any:
        return _joined(codes)


class _Codebook(nnx.Module):
    def __init__(self, config: Codebook, rngs: nnx.Rngs) -> None:
        self.codes = Buffer(jax.random.normal(rngs.params(), (config.size, PATCH**2)))
        self.used = Buffer(jnp.full(config.size, 1.0 / config.size))
        self.scale = nnx.Param(jnp.ones(()))


@dataclasses.dataclass(frozen=True)
class Patches:
    """A Gaussian of `channels` numbers for each patch, by one product each way."""

    channels: int = 3

    last_layer = "decoder/kernel"

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec("continuous", (4, self.channels), (8, 8, 1))

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Patches(self, rngs)

    def encode(self, params: Any, images: jax.Array, *, cond: Any = None, keys: Any = None) -> Gaussian:
        return Gaussian(*jnp.split(Network(self).module(params).encoder(_cut(images)), 2, axis=-1))

    def decode(self, params: Any, codes: jax.Array, *, cond: Any = None, keys: Any = None, options: Any = None) -> Any:
        return _joined(Network(self).module(params).decoder(codes))


class _Patches(nnx.Module):
    def __init__(self, config: Patches, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Linear(PATCH**2, 2 * config.channels, rngs=rngs)
        self.decoder = nnx.Linear(config.channels, PATCH**2, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Settings of the decoder of `Drawn`."""

    count: int = 1


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Means of patches; the decoder draws the rest, in steps, and uses ``keep`` of the tokens."""

    @property
    def spec(self) -> TokenizerSpec:
        keep = Condition((), "int32", default=4.0)
        return TokenizerSpec("continuous", (4, 1), (8, 8, 1), conditions={"keep": keep})

    last_layer = "spread"

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Drawn(rngs)

    def encode(self, params: Any, images: jax.Array, *, cond: Any = None, keys: Any = None) -> Gaussian:
        mean = _cut(images).mean(-1, keepdims=True)
        return Gaussian(mean, jnp.zeros_like(mean))

    def decode(self, params: Any, codes: jax.Array, *, cond: Any = None, keys: Any = None, options: Any = None) -> Any:
        used = jnp.arange(4) < cond["keep"][:, None]
        patches = jnp.where(used[..., None], codes, 0.0) + jnp.zeros(PATCH**2)
        for i in range((options or Steps()).count):
            noise = jax.vmap(lambda key, i=i: jax.random.normal(jax.random.fold_in(key, i), (4, PATCH**2)))(keys)
            patches = patches + Network(self).module(params).spread[...] * noise
        return _joined(patches)


class _Drawn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.spread = nnx.Param(jnp.float32(0.1))
