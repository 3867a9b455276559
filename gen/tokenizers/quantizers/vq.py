"""Vector quantisation: the nearest vector of a codebook (van den Oord et al. 2017, VQ-VAE, arXiv 1711.00937)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import check_choices
from gen.errors import GenError
from gen.nn.network import Buffer
from gen.tokenizers.base import Quantized
from gen.tokenizers.quantizers.entropy import entropies

__all__ = ["VQ", "VQModule"]


@dataclasses.dataclass(frozen=True)
class VQ:
    """A codebook of `vocabulary` vectors; itself the `gen.tokenizers.quantizers.base.Quantizer`.

    Losses: ``commitment`` |z - sg(e)|^2 and, where gradients train the codebook, ``codebook`` |sg(z) - e|^2, both means
    over one image's vectors and channels. Averages and usage are those of the global batch.

    Attributes:
      vocabulary: number of codes.
      width: channels of a code.
      normalize: vectors and codes are brought to length 1, for the distances, the losses and what is decoded (TiTok).
      averages: a code is the running mean of the vectors nearest to it (VQ-VAE, appendix A.1) and no parameter.
      restart: what becomes of codes that are hardly used. "closest" moves them to the vectors of the batch nearest to
        them, the more the less they are used (Zheng and Vedaldi 2023, arXiv 2307.15139, as TA-TiTok trains). "random"
        puts those used less than a tenth of the average on vectors drawn from the batch (Dhariwal et al. 2020,
        Jukebox), all codes on the first step: the codebook starts from the data. With gradient accumulation a code
        moves to the mean of the vectors that the microbatches choose.
      decay: of the running averages, per step.
      temperature: of soft codes softmax(-|z - e|^2 / temperature); ``entropy`` is then a loss as well: the mean entropy
        of the vectors' less that of their mean over the batch (LlamaGen: 0.01). None for no such loss.

    Raises GenError for no code or channel, a decay out of [0, 1), and a temperature that is not above 0.
    """

    kind: ClassVar[Literal["tokens", "bits"]] = "tokens"

    vocabulary: int
    width: int
    normalize: bool = False
    averages: bool = False
    restart: Literal["none", "closest", "random"] = "none"
    decay: float = 0.99
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.temperature is not None and not self.temperature > 0:
            raise GenError(f"soft codes at temperature {self.temperature}; give one above 0, or None for no entropies")
        if min(self.vocabulary, self.width) < 1 or not 0 <= self.decay < 1:
            raise GenError(
                f"a codebook of {self.vocabulary} codes of width {self.width}, decay {self.decay}; expected at least "
                "one of each, and a decay from 0 to below 1"
            )

    def build(self, rngs: nnx.Rngs) -> "VQModule":
        """Gives the module with freshly drawn codes, uniform on +-1/vocabulary."""
        return VQModule(self, rngs)


class VQModule(nnx.Module):
    """The codebook of a `VQ`.

    Training adds the optimiser's steps to ``embedding`` and the moves of restarted codes to the buffer ``offset``; the
    codebook is their sum, so that neither undoes the other. With averages it is ``sums`` / ``usage``.
    """

    def __init__(self, config: VQ, rngs: nnx.Rngs) -> None:
        self.config = config
        size = config.vocabulary
        codes = jax.random.uniform(rngs.params(), (size, config.width), minval=-1 / size, maxval=1 / size)
        start = 0.0 if config.restart != "none" else 1 / size
        if config.averages:
            self.sums = Buffer(codes * max(start, _LEAST))
        else:
            self.embedding = nnx.Param(codes)
        if config.averages or config.restart != "none":
            self.usage = Buffer(jnp.full(size, start))
        if config.restart != "none" and not config.averages:
            self.offset = Buffer(jnp.zeros((size, config.width)))

    def _raw(self) -> jax.Array:
        if self.config.averages:
            return self.sums[...] / jnp.maximum(self.usage[...], _LEAST)[:, None]
        return self.embedding[...] if self.config.restart == "none" else self.embedding[...] + self.offset[...]

    @property
    def codes(self) -> jax.Array:
        """(vocabulary, width) float32, of length 1 where the configuration says so."""
        return _unit(self._raw()) if self.config.normalize else self._raw()

    def embed(self, ids: jax.Array) -> jax.Array:
        """Code vectors (..., width) of ids (...)."""
        return self.codes[ids]

    def snap(self, codes: jax.Array) -> Quantized:
        """Does what `gen.tokenizers.quantizers.base.QuantizerModule` says."""
        return self(codes)

    def __call__(self, z: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the nearest codes of z (B, ..., width); the first among equals. `keys` (B,) choose restarted codes."""
        config, given = self.config, z.astype(jnp.float32)
        z, codes = _unit(given) if config.normalize else given, self.codes
        distances = _distances(z.reshape(-1, config.width), codes)
        ids = distances.argmin(axis=1).astype(jnp.int32).reshape(z.shape[:-1])
        chosen, fixed = codes[ids], jax.lax.stop_gradient
        axes = tuple(range(1, z.ndim))
        losses = {"commitment": jnp.square(z - fixed(chosen)).mean(axes)}
        if not config.averages:
            losses["codebook"] = jnp.square(chosen - fixed(z)).mean(axes)
        if config.temperature is not None:
            sample, batch = entropies(-distances[:, None] / config.temperature, 1e-5)
            losses["entropy"] = sample.reshape(len(z), -1).mean(axis=1) - batch
        statistics = self._statistics(fixed(given), fixed(z), ids, fixed(distances), keys)
        return Quantized(ids, z + fixed(chosen - z), losses, statistics)

    def _statistics(
        self, given: jax.Array, z: jax.Array, ids: jax.Array, distances: jax.Array, keys: jax.Array | None
    ) -> dict[str, jax.Array]:
        """New values of the buffers after a batch."""
        config = self.config
        if not config.averages and config.restart == "none":
            return {}
        size, rows = config.vocabulary, ids.reshape(-1)
        frequency = jnp.zeros(size).at[rows].add(1.0) / rows.size
        new = {"usage": config.decay * self.usage[...] + (1 - config.decay) * frequency}
        if config.averages:
            total = jnp.zeros((size, config.width)).at[rows].add(z.reshape(-1, config.width)) / rows.size
            new["sums"] = config.decay * self.sums[...] + (1 - config.decay) * total
        if config.restart == "none" or (config.restart == "random" and keys is None):
            return new
        vectors = given.reshape(-1, config.width)
        share, picked = self._restarted(new["usage"], vectors, distances, z.shape[:-1], keys)
        if config.averages:
            # a code that starts again counts as one of average use, or it would die of its past at once
            new["usage"] = (1 - share) * new["usage"] + share / size
            new["sums"] = (1 - share)[:, None] * new["sums"] + share[:, None] * picked / size
        else:
            new["offset"] = self.offset[...] + share[:, None] * (picked - jax.lax.stop_gradient(self._raw()))
        return new

    def _restarted(
        self,
        used: jax.Array,
        vectors: jax.Array,
        distances: jax.Array,
        shape: tuple[int, ...],
        keys: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """How far each code moves, (N,) in [0, 1], and where to, (N, width)."""
        size = self.config.vocabulary
        if self.config.restart == "closest":
            return jnp.exp(-used * size * 10 / (1 - self.config.decay) - 1e-3), vectors[distances.argmin(axis=0)]
        lots = jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys).reshape(-1)
        drawn = jnp.argsort(lots)[jnp.arange(size) % lots.size]
        return (used * size < 0.1).astype(jnp.float32), vectors[drawn]


_LEAST = 1e-20


def _unit(x: jax.Array) -> jax.Array:
    """x at length 1 along its last axis; 0 stays 0."""
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _distances(x: jax.Array, codes: jax.Array) -> jax.Array:
    """|x|^2 + |c|^2 - 2 x c of x (M, C) and codes (N, C): (M, N) float32."""
    products = jnp.matmul(x, codes.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.square(x).sum(axis=1, keepdims=True) + jnp.square(codes).sum(axis=1) - 2 * products
