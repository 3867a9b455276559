"""Distances of two batches of samples, as consistency losses compare them: (frozen arrays, a, b) -> (B,)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from gen.config import check_choices
from gen.errors import GenError
from gen.features.resize import resize
from gen.tokenizers.losses import expect_frozen

__all__ = ["Distance", "Norm", "Perceptual", "PseudoHuber"]


class Distance(Protocol):
    """A distance of each pair of samples."""

    def expect(self, frozen: Mapping[str, Any]) -> None:
        """Raises GenError where the frozen arrays that the distance reads are not given."""
        ...

    def __call__(self, frozen: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
        """Gives (B,) float32 of samples (B, ..., C), differentiable in both."""
        ...


class _Plain:
    """What distances without a network share."""

    def expect(self, frozen: Mapping[str, Any]) -> None:
        """Does what `Distance.expect` says; nothing is read."""


@dataclasses.dataclass(frozen=True)
class Norm(_Plain):
    """Plain norms of the difference.

    Attributes:
      form: ``l1`` mean |a - b|, ``l2`` mean (a - b)^2, or ``sum-l2``, the sum of the squares.
    """

    form: Literal["l1", "l2", "sum-l2"] = "l2"

    def __post_init__(self) -> None:
        check_choices(self)

    def __call__(self, frozen: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
        """Does what `Distance` says."""
        del frozen
        flat = (a - b).reshape(a.shape[0], -1)
        match self.form:
            case "l1":
                return jnp.abs(flat).mean(1)
            case "l2":
                return jnp.square(flat).mean(1)
        return jnp.square(flat).sum(1)


@dataclasses.dataclass(frozen=True)
class PseudoHuber(_Plain):
    """sqrt(||a - b||^2 + c^2) - c with the norm over the whole sample (arXiv 2310.14189, eq. 7), not per element.

    Attributes:
      c: None for 0.00054 sqrt(D), D the number of a sample's elements (sec. 3.3); 0 for the norm itself.

    Raises GenError for a negative c.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None and self.c < 0.0:
            raise GenError(f"pseudo-Huber with c = {self.c:g}; expected a number of at least 0")

    def __call__(self, frozen: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
        """Does what `Distance` says."""
        del frozen
        flat = (a - b).reshape(a.shape[0], -1)
        c = 0.00054 * math.sqrt(flat.shape[1]) if self.c is None else self.c
        square = jnp.square(flat).sum(1)
        if c > 0.0:
            # = sqrt(square + c^2) - c without cancellation
            return square / (jnp.sqrt(square + c * c) + c)
        positive = square > 0.0  # the root has no gradient at 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class Perceptual:
    """A frozen network's distance of images, enlarged bilinearly where they are small: LPIPS in consistency models.

    The published runs take VGG with average instead of max pooling; the term here has the trunk as LPIPS defines it.

    Attributes:
      term: a `gen.tokenizers.losses.ImageTerm`, whose weight is not used; its network is frozen under the term's name.
      side: images of less than `below` pixels a side are enlarged to it.
      below: see `side`.
    """

    term: Any
    side: int = 224
    below: int = 256

    def expect(self, frozen: Mapping[str, Any]) -> None:
        """Does what `Distance.expect` says."""
        expect_frozen(frozen, self.term)

    def __call__(self, frozen: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
        """Does what `Distance` says."""
        if a.shape[1] < self.below:
            a, b = (resize(x, (self.side, self.side), "torch-bilinear") for x in (a, b))
        found: jax.Array = self.term(frozen[self.term.name], a, b)
        return found
