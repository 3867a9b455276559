"""ViTok: a plain vision transformer as autoencoder, of images and of videos.

Hansen-Estruch et al. 2025, "Learnings from Scaling Visual Tokenizers for Reconstruction and Generation" (arXiv
2501.09755), as in the first author's release: LayerNorm, GEGLU, rotary positions over the raster of tokens. Each token
is a patch of ``frames`` x ``patch`` x ``patch`` pixels and keeps ``channels`` numbers.
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
from gen.nn.rotary import axial_rotation, rotate_pairs
from gen.tokenizers.base import Gaussian, TokenizerSpec
from gen.tokenizers.continuous import Continuous
from gen.tokenizers.trunk import Tower, Trunk, grid_of

__all__ = ["SIZES", "ViTok", "ViTokConfig", "position_table", "vitok"]


@dataclasses.dataclass(frozen=True)
class ViTokConfig(Continuous):
    """A ViTok; itself the `gen.tokenizers.base.Tokenizer`. The defaults are the released S-B/16.

    Attributes:
      image: (H, W, C) of images, or (T, H, W, C) of videos.
      patch: side of a patch in pixels.
      frames: frames of a patch; 1 for images.
      channels: channels per latent.
      encoder, decoder: sizes of the two trunks; their MLPs are `HIDDEN` times as wide. The released code has one width
        for both.
      rotary: angles of q and k by a token's place in the raster ("1d") or by its column and row ("2d").
      positions: a fixed table added to the tokens of both trunks: of the raster, of column and row, or of frame, column
        and row.
      theta: of the rotary frequencies.
      dtype: compute type of the matrix products; parameters, norms and posterior are float32.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, ...] = (256, 256, 3)
    patch: int = 16
    frames: int = 1
    channels: int = 16
    encoder: Tower = Tower(768, 6, 12)
    decoder: Tower = Tower(768, 12, 12)
    rotary: Literal["1d", "2d"] = "1d"
    positions: Literal["none", "1d", "2d", "3d"] = "none"
    theta: float = 10000.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        if len(self.image) not in (3, 4) or (len(self.image) == 3 and self.frames != 1):
            raise GenError(
                f"image {self.image} with patches of {self.frames} frames; give (H, W, C) and 1, or (T, H, W, C)"
            )
        grid_of(self.image[:-1], self.sides)
        if self.rotary == "2d" and len(self.image) == 4:
            raise GenError('rotary "2d" is that of images; give "1d" for videos')
        if self.positions != "none" and self.positions != "1d" and int(self.positions[0]) != len(self.sides):
            raise GenError(f'positions "{self.positions}" with image {self.image}; "2d" is of images, "3d" of videos')
        for tower in (self.encoder, self.decoder):
            need = 2 if self.rotary == "1d" else 4
            if tower.width // tower.heads % need:
                raise GenError(f"rotary positions need heads of a multiple of {need} channels; change {tower}")
            if self.positions != "none" and tower.width % (2 * int(self.positions[0])):
                raise GenError(f'positions "{self.positions}" need a width that {2 * int(self.positions[0])} divides')

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of a patch: (frames,) height, width."""
        return (self.patch, self.patch) if len(self.image) == 3 else (self.frames, self.patch, self.patch)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along (time,) height, width."""
        return grid_of(self.image[:-1], self.sides)

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (*grid, channels)."""
        return TokenizerSpec("continuous", (*self.grid, self.channels), self.image)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "unembed/kernel"

    def build(self, rngs: nnx.Rngs) -> "ViTok":
        """Gives the module with freshly drawn parameters."""
        return ViTok(self, rngs)


HIDDEN = 2.67

# name -> the trunk (paper, table 1); S is a ViT-S widened to 768 with 6 blocks
SIZES: dict[str, Tower] = {
    "S": Tower(768, 6, 12),
    "B": Tower(768, 12, 12),
    "L": Tower(1152, 24, 16),
}


def vitok(name: str, *, image: tuple[int, ...] = (256, 256, 3), **changes: Any) -> ViTokConfig:
    """Gives a published size: "S-B/16" is encoder S, decoder B and patches of 16; "S-B/4x16" has 4 frames as well.

    Raises GenError for an unknown name.
    """
    towers, _, sides = name.partition("/")
    encoder, _, decoder = towers.partition("-")
    frames, _, patch = sides.rpartition("x")
    if encoder not in SIZES or decoder not in SIZES or not patch.isdigit() or not (frames or "1").isdigit():
        known = [f"{a}-{b}/{p}" for a in SIZES for b in SIZES for p in (8, 16, 32)]
        raise GenError(f"unknown ViTok '{name}'; {suggest(name, known)}")
    config = ViTokConfig(image, int(patch), int(frames or 1), encoder=SIZES[encoder], decoder=SIZES[decoder])
    return dataclasses.replace(config, **changes)


def position_table(grid: tuple[int, ...], width: int, kind: Literal["1d", "2d", "3d"]) -> np.ndarray:
    """Gives the fixed table (prod(grid), width) float32: sin and cos of each axis, frame, then column, then row.

    An axis has n = width / (2 axes) frequencies 10000^(-k / (n - 1)); "1d" has the raster as its only axis.
    """
    axes = int(kind[0])
    places = list(np.meshgrid(*(np.arange(n) for n in (grid if axes > 1 else (math.prod(grid),))), indexing="ij"))
    if axes > 1:
        *frame, row, column = places
        places = [*frame, column, row]
    n = width // (2 * axes)
    frequencies = 10000.0 ** (-np.arange(n) / (n - 1))
    angles = [place.reshape(-1, 1) * frequencies for place in places]
    return np.concatenate([part for a in angles for part in (np.sin(a), np.cos(a))], axis=1).astype(np.float32)


def rotation(config: ViTokConfig, tower: Tower) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles of every token (prod(grid), head channels)."""
    head_dim = tower.width // tower.heads
    if config.rotary == "1d":
        return axial_rotation((math.prod(config.grid),), head_dim, config.theta)
    cos, sin = axial_rotation(config.grid, head_dim, config.theta)
    half = head_dim // 2  # the column before the row
    return np.roll(cos, half, axis=1), np.roll(sin, half, axis=1)


