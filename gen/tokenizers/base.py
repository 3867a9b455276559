"""What a tokenizer offers to everything else, and the latent normaliser."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.nn.network import Params

__all__ = ["Affine", "Gaussian", "Posterior", "Tokenizer", "TokenizerSpec"]


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer's latents look like.

    Attributes:
      kind: continuous latents, integer tokens, or bits.
      shape: shape of one image's latents, channels last for continuous ones ((K, C) for 1D, (h, w, C) for 2D);
        the token grid otherwise.
      image: (H, W, C) of the images it takes.
      vocabulary: number of token ids, for tokens.
    """

    kind: Literal["continuous", "tokens", "bits"]
    shape: tuple[int, ...]
    image: tuple[int, int, int]
    vocabulary: int | None = None


class Posterior(Protocol):
    """q(latents | image)."""

    def mode(self) -> jax.Array: ...
    def sample(self, keys: jax.Array) -> jax.Array:
        """A draw from per-sample keys (B,)."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian posterior; `logvar` is clipped to [-30, 20] as in latent diffusion."""

    mean: jax.Array
    logvar: jax.Array

    def mode(self) -> jax.Array:
        """The mean."""
        return self.mean

    def sample(self, keys: jax.Array) -> jax.Array:
        """mean + exp(logvar / 2) n, n drawn from per-sample keys (B,)."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys)
        return self.mean + jnp.exp(0.5 * jnp.clip(self.logvar, -30.0, 20.0)) * noise

    def kl(self) -> jax.Array:
        """KL to the standard normal, summed over latents: (B,)."""
        logvar = jnp.clip(self.logvar, -30.0, 20.0)
        value = 0.5 * (jnp.square(self.mean) + jnp.exp(logvar) - 1.0 - logvar)
        return value.reshape(value.shape[0], -1).sum(axis=1)


class Tokenizer(Protocol):
    """Images <-> latents or tokens. A frozen dataclass (the config); parameters are passed in."""

    @property
    def spec(self) -> TokenizerSpec: ...
    def build(self, rngs: Any) -> Any: ...
    def encode(self, params: Params, images: jax.Array) -> Posterior:
        """images (B, H, W, C) float in [-1, 1]."""
        ...

    def decode(
        self,
        params: Params,
        latents: jax.Array,
        *,
        cond: Mapping[str, jax.Array] | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Images (B, H, W, C) float, about [-1, 1], unclipped."""
        ...


@dataclasses.dataclass(frozen=True)
class Affine:
    """The latent normaliser: normalised = (latents - shift) / scale, per channel (last axis).

    An artefact of its own: stored with the latent cache and with every generator that was trained on it.
    """

    shift: np.ndarray
    scale: np.ndarray
