"""Signs as codes: lookup-free (LFQ) and binary spherical quantisation (BSQ), with their entropies.

Neither has a codebook: a bit is the sign of a channel. Both are deterministic, so that training must keep the bits in
use by two entropies: that of a vector's own soft bits, to be small, and that of their mean over the batch, to be large.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.tokenizers.base import Quantized
from gen.tokenizers.quantizers.entropy import entropies

__all__ = ["BSQ", "LFQ", "SignModule"]


@dataclasses.dataclass(frozen=True)
class LFQ:
    """Codes in {-1, 1}^width: the signs of the channels (Yu et al. 2023, MAGVIT-v2, arXiv 2310.05737, section 3.1).

    Losses: ``commitment`` mean (x - sign x)^2; ``entropy``, the mean entropy of the vectors' soft codes
    softmax_c(2 x.c / temperature) less `diversity` times that of their mean. Itself a
    `gen.tokenizers.quantizers.base.Quantizer`.

    Attributes:
      width: number of bits.
      temperature: of the soft codes.
      diversity: weight of the entropy of the batch, relative to that of the vectors.
      group: bits that are counted jointly, 2^group soft codes at a time; None for all, as published. The entropies of
        groups are added.
    """

    kind: ClassVar[Literal["bits"]] = "bits"
    vocabulary: ClassVar[None] = None
    unit: ClassVar[bool] = False
    floor: ClassVar[float] = 1e-5  # added within the logarithm of the batch's entropy

    width: int
    temperature: float = 0.01
    diversity: float = 1.0
    group: int | None = None

    def __post_init__(self) -> None:
        _check(self.width, self.temperature, self.group)

    def build(self, rngs: nnx.Rngs) -> "SignModule":
        """Gives the module, which has no parameters."""
        del rngs
        return SignModule(self)


@dataclasses.dataclass(frozen=True)
class BSQ:
    """Codes in {-1, 1}^width / sqrt(width): signs on the unit sphere (Zhao et al. 2024, arXiv 2406.07548, section 3).

    Vectors are brought to length 1 first. Losses: ``commitment`` |sign(u) / sqrt(width) - u|^2, a mean over positions;
    ``entropy`` as of `LFQ`, of softmax_c(2 u.c / temperature) with c = +-1 / sqrt(width). The published penalty is
    zeta gamma0 / inv_temperature times it, with a diversity of gamma / gamma0. Itself a
    `gen.tokenizers.quantizers.base.Quantizer`.

    Attributes:
      width: number of bits.
      temperature: of the soft codes; the inverse of the published inv_temperature.
      diversity: weight of the entropy of the batch, relative to that of the vectors.
      group: bits that are counted jointly; 1 takes them as independent; None for all.
    """

    kind: ClassVar[Literal["bits"]] = "bits"
    vocabulary: ClassVar[None] = None
    unit: ClassVar[bool] = True
    floor: ClassVar[float] = 1e-8

    width: int
    temperature: float = 1.0
    diversity: float = 1.0
    group: int | None = 1

    def __post_init__(self) -> None:
        _check(self.width, self.temperature, self.group)

    def build(self, rngs: nnx.Rngs) -> "SignModule":
        """Gives the module, which has no parameters."""
        del rngs
        return SignModule(self)


def _check(width: int, temperature: float, group: int | None) -> None:
    if width < 1 or not temperature > 0:
        raise GenError(
            f"{width} bits at temperature {temperature}; expected at least one bit and a temperature above 0"
        )
    if group is not None and (group < 1 or width % group):
        raise GenError(f"{width} bits do not divide into groups of {group}; choose a group that divides them")


class SignModule(nnx.Module):
    """The quantizer of an `LFQ` or a `BSQ`."""

    def __init__(self, config: LFQ | BSQ) -> None:
        self.config = config

    @property
    def scale(self) -> float:
        """Size of a code's entries."""
        return float(self.config.width**-0.5) if self.config.unit else 1.0

    def embed(self, ids: jax.Array) -> jax.Array:
        """Codes (..., width) float32 of bits (..., width)."""
        return (2.0 * ids.astype(jnp.float32) - 1.0) * self.scale

    def snap(self, codes: jax.Array) -> Quantized:
        """Gives the nearest codes of vectors (B, ..., width): their signs."""
        return self(codes)

    def soft(self, x: jax.Array) -> jax.Array:
        """Logits (N, groups, 2^group) of vectors x (N, width) for the codes of each group, first bit first."""
        group = self.config.group or self.config.width
        bits = (np.arange(2**group)[:, None] >> np.arange(group)[::-1]) & 1
        codes = (2.0 * bits - 1.0).astype(np.float32) * (2.0 * self.scale / self.config.temperature)
        return jnp.einsum("ngi,ci->ngc", x.reshape(len(x), -1, group), codes, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the signs of z (B, ..., width); `keys` are not needed."""
        del keys
        x = z.astype(jnp.float32)
        if self.config.unit:
            x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        ids = (x > 0).astype(jnp.uint8)
        codes = self.embed(ids)
        errors = jnp.square(codes - x).reshape(len(x), -1, self.config.width)
        sample, batch = entropies(self.soft(x.reshape(-1, self.config.width)), self.config.floor)
        losses = {
            "commitment": errors.sum(-1).mean(1) if self.config.unit else errors.mean((1, 2)),
            "entropy": sample.reshape(len(x), -1).mean(1) - self.config.diversity * batch,
        }
        # the gradient passes the sign but not the scale of the codes
        through = x * self.scale
        return Quantized(ids, through + jax.lax.stop_gradient(codes - through), losses)
