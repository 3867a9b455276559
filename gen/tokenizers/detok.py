"""l-DeTok: a ViT autoencoder whose latents are hidden and mixed with strong noise while it is trained.

Yang et al. 2025, "Latent Denoising Makes Good Visual Tokenizers" (arXiv 2507.15856): what a generator has to undo, the
decoder learns to undo as well. `DeTokConfig` is the tokenizer, `LatentDenoising` the training.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.config import check_choices, suggest
from gen.errors import GenError
from gen.nn.layers import Remat, linear, patchify, unpatchify
from gen.nn.network import Network, Params
from gen.nn.rotary import rotate_pairs
from gen.nn.vit import normed
from gen.tokenizers.base import Gaussian, TokenizerSpec
from gen.tokenizers.continuous import Continuous
from gen.tokenizers.trunk import Tower, Trunk, grid_of

__all__ = ["SIZES", "DeTok", "DeTokConfig", "DenoisingDraws", "LatentDenoising", "detok", "rotation"]


@dataclasses.dataclass(frozen=True)
class DeTokConfig(Continuous):
    """An l-DeTok; itself the `gen.tokenizers.base.Tokenizer`. The defaults are the released DeTok-BB.

    Attributes:
      image: (H, W, C) of the images, multiples of `patch`.
      patch: side of a patch in pixels.
      channels: channels per latent.
      encoder, decoder: sizes of the two trunks: RMSNorm, SwiGLU of 2/3 of four widths, rotary positions.
      dtype: compute type of the matrix products; parameters, norms and posterior are float32.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int] = (256, 256, 3)
    patch: int = 16
    channels: int = 16
    encoder: Tower = Tower(768, 12, 12)
    decoder: Tower = Tower(768, 12, 12)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        grid_of(self.image[:2], (self.patch, self.patch))
        for tower in (self.encoder, self.decoder):
            if tower.width // tower.heads % 4 or tower.width // tower.heads < 8:
                raise GenError(f"rotary positions need heads of 8, 12, ... channels; change {tower}")

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along height and width."""
        return grid_of(self.image[:2], (self.patch, self.patch))

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (H / patch, W / patch, channels)."""
        return TokenizerSpec("continuous", (*self.grid, self.channels), self.image)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "DeTok":
        """Gives the module with freshly drawn parameters."""
        return DeTok(self, rngs)


# name -> the trunk; the released DeTok-BB has B twice
SIZES: dict[str, Tower] = {
    "S": Tower(512, 8, 8),
    "B": Tower(768, 12, 12),
    "L": Tower(1024, 24, 16),
    "XL": Tower(1152, 28, 16),
}


def detok(name: str, *, image: tuple[int, int, int] = (256, 256, 3), **changes: Any) -> DeTokConfig:
    """Gives a published size by name: "B-B" is encoder B and decoder B.

    Raises GenError for an unknown name.
    """
    encoder, _, decoder = name.partition("-")
    if encoder not in SIZES or decoder not in SIZES:
        raise GenError(f"unknown l-DeTok '{name}'; {suggest(name, [f'{a}-{b}' for a in SIZES for b in SIZES])}")
    return dataclasses.replace(DeTokConfig(image, encoder=SIZES[encoder], decoder=SIZES[decoder]), **changes)


