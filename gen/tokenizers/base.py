"""What a tokenizer offers to everything else, and the latent normaliser."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.network import Cond, Params

__all__ = ["Affine", "DiscreteTokenizer", "Exact", "Gaussian", "Quantized", "Tokenizer", "TokenizerSpec"]


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer's latents look like.

    Attributes:
      kind: continuous latents, integer tokens, or bits.
      shape: shape of what a cache keeps of one image: latents with channels last ((K, C) for 1D, (h, w, C) for 2D), the
        grid of tokens, or bits with the bits of one code last.
      image: (H, W, C) of the images it takes; (T, H, W, C) of videos.
      vocabulary: number of token ids, for tokens.
      width: channels of one code vector, for tokens and bits.
      scales: sides of the token maps of multi-scale tokenizers, coarse to fine; () for all others.
      conditions: what the decoder takes beside codes, by name (text; ``keep``, how many tokens are used).
    """

    kind: Literal["continuous", "tokens", "bits"]
    shape: tuple[int, ...]
    image: tuple[int, ...]
    vocabulary: int | None = None
    width: int | None = None
    scales: tuple[int, ...] = ()
    conditions: Conditions = dataclasses.field(default_factory=dict)

    @property
    def picture(self) -> tuple[int, int, int]:
        """(H, W, C) of the images. Raises GenError for a tokenizer of videos."""
        if len(self.image) != 3:
            raise GenError(f"this tokenizer takes videos {self.image}, and the data are images; use it in Python")
        height, width, channels = self.image
        return height, width, channels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Diagonal Gaussian posterior; `logvar` is clipped to [-30, 20] as in latent diffusion."""

    mean: jax.Array
    logvar: jax.Array

    def mode(self) -> jax.Array:
        """Gives the mean: what a cache stores, and what is decoded."""
        return self.mean

    @property
    def stored(self) -> jax.Array:
        """Says what a cache keeps of an image: the mean."""
        return self.mean

    @property
    def std(self) -> jax.Array:
        """Gives the standard deviation, exp(logvar / 2)."""
        return jnp.exp(0.5 * jnp.clip(self.logvar, -30.0, 20.0))

    def sample(self, keys: jax.Array) -> jax.Array:
        """mean + std n, n drawn from per-sample keys (B,): what a decoder in training is given."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys)
        return self.mean + self.std * noise

    def kl(self) -> jax.Array:
        """KL to the standard normal, summed over latents: (B,)."""
        logvar = jnp.clip(self.logvar, -30.0, 20.0)
        value = 0.5 * (jnp.square(self.mean) + jnp.exp(logvar) - 1.0 - logvar)
        return value.reshape(value.shape[0], -1).sum(axis=1)

    @property
    def losses(self) -> Mapping[str, jax.Array]:
        """Says what the posterior adds to a loss, (B,) by name, unweighted: its KL."""
        return {"kl": self.kl()}

    @property
    def statistics(self) -> Mapping[str, jax.Array]:
        """New values of buffers by path: a posterior has none."""
        return {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exact:
    """The latents of an encoder that leaves nothing to chance: a posterior at one point, which costs nothing."""

    mean: jax.Array

    def mode(self) -> jax.Array:
        """Gives the latents."""
        return self.mean

    @property
    def stored(self) -> jax.Array:
        """Says what a cache keeps of an image: the latents."""
        return self.mean

    def sample(self, keys: jax.Array) -> jax.Array:
        """Gives the latents, whatever the keys."""
        del keys
        return self.mean

    @property
    def losses(self) -> Mapping[str, jax.Array]:
        """Says what the latents add to a loss: nothing."""
        return {}

    @property
    def statistics(self) -> Mapping[str, jax.Array]:
        """New values of buffers by path: there are none."""
        return {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a quantizer says of an image's features.

    Attributes:
      ids: (B, *spec.shape) int32 tokens, or uint8 bits.
      codes: (B, ..., width) float32 code vectors, through which gradients reach the encoder (straight-through).
      losses: (B,) by name, unweighted: commitment, codebook, entropy.
      statistics: new values of the quantizer's `gen.nn.network.Buffer`s by path, means over the batch.
      drawn: the codes that training decodes, like `codes`, of a quantizer that draws and was given keys.
    """

    ids: jax.Array
    codes: jax.Array
    losses: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    drawn: jax.Array | None = None

    def mode(self) -> jax.Array:
        """Gives the code vectors, which are decoded."""
        return self.codes

    def sample(self, keys: jax.Array) -> jax.Array:
        """Says what training decodes: the drawn codes of a quantizer that draws, or else the codes."""
        del keys  # they were the encoder's
        return self.codes if self.drawn is None else self.drawn

    @property
    def stored(self) -> jax.Array:
        """Says what a cache keeps of an image: the ids."""
        return self.ids


class Tokenizer(Protocol):
    """Images <-> latents, tokens or bits. A frozen dataclass (the config); parameters are passed in.

    Every caller passes `cond`, `keys` and `options` on; a tokenizer that needs none of them ignores them.
    """

    @property
    def spec(self) -> TokenizerSpec: ...
    @property
    def last_layer(self) -> str:
        """Path of the decoder's last weights in the parameters, at which adaptive weights compare gradients."""
        ...

    def build(self, rngs: Any) -> Any: ...
    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Gaussian | Exact | Quantized:
        """images (B, *spec.image) float in [-1, 1]; per-sample `keys` (B,) for encoders that draw."""
        ...

    def decode(
        self,
        params: Params,
        codes: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """Images (B, *spec.image) float, about [-1, 1], unclipped.

        Args:
          codes: raw latents (B, *spec.shape), or code vectors (B, ..., spec.width).
          cond: the decoder's conditions by name.
          keys: (B,) typed keys, for decoders that sample; `decode_keys` makes them from those of the samples.
          options: static settings of a decoder that samples (steps, guidance), a frozen dataclass of the tokenizer's;
            None for its own.
        """
        ...


class DiscreteTokenizer(Tokenizer, Protocol):
    """A tokenizer of ids: tokens or bits."""

    def embed(self, params: Params, ids: jax.Array) -> jax.Array:
        """Code vectors (B, ..., width) of ids (B, *spec.shape)."""
        ...

    def snap(self, params: Params, codes: jax.Array) -> Quantized:
        """Gives the nearest codes of vectors (B, ..., width)."""
        ...


@dataclasses.dataclass(frozen=True)
class Affine:
    """The latent normaliser: normalised = (latents - shift) / scale, per channel (last axis).

    An artefact of its own: stored with the latent cache and with every generator that was trained on it.
    """

    shift: np.ndarray
    scale: np.ndarray
