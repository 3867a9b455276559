"""RAE: the patch features of a frozen encoder as latents, and a vision transformer that paints them back.

Zheng et al. 2025, "Diffusion Transformers with Representation Autoencoders" (arXiv 2510.11690). The latents have the
encoder's width (768 for DINOv2-B); generators work on them normalised at each position and channel, by an artefact of
the cache. The decoder alone is trained, on features with noise (`LatentNoise`), so that it forgives a generator's
errors.
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
from gen.features.alignment import seen
from gen.features.dinov2 import dinov2
from gen.features.vit import DEVIATION, MEAN, ViT, ViTConfig
from gen.nn.layers import Remat, linear, sincos_positions, unpatchify
from gen.nn.network import Params
from gen.tokenizers.base import Exact, Gaussian, TokenizerSpec
from gen.tokenizers.continuous import Continuous
from gen.tokenizers.trunk import Tower, Trunk, grid_of

__all__ = ["RAE", "SIZES", "LatentNoise", "RAEConfig", "rae"]


@dataclasses.dataclass(frozen=True)
class RAEConfig(Continuous):
    """An RAE; itself the `gen.tokenizers.base.Tokenizer`. The defaults are the released DINOv2-B with decoder XL.

    Attributes:
      image: (H, W, C) of the images, square.
      patch: side in pixels of the decoder's patches: one for each latent.
      encoder: the frozen encoder, whose final norm is published without gain and bias. It sees the image resized to as
        many of its own patches as there are latents: 256 pixels become 224 for DINOv2.
      decoder: size of the decoder's trunk.
      hidden: inner width of the decoder's MLPs.
      dtype: compute type of the decoder's matrix products.
      remat, scan: of the decoder, see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int] = (256, 256, 3)
    patch: int = 16
    encoder: ViTConfig = dinov2("B", registers=4, affine=False)
    decoder: Tower = Tower(1152, 28, 16)
    hidden: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        if self.image[0] != self.image[1] or self.image[2] not in (1, 3):
            raise GenError(f"images of {self.image}; an RAE takes squares with 3 channels or 1")
        grid_of(self.image[:2], (self.patch, self.patch))

    @property
    def grid(self) -> tuple[int, ...]:
        """Latents along height and width."""
        return grid_of(self.image[:2], (self.patch, self.patch))

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (H / patch, W / patch, the encoder's width)."""
        return TokenizerSpec("continuous", (*self.grid, self.encoder.width), self.image)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "decoder/head/kernel"

    def build(self, rngs: nnx.Rngs) -> "RAE":
        """Gives the module with freshly drawn parameters."""
        return RAE(self, rngs)


# name -> (the decoder's trunk, inner width of its MLPs)
SIZES: dict[str, tuple[Tower, int]] = {
    "B": (Tower(768, 12, 12), 3072),
    "L": (Tower(1024, 24, 16), 4096),
    "XL": (Tower(1152, 28, 16), 4096),
}


def rae(name: str, **changes: Any) -> RAEConfig:
    """Gives the RAE of DINOv2-B with a published decoder: "B", "L" or "XL". Raises GenError for an unknown name."""
    if name not in SIZES:
        raise GenError(f"unknown RAE decoder '{name}'; {suggest(name, SIZES)}")
    decoder, hidden = SIZES[name]
    return dataclasses.replace(RAEConfig(decoder=decoder, hidden=hidden), **changes)


def positions(grid: tuple[int, ...], width: int) -> np.ndarray:
    """Gives the decoder's fixed table (1 + tokens, width): zero for the class token, then MAE's sines and cosines."""
    return np.concatenate([np.zeros((1, width), np.float32), sincos_positions(grid, width)])


class RAEDecoder(nnx.Module):
    """A class token and the embedded latents through a trunk; each patch token paints its pixels."""

    def __init__(self, config: RAEConfig, rngs: nnx.Rngs) -> None:
        self.grid, width, dtype = config.grid, config.decoder.width, jnp.dtype(config.dtype)
        self.embed = linear(config.encoder.width, width, dtype=dtype, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, width)))
        self.trunk = Trunk(
            config.decoder,
            config.hidden,
            eps=1e-12,
            dtype=config.dtype,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )
        self.head = linear(width, config.patch**2 * config.image[2], dtype=dtype, rngs=rngs)

    def tokens(self, latents: jax.Array) -> jax.Array:
        """(B, h, w, C) -> what the first block takes: (B, 1 + tokens, width)."""
        x = self.embed(latents.reshape(len(latents), math.prod(self.grid), -1))
        x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])), x], axis=1)
        return x + positions(self.grid, x.shape[-1])

    def __call__(self, latents: jax.Array) -> jax.Array:
        """(B, h, w, C) -> the pixels of each patch (B, tokens, patch^2 channels), standardised, float32."""
        out: jax.Array = self.head(self.trunk(self.tokens(latents)))[:, 1:].astype(jnp.float32)
        return out


