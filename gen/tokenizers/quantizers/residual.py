"""The multi-scale residual quantizer of VAR: a pyramid of token maps, each coding what the coarser ones left.

Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", arXiv
2404.02905, section 3.2, algorithms 1 and 2.
"""

import dataclasses
import itertools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.features.resize import resize
from gen.nn.network import Buffer
from gen.tokenizers.base import Quantized
from gen.tokenizers.towers import conv

__all__ = ["Residual", "ResidualModule"]

_RARE = 0.08  # a code counts as used from this fraction of the average number of hits, as in the published training


@dataclasses.dataclass(frozen=True)
class Residual:
    """Token maps of growing size over one codebook.

    What is left of the features is shrunk to each scale in turn (mean over cells), replaced by the nearest codes, and
    their map, enlarged (bicubic) and passed through a convolution phi(h) = (1 - strength) h + strength conv(h), is
    taken off it. Losses: ``commitment`` and ``codebook``, the mean squared differences of the features from the sum of
    the maps after every scale, with gradients to the one or to the other.

    Attributes:
      vocabulary: number of codes.
      width: channels of a code.
      scales: sides of the square token maps, coarse to fine; the last is that of the features.
      cosine: the nearest code is that of the largest cosine (the published using_znorm), used at its own length.
      strength: of the convolutions (quant_resi); with 0 there are none.
      convolutions: how many there are (share_quant_resi): scale s uses the one whose place is nearest to its own; 1 for
        one of all scales; 0 for one of each.
      decay: of the running hits.

    Raises GenError for no code or channel, negative numbers, a decay out of [0, 1), and scales that do not grow.
    """

    kind: ClassVar[Literal["tokens"]] = "tokens"

    vocabulary: int = 4096
    width: int = 32
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    cosine: bool = False
    strength: float = 0.5
    convolutions: int = 4
    decay: float = 0.99

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.width) < 1 or not 0 <= self.decay < 1 or self.convolutions < 0:
            raise GenError(
                f"{self.vocabulary} codes of width {self.width}, {self.convolutions} convolutions, decay {self.decay}; "
                "expected at least one code and channel, no negative number, and a decay from 0 to below 1"
            )
        if self.strength < 0:
            raise GenError(f"strength {self.strength} of the convolutions is negative; give one from 0")
        if not self.scales or self.scales[0] < 1 or any(a > b for a, b in itertools.pairwise(self.scales)):
            raise GenError(f"scales {self.scales} are not the sides of growing maps; give them coarse to fine")

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(side**2 for side in self.scales)

    @property
    def count(self) -> int:
        """Gives the number of convolutions that there are."""
        return (self.convolutions or len(self.scales)) if self.strength else 0

    @property
    def places(self) -> tuple[float, ...]:
        """Where the shared convolutions lie between the first scale, 0, and the last, 1."""
        count = self.convolutions or len(self.scales)
        edge = 1 / (3 * count) if count == 4 else 1 / (2 * count)
        return tuple(float(p) for p in np.linspace(edge, 1 - edge, count))

    @property
    def chosen(self) -> tuple[int, ...]:
        """Gives the convolution of each scale."""
        if self.convolutions == 1:
            return (0,) * len(self.scales)
        steps = max(len(self.scales) - 1, 1)
        places = np.array(self.places)
        return tuple(int(np.abs(places - s / steps).argmin()) for s in range(len(self.scales)))

    def build(self, rngs: nnx.Rngs) -> "ResidualModule":
        """Gives the module with freshly drawn codes, uniform on +-1 / vocabulary."""
        return ResidualModule(self, rngs)