def rotation(grid: tuple[int, ...], head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (tokens, head_dim) float32: row and column on [0, 1] times 2 pi f, f from 7 down to 7e-4.

    As released, neighbouring channels are turned as a pair though their frequencies differ: this is no rotation, and
    lengths are not kept.
    """
    quarter = head_dim // 4
    frequencies = 7.0 * 10.0 ** (-4.0 * np.arange(quarter) / (quarter - 1))
    places = np.meshgrid(*(np.arange(n) / max(n - 1, 1) for n in grid), indexing="ij")
    listed = np.tile(frequencies, 2)
    angles = 2 * math.pi * np.concatenate([place.reshape(-1, 1) * listed for place in places], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class _Side(nnx.Module):
    """A trunk with learned positions and a norm before it; `pre` stands for ln_pre."""

    def __init__(self, config: DeTokConfig, tower: Tower, rngs: nnx.Rngs) -> None:
        self.grid, self.head_dim, tokens = config.grid, tower.width // tower.heads, math.prod(config.grid)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (tokens, tower.width)) * tower.width**-0.5)
        self.pre = normed("rms", tower.width, 1e-6, rngs)
        self.trunk = Trunk(
            tower,
            int(2 / 3 * tower.width * 4),
            feedforward="swiglu",
            norm="rms",
            dtype=config.dtype,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        cos, sin = rotation(self.grid, self.head_dim)
        return self.trunk(self.pre(x + self.positions[...]), lambda q: rotate_pairs(q, cos, sin), mask=mask)


class DeTok(nnx.Module):
    """The two trunks of a `DeTokConfig`."""

    def __init__(self, config: DeTokConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        pixels, dtype = config.patch**2 * config.image[2], jnp.dtype(config.dtype)
        width = config.decoder.width
        self.embed = linear(pixels, config.encoder.width, dtype=dtype, rngs=rngs)
        self.encoder = _Side(config, config.encoder, rngs)
        self.to_code = linear(config.encoder.width, 2 * config.channels, rngs=rngs)
        self.from_code = linear(config.channels, width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)) * width**-0.5)
        self.decoder = _Side(config, config.decoder, rngs)
        self.head = linear(width, pixels, dtype=dtype, rngs=rngs)
        self.conv_out = nnx.Conv(config.image[2], config.image[2], (3, 3), rngs=rngs)

    def encode(self, images: jax.Array, visible: jax.Array | None = None) -> Gaussian:
        """(B, H, W, C) in [-1, 1] -> Gaussian over (B, h, w, channels).

        Args:
          visible: (B, h w) bool, the patches that the encoder sees; what it says of the others has no meaning.
        """
        config = self.config
        if images.shape[1:] != config.image:
            raise GenError(f"images are {images.shape}; this l-DeTok takes (B, {', '.join(map(str, config.image))})")
        x = self.embed(patchify(images, config.patch))
        x = self.encoder(x, None if visible is None else visible[:, None, None])
        moments = self.to_code(x).reshape(len(images), *config.grid, -1).astype(jnp.float32)
        return Gaussian(*jnp.split(moments, 2, axis=-1))

    def decode(self, latents: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        """(B, h, w, channels) -> (B, H, W, C), about [-1, 1]; the mask token stands for what is not `visible`.

        Raises GenError for latents of another shape.
        """
        config = self.config
        if latents.shape[1:] != config.spec.shape:
            raise GenError(f"latents are {latents.shape}; this l-DeTok decodes (B, *{config.spec.shape})")
        x = self.from_code(latents.reshape(len(latents), -1, config.channels))
        if visible is not None:
            x = jnp.where(visible[..., None], x, self.mask_token[...])
        x = self.head(self.decoder(x)).astype(jnp.float32)
        return self.conv_out(unpatchify(x, config.image[:2], config.patch))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoisingDraws:
    """What `LatentDenoising` draws for each sample.

    Attributes:
      visible: (B, h, w) bool, the patches that are encoded.
      posterior, noise: (B, h, w, channels) standard normal.
      level: (B, 1, 1, 1) in [0, 1), the share of noise.
    """

    visible: jax.Array
    posterior: jax.Array
    noise: jax.Array
    level: jax.Array


@dataclasses.dataclass(frozen=True)
class LatentDenoising:
    """How l-DeTok is trained: patches are hidden, and latents interpolated with noise, before they are decoded.

    Attributes:
      mask: largest share of patches that are hidden: the share is U(-0.1, mask), at least 0, drawn for each sample (the
        release draws one for a batch, whose shapes depend on it).
      gamma: standard deviation of the noise.
      additive: latents + level noise instead of (1 - level) latents + level noise.

    Raises GenError for a mask out of [0, 1), and negative noise.
    """

    mask: float = 0.7
    gamma: float = 3.0
    additive: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.mask < 1 or self.gamma < 0:
            raise GenError(f"mask {self.mask}, gamma {self.gamma}; the mask is in [0, 1), the noise at least 0")

    def draw(self, tokenizer: DeTokConfig, keys: jax.Array) -> DenoisingDraws:
        """Gives the draws of samples with keys (B,)."""
        shape, tokens = tokenizer.spec.shape, math.prod(tokenizer.grid)

        def one(key: jax.Array) -> DenoisingDraws:
            share, order, posterior, noise, level = jax.random.split(key, 5)
            ratio = jnp.maximum(jax.random.uniform(share, minval=-0.1, maxval=self.mask), 0.0)
            rank = jnp.argsort(jnp.argsort(jax.random.uniform(order, (tokens,))))
            return DenoisingDraws(
                (rank < jnp.ceil(tokens * (1.0 - ratio))).reshape(tokenizer.grid),
                jax.random.normal(posterior, shape),
                jax.random.normal(noise, shape),
                jax.random.uniform(level, (1, 1, 1)),
            )

        return jax.vmap(one)(keys)

    def latents(self, posterior: Gaussian, draws: DenoisingDraws) -> jax.Array:
        """(B, h, w, channels) that are decoded: posterior samples with noise."""
        z = posterior.mean + posterior.std * draws.posterior
        keep = 1.0 if self.additive else 1.0 - draws.level
        return keep * z + draws.level * self.gamma * draws.noise

    def encode(
        self, tokenizer: DeTokConfig, params: Params, images: jax.Array, draws: DenoisingDraws
    ) -> tuple[Gaussian, jax.Array]:
        """Gives the posterior of images in [-1, 1], standard normal where nothing is seen, and what is decoded."""
        posterior = Network(tokenizer).apply(params, images, _flat(draws.visible), method="encode")
        seen = draws.visible[..., None]
        posterior = Gaussian(jnp.where(seen, posterior.mean, 0.0), jnp.where(seen, posterior.logvar, 0.0))
        return posterior, self.latents(posterior, draws)

    def decode(self, tokenizer: DeTokConfig, params: Params, latents: jax.Array, draws: DenoisingDraws) -> jax.Array:
        """Images (B, H, W, C) of latents, of which the hidden ones are not looked at."""
        images: jax.Array = Network(tokenizer).apply(params, latents, _flat(draws.visible), method="decode")
        return images


def _flat(visible: jax.Array) -> jax.Array:
    return visible.reshape(len(visible), -1)