class RAE(nnx.Module):
    """The frozen encoder and the decoder of an `RAEConfig`."""

    def __init__(self, config: RAEConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = ViT(config.encoder, rngs)
        self.decoder = RAEDecoder(config, rngs)

    def encode(self, images: jax.Array) -> Exact:
        """(B, H, W, C) in [-1, 1] -> patch features after the final norm (B, h, w, width).

        Raises GenError for images of another shape.
        """
        config = self.config
        if images.shape[1:] != config.image:
            raise GenError(f"images are {images.shape}; this RAE takes (B, {', '.join(map(str, config.image))})")
        patches = self.encoder(seen(images, config.grid[0] * config.encoder.patch))["patches"]
        return Exact(jax.lax.stop_gradient(patches.reshape(len(images), *config.spec.shape)))

    def decode(self, latents: jax.Array) -> jax.Array:
        """(B, h, w, width) -> (B, H, W, C), about [-1, 1]. Raises GenError for latents of another shape."""
        config = self.config
        if latents.shape[1:] != config.spec.shape:
            raise GenError(f"latents are {latents.shape}; this RAE decodes (B, *{config.spec.shape})")
        x = unpatchify(self.decoder(latents), config.image[:2], config.patch)
        mean, deviation = (jnp.asarray(values[: config.image[2]]) for values in (MEAN, DEVIATION))
        return 2.0 * (x * deviation + mean) - 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseDraws:
    """What `LatentNoise` draws for each sample.

    Attributes:
      noise: (B, *spec.shape) standard normal.
      level: (B, 1, ...) in [0, 1).
    """

    noise: jax.Array
    level: jax.Array


@dataclasses.dataclass(frozen=True)
class LatentNoise:
    """How RAE's decoder is trained: latents + tau level noise are decoded, with one level in [0, 1) for each sample.

    Attributes:
      tau: 0.8 for the released decoders.

    Raises GenError for a negative `tau`.
    """

    tau: float = 0.8

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise GenError(f"tau {self.tau}; the strength of noise is at least 0")

    def draw(self, tokenizer: RAEConfig, keys: jax.Array) -> NoiseDraws:
        """Gives the draws of samples with keys (B,)."""
        shape = tokenizer.spec.shape

        def one(key: jax.Array) -> NoiseDraws:
            noise, level = jax.random.split(key)
            return NoiseDraws(jax.random.normal(noise, shape), jax.random.uniform(level, (1,) * len(shape)))

        return jax.vmap(one)(keys)

    def latents(self, posterior: Gaussian | Exact, draws: NoiseDraws) -> jax.Array:
        """Gives the latents (B, *spec.shape) that are decoded."""
        return posterior.mode() + self.tau * draws.level * draws.noise

    def encode(
        self, tokenizer: RAEConfig, params: Params, images: jax.Array, draws: NoiseDraws
    ) -> tuple[Gaussian | Exact, jax.Array]:
        """Gives the latents of images in [-1, 1], without noise and as they are decoded."""
        posterior = tokenizer.encode(params, images)
        return posterior, self.latents(posterior, draws)

    def decode(self, tokenizer: RAEConfig, params: Params, latents: jax.Array, draws: NoiseDraws) -> jax.Array:
        """Images (B, H, W, C) of latents."""
        del draws
        return tokenizer.decode(params, latents)
