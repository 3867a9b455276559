"""A 1D image tokenizer with continuous latents: the KL variant of TiTok and TA-TiTok.

A ViT encoder reads image patches together with K learned latent tokens and keeps only the latter; a ViT
decoder reads them together with mask tokens and paints the patches (Yu et al. 2024, "An Image is Worth 32
Tokens"; Kim et al. 2025, TA-TiTok, for the single-stage layout with a pixel head that is built here).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.layers import MLP, Remat, linear, patchify, run_stack, stack, unpatchify
from gen.nn.network import Cond, Network, Params
from gen.tokenizers.base import Gaussian, TokenizerSpec
from gen.training.sharding import constrain

__all__ = ["KL1D", "KL1DConfig", "Tower"]


@dataclasses.dataclass(frozen=True)
class Tower:
    """The size of one transformer tower; its MLPs are four times as wide."""

    width: int
    depth: int
    heads: int


@dataclasses.dataclass(frozen=True)
class KL1DConfig:
    """A KL 1D tokenizer; itself the `gen.tokenizers.base.Tokenizer`. The defaults are TA-TiTok's small encoder size.

    Attributes:
      image: (H, W, C) of the images, multiples of `patch`.
      patch: side of a square patch in pixels.
      tokens: number of latent tokens K.
      channels: channels per latent token.
      encoder, decoder: sizes of the two towers.
      dtype: compute type of the matrix products.
      remat: what the backward pass recomputes (see `gen.nn.layers.run_stack`).
      scan: one scan over depth, or unrolled layers (faster on CPU for a few of them).
    """

    image: tuple[int, int, int] = (256, 256, 3)
    patch: int = 16
    tokens: int = 32
    channels: int = 16
    encoder: Tower = Tower(512, 8, 8)
    decoder: Tower = Tower(1024, 24, 16)
    dtype: str = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        h, w, _ = self.image
        if h % self.patch or w % self.patch:
            raise GenError(
                f"images of {h}x{w} do not divide into patches of {self.patch}; choose a patch that divides both"
            )
        for name, tower in (("encoder", self.encoder), ("decoder", self.decoder)):
            if tower.width % tower.heads:
                raise GenError(f"{name} width {tower.width} is not a multiple of its {tower.heads} heads; change one")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (tokens, channels)."""
        return TokenizerSpec("continuous", (self.tokens, self.channels), self.image)

    @property
    def last_layer(self) -> str:
        """See `gen.tokenizers.base.Tokenizer`."""
        return "conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "KL1D":
        """The module with freshly drawn parameters."""
        return KL1D(self, rngs=rngs)

    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Gaussian:
        """images (B, H, W, C) float in [-1, 1] -> posterior over latents (B, tokens, channels), float32."""
        del cond, keys
        return Network(self).apply(params, images, method="encode")

    def decode(
        self,
        params: Params,
        latents: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """latents (B, tokens, channels) -> images (B, H, W, C) float32, about [-1, 1], unclipped."""
        del cond, keys, options
        return Network(self).apply(params, latents, method="decode")


class Block(nnx.Module):
    """Pre-norm attention and exact-GELU MLP, both norms affine with eps 1e-5."""

    def __init__(self, tower: Tower, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(tower.width, tower.heads, dtype=dtype, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)
        self.mlp = MLP(tower.width, 4 * tower.width, approximate=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Trunk(nnx.Module):
    """What both towers share: position tables, norms and blocks over [class, patches, latents]."""

    def __init__(self, config: KL1DConfig, tower: Tower, *, rngs: nnx.Rngs) -> None:
        self.config = config
        patches = config.grid[0] * config.grid[1]
        self.class_embedding = _table(1, tower.width, rngs)
        self.positions = _table(patches + 1, tower.width, rngs)  # row 0 belongs to the class token
        self.latent_positions = _table(config.tokens, tower.width, rngs)
        self.ln_pre = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)
        self.blocks = stack(lambda r: Block(tower, dtype=config.dtype, rngs=r), tower.depth, rngs)
        self.ln_post = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, patches: jax.Array, latents: jax.Array) -> jax.Array:
        """(B, N, W) patch embeddings and (B, K, W) latent embeddings -> (B, 1 + N + K, W) before `ln_post`."""
        head = jnp.broadcast_to(self.class_embedding[...], (patches.shape[0], 1, patches.shape[2]))
        grid = jnp.concatenate([head, patches], axis=1) + self.positions[...]
        x = constrain(self.ln_pre(jnp.concatenate([grid, latents + self.latent_positions[...]], axis=1)))
        config = self.config

        def call(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x)), None

        return run_stack(self.blocks, x, call, remat=config.remat, scan=config.scan).x


class KL1D(nnx.Module):
    """The two towers of a `KL1DConfig`. Images are [0, 1] inside, as in the published models."""

    def __init__(self, config: KL1DConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        pixels = config.patch**2 * config.image[2]
        enc, dec, dtype = config.encoder, config.decoder, config.dtype
        self.latent_tokens = _table(config.tokens, enc.width, rngs)
        self.patch_embed = linear(pixels, enc.width, dtype=dtype, rngs=rngs)
        self.encoder = Trunk(config, enc, rngs=rngs)
        self.encoder_out = linear(enc.width, 2 * config.channels, rngs=rngs)
        self.decoder_embed = linear(config.channels, dec.width, dtype=dtype, rngs=rngs)
        self.mask_token = _table(1, dec.width, rngs)
        self.decoder = Trunk(config, dec, rngs=rngs)
        self.head = linear(dec.width, pixels, dtype=dtype, rngs=rngs)
        self.conv_out = nnx.Conv(config.image[2], config.image[2], (3, 3), kernel_init=_dirac, rngs=rngs)

    def encode(self, images: jax.Array) -> Gaussian:
        """(B, H, W, C) in [-1, 1] -> Gaussian over (B, K, channels)."""
        k = self.config.tokens
        patches = self.patch_embed(patchify(0.5 * (images + 1.0), self.config.patch))
        latents = jnp.broadcast_to(self.latent_tokens[...], (images.shape[0], *self.latent_tokens.shape))
        x = self.encoder.ln_post(self.encoder(patches, latents)[:, -k:])
        mean, logvar = jnp.split(self.encoder_out(x), 2, axis=-1)
        return Gaussian(mean, logvar)

    def decode(self, latents: jax.Array) -> jax.Array:
        """(B, K, channels) -> (B, H, W, C), about [-1, 1]."""
        config, n = self.config, self.config.grid[0] * self.config.grid[1]
        masks = jnp.broadcast_to(self.mask_token[...], (latents.shape[0], n, config.decoder.width))
        x = self.decoder(masks, self.decoder_embed(latents))[:, 1 : 1 + n]
        x = unpatchify(self.head(self.decoder.ln_post(x)), config.image[:2], config.patch)
        return 2.0 * self.conv_out(x.astype(jnp.float32)) - 1.0


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * width**-0.5)


def _dirac(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
    """The identity as a convolution: the head paints unfiltered patches until training says otherwise."""
    del key, out_sharding
    return jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2].set(jnp.eye(shape[2], shape[3], dtype=dtype))
