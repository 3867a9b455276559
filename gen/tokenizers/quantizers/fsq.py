"""Finite scalar quantisation: the codebook is a grid (Mentzer et al. 2023, arXiv 2309.15505).

Every channel is bounded by a tanh and rounded to one of a few levels; an id counts the points of the grid. Nothing is
learned or averaged, and no loss is needed: gradients pass the rounding as if it were not there.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.tokenizers.base import Quantized

__all__ = ["FSQ", "FSQModule"]

_EPS = 1e-3  # widens the tanh, so that its finite values reach the outermost levels


@dataclasses.dataclass(frozen=True)
class FSQ:
    """The configuration. The defaults are FlexTok's, 64,000 ids.

    Attributes:
      levels: number of levels of each channel, at least 2. The paper's sets are (8, 6, 5), (8, 5, 5, 5),
        (7, 5, 5, 5, 5), (8, 8, 8, 6, 5) and (8, 8, 8, 5, 5, 5), for about 2^8, 2^10, 2^12, 2^14 and 2^16 ids.
      unrounded: share of samples of which training decodes codes that are bounded but not rounded (quantisation
        dropout), where keys are given.

    Raises GenError for levels that make no grid or more ids than an int32 counts.
    """

    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    unrounded: float = 0.0

    kind: ClassVar[Literal["tokens"]] = "tokens"

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2 or math.prod(self.levels) >= 2**31:
            raise GenError(
                f"FSQ levels {self.levels}; expected two or more for each channel, and below 2^31 ids in all"
            )
        if not 0.0 <= self.unrounded <= 1.0:
            raise GenError(f"FSQ leaves the share {self.unrounded} of samples unrounded; expected 0 to 1")

    @property
    def vocabulary(self) -> int:
        """Gives the number of ids: the product of the levels."""
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        """Channels of a code."""
        return len(self.levels)

    @property
    def basis(self) -> np.ndarray:
        """(width,) int32: what one level of each channel counts in an id; the first channel varies fastest."""
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)

    def build(self, rngs: Any) -> "FSQModule":
        """Gives the module, which has no parameters."""
        del rngs
        return FSQModule(self)


class FSQModule(nnx.Module):
    """The quantizer of an `FSQ`; float32 throughout."""

    def __init__(self, config: FSQ) -> None:
        self.config = config

    @property
    def _half(self) -> np.ndarray:
        """(width,) float32: the level in the middle, and what codes are divided by."""
        return np.asarray([level // 2 for level in self.config.levels], np.float32)

    def bound(self, z: jax.Array) -> jax.Array:
        """z (..., width) between the outermost levels, which are integers around 0; 0 stays 0."""
        levels = np.asarray(self.config.levels)
        half_width = (levels - 1) * (1.0 + _EPS) / 2.0
        between = np.where(levels % 2 == 0, 0.5, 0.0)
        reach, offset, shift = map(np.float32, (half_width, between, np.arctanh(between / half_width)))
        return jnp.tanh(z.astype(jnp.float32) + shift) * reach - offset

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the nearest grid points of z.

        Args:
          z: (B, ..., width) float.
          keys: (B,) typed keys that choose the samples whose drawn codes are left unrounded; None for none.

        Returns:
          ids (B, ...) int32 in [0, vocabulary); codes (B, ..., width) float32 in [-1, 1], through which the gradient
          of the bound passes; neither losses nor statistics.

        Raises GenError for vectors of another width.
        """
        if z.shape[-1] != self.config.width:
            raise GenError(f"vectors have {z.shape[-1]} channels, and FSQ has levels for {self.config.width}")
        bounded = self.bound(z)
        found = self._rounded(bounded)
        if keys is None or not self.config.unrounded:
            return found
        left = jax.vmap(lambda key: jax.random.bernoulli(key, self.config.unrounded))(keys)
        drawn = jnp.where(left.reshape(-1, *(1,) * (z.ndim - 1)), bounded / self._half, found.codes)
        return Quantized(found.ids, found.codes, drawn=drawn)

    def _rounded(self, levels: jax.Array) -> Quantized:
        """The grid points nearest to levels (B, ..., width) within the grid."""
        rounded = jnp.round(levels)
        ids = ((rounded + self._half).astype(jnp.int32) * self.config.basis).sum(-1).astype(jnp.int32)
        return Quantized(ids, (levels + jax.lax.stop_gradient(rounded - levels)) / self._half)

    def snap(self, codes: jax.Array) -> Quantized:
        """Does what `gen.tokenizers.quantizers.base.QuantizerModule` says."""
        highest = np.asarray(self.config.levels, np.float32) - 1.0 - self._half
        return self._rounded(jnp.clip(codes.astype(jnp.float32) * self._half, -self._half, highest))

    def embed(self, ids: jax.Array) -> jax.Array:
        """Gives the codes (B, ..., width) float32 of ids (B, ...)."""
        digits = ids[..., None] // self.config.basis % np.asarray(self.config.levels, np.int32)
        return (digits.astype(jnp.float32) - self._half) / self._half