class ResidualModule(nnx.Module):
    """The codebook and the convolutions of a `Residual`.

    Buffer: ``hits`` (scales, vocabulary), how often each code is chosen in an image, averaged over batches and steps.
    """

    def __init__(self, config: Residual, rngs: nnx.Rngs) -> None:
        self.config = config
        size, width = config.vocabulary, config.width
        self.embedding = nnx.Param(jax.random.uniform(rngs.params(), (size, width), minval=-1 / size, maxval=1 / size))
        self.phi = nnx.Dict({f"conv{i}": conv(width, width, 3, jnp.float32, rngs) for i in range(config.count)})
        self.hits = Buffer(jnp.zeros((len(config.scales), size)))

    def used(self) -> jax.Array:
        """Gives the share of the codes that each scale uses: those of at least 8 % of the average hits. (scales,)."""
        average = self.hits[...].mean(axis=1, keepdims=True)
        return (self.hits[...] >= _RARE * average).mean(axis=1)

    def sums(self, ids: jax.Array) -> list[jax.Array]:
        """Sums the maps (B, N, N, width) after each scale, of ids (B, tokens): what the decoder sees last."""
        found: list[jax.Array] = []
        for i, part in enumerate(self._maps(ids)):
            filled = self._filled(part, i)
            found.append(found[-1] + filled if found else filled)
        return found

    def embed(self, ids: jax.Array) -> jax.Array:
        """Gives the code map (B, N, N, width) float32 of ids (B, tokens), scale after scale, row by row."""
        return self.sums(ids)[-1]

    def together(self, vectors: jax.Array) -> jax.Array:
        """Gives the same of one vector for each token, (B, tokens, width), which need not be codes."""
        scales = self.config.scales
        parts = jnp.split(vectors, np.cumsum([p * p for p in scales])[:-1], axis=1)
        maps = [part.reshape(len(part), p, p, -1) for part, p in zip(parts, scales, strict=True)]
        return sum((self._spread(part, i) for i, part in enumerate(maps)), jnp.zeros(()))

    def snap(self, codes: jax.Array) -> Quantized:
        """Gives the token maps of vectors (B, N, N, width)."""
        return self(codes)

    def inputs(self, ids: jax.Array) -> jax.Array:
        """Says what a next-scale model reads: (B, tokens - those of the first scale, width).

        The sum of the maps up to each scale but the last, shrunk to the next one.
        """
        scales = self.config.scales[1:]
        maps = [shrink(total, side) for total, side in zip(self.sums(ids), scales, strict=False)]
        return jnp.concatenate([m.reshape(len(m), -1, self.config.width) for m in maps], axis=1)

    def grow(self, total: jax.Array, ids: jax.Array, scale: int) -> tuple[jax.Array, jax.Array | None]:
        """Adds one map to the sum of the coarser ones, as a generator does that decides map after map.

        Args:
          total: (B, N, N, width), zeros before the first map.
          ids: (B, tokens of the map).
          scale: which map it is, from 0.

        Returns:
          the new sum; what a next-scale model reads at the next map, (B, tokens of that, width), None after the last.
        """
        scales = self.config.scales
        total = total + self._filled(ids.reshape(len(ids), scales[scale], scales[scale]), scale)
        if scale + 1 == len(scales):
            return total, None
        return total, shrink(total, scales[scale + 1]).reshape(len(ids), -1, self.config.width)

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the token maps of features z (B, N, N, width), N the last scale; `keys` are not needed.

        Raises GenError for features of another shape.
        """
        del keys
        config, z = self.config, z.astype(jnp.float32)
        side = config.scales[-1]
        if z.shape[1:] != (side, side, config.width):
            raise GenError(f"features are {z.shape}; these scales take (B, {side}, {side}, {config.width})")
        fixed = jax.lax.stop_gradient
        total, left = jnp.zeros_like(z), fixed(z)
        ids: list[jax.Array] = []
        commitment = codebook = jnp.zeros(len(z))
        for i, p in enumerate(config.scales):
            ids.append(self._nearest(shrink(left, p)))
            filled = self._filled(ids[-1], i)
            total, left = total + filled, left - fixed(filled)
            commitment += jnp.square(fixed(total) - z).mean((1, 2, 3)) / len(config.scales)
            codebook += jnp.square(total - fixed(z)).mean((1, 2, 3)) / len(config.scales)
        hits = jnp.stack([jnp.zeros(config.vocabulary).at[part.reshape(-1)].add(1.0 / len(z)) for part in ids])
        statistics = {"hits": config.decay * self.hits[...] + (1 - config.decay) * hits}
        flat = jnp.concatenate([part.reshape(len(z), -1) for part in ids], axis=1)
        losses = {"commitment": commitment, "codebook": codebook}
        return Quantized(flat, z + fixed(total - z), losses, statistics)

    def _maps(self, ids: jax.Array) -> list[jax.Array]:
        """ids (B, tokens) as maps (B, p, p)."""
        if ids.shape[1:] != (self.config.tokens,):
            raise GenError(f"ids are {ids.shape}; these scales have (B, {self.config.tokens})")
        scales = self.config.scales
        parts = jnp.split(ids, np.cumsum([p * p for p in scales])[:-1], axis=1)
        return [part.reshape(len(ids), p, p) for part, p in zip(parts, scales, strict=True)]

    def _nearest(self, x: jax.Array) -> jax.Array:
        """int32 ids (B, p, p) of vectors (B, p, p, width). In full precision: a flipped id changes all finer scales."""
        codes, rows = self.embedding[...], x.reshape(-1, self.config.width)
        if self.config.cosine:
            codes, rows = _unit(codes), _unit(rows)
        products = jnp.matmul(rows, codes.T, precision=jax.lax.Precision.HIGHEST)
        scores = products if self.config.cosine else 2.0 * products - jnp.square(codes).sum(axis=1)
        return scores.argmax(axis=1).astype(jnp.int32).reshape(x.shape[:-1])

    def _filled(self, ids: jax.Array, scale: int) -> jax.Array:
        """The map of one scale's ids (B, p, p) at full size, convolved: (B, N, N, width)."""
        return self._spread(self.embedding[...][ids], scale)

    def _spread(self, vectors: jax.Array, scale: int) -> jax.Array:
        """The same of vectors (B, p, p, width)."""
        side = self.config.scales[-1]
        h = resize(vectors, (side, side), "torch-bicubic")
        strength = self.config.strength
        if not strength:
            return h
        return (1.0 - strength) * h + strength * self.phi[f"conv{self.config.chosen[scale]}"](h)


def shrink(x: jax.Array, side: int) -> jax.Array:
    """x (B, N, N, C) -> (B, side, side, C): means over cells, which overlap where `side` does not divide N."""
    return resize(x, (side, side), "torch-area")


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))