class ViTok(nnx.Module):
    """The two trunks of a `ViTokConfig`."""

    def __init__(self, config: ViTokConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        pixels, dtype = math.prod(config.sides) * config.image[-1], jnp.dtype(config.dtype)

        def trunk(tower: Tower) -> Trunk:
            return Trunk(
                tower,
                int(HIDDEN * tower.width),
                feedforward="geglu",
                eps=1e-5,
                qkv_bias=False,
                dtype=config.dtype,
                remat=config.remat,
                scan=config.scan,
                rngs=rngs,
            )

        self.embed = linear(pixels, config.encoder.width, dtype=dtype, rngs=rngs)
        self.encoder = trunk(config.encoder)
        self.to_code = linear(config.encoder.width, 2 * config.channels, rngs=rngs)
        self.from_code = linear(config.channels, config.decoder.width, dtype=dtype, rngs=rngs)
        self.decoder = trunk(config.decoder)
        self.unembed = linear(config.decoder.width, pixels, bias=False, dtype=dtype, rngs=rngs)
        self.colour = nnx.Param(jnp.zeros(config.image[-1]))  # the bias of every pixel

    def run(self, trunk: Trunk, tower: Tower, x: jax.Array) -> jax.Array:
        """(B, N, width) tokens with positions through a trunk."""
        config, (cos, sin) = self.config, rotation(self.config, tower)
        if config.positions != "none":
            x = x + position_table(config.grid, tower.width, config.positions)
        return trunk(x, lambda q: rotate_pairs(q, cos, sin))

    def encode(self, images: jax.Array) -> Gaussian:
        """(B, *image) in [-1, 1] -> Gaussian over (B, *grid, channels). Raises GenError for images of another shape."""
        config = self.config
        if images.shape[1:] != config.image:
            raise GenError(f"images are {images.shape}; this ViTok takes (B, {', '.join(map(str, config.image))})")
        x = self.run(self.encoder, config.encoder, self.embed(patchify(images, config.sides)))
        moments = self.to_code(x).reshape(len(images), *config.grid, -1).astype(jnp.float32)
        return Gaussian(*jnp.split(moments, 2, axis=-1))

    def decode(self, latents: jax.Array) -> jax.Array:
        """(B, *grid, channels) -> (B, *image), about [-1, 1]. Raises GenError for latents of another shape."""
        config = self.config
        if latents.shape[1:] != config.spec.shape:
            raise GenError(f"latents are {latents.shape}; this ViTok decodes (B, *{config.spec.shape})")
        x = self.from_code(latents.reshape(len(latents), -1, config.channels))
        x = self.unembed(self.run(self.decoder, config.decoder, x)).astype(jnp.float32)
        return unpatchify(x, config.image[:-1], config.sides) + self.colour[...]
