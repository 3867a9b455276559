"""The vision transformer of frozen foundation encoders: `gen.features.dinov2` and `gen.features.mae` have the sizes.

Oquab et al. 2023 (DINOv2, arXiv 2304.07193), Darcet et al. 2023 (its registers, arXiv 2309.16588), He et al. 2021 (MAE,
arXiv 2111.06377): pre-norm blocks over a class token, registers and patches.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.features.resize import cubic
from gen.nn.layers import layer_norm, linear, patchify, run_stack, stack
from gen.nn.vit import FeedForward, ViTBlock, normed

__all__ = ["DEVIATION", "MEAN", "ViT", "ViTConfig"]

# ImageNet's, of the range [0, 1]
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture; the defaults are DINOv2's ViT-S/14 without registers.

    Attributes:
      size: side in pixels of the square images whose patches the position table is for.
      patch: side of a patch; divides the sides of every image.
      width, depth, heads, hidden: of the transformer; `hidden` is the inner width of the feed-forward layers.
      swiglu: gated feed-forward layers (ViT-g) instead of an MLP with the exact GELU.
      scaled: whether the branches are scaled by learned vectors (LayerScale), as in every DINOv2.
      registers: tokens beside the class token that carry no position.
      antialias, offset: how the position table is resampled for other sizes: DINOv2 was published without registers as
        (False, 0.1), with registers as (True, 0.0); timm, which VA-VAE reads DINOv2 and MAE with, takes (True, 0.0).
      masked: whether there is a mask token, which only training uses; files of timm and of MAE's encoder have none.
      affine: whether the final norm has a gain and a bias; RAE (Zheng et al. 2025) goes without.
      eps: of all norms.

    Raises GenError for a size that is no multiple of the patch, and a width that the heads do not divide.
    """

    size: int = 518
    patch: int = 14
    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    swiglu: bool = False
    scaled: bool = True
    registers: int = 0
    antialias: bool = False
    offset: float = 0.1
    masked: bool = True
    affine: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.size % self.patch or self.size < self.patch:
            raise GenError(f"size {self.size} is not a multiple of patch {self.patch}; choose one that is")
        if self.width % self.heads:
            raise GenError(f"width {self.width} cannot be shared by {self.heads} heads; choose a divisor of it")

    def build(self, rngs: nnx.Rngs) -> "ViT":
        """Gives the network with fresh weights."""
        return ViT(self, rngs)


def _block(config: ViTConfig, rngs: nnx.Rngs) -> ViTBlock:
    kind: FeedForward = "swiglu" if config.swiglu else "mlp"
    return ViTBlock(
        config.width, config.heads, config.hidden, feedforward=kind, eps=config.eps, scaled=config.scaled, rngs=rngs
    )


def _axis_weights(size: int, out: int, antialias: bool, offset: float) -> np.ndarray:
    """(out, size) float32: torch's bicubic resampling of one axis by the factor (out + offset) / size."""
    step = size / (out + offset)
    centre = (np.arange(out) + 0.5) * step
    if antialias and out == size:
        return np.eye(size, dtype=np.float32)  # torch leaves such an axis alone, whatever the offset
    if antialias:
        width = max(step, 1.0)
        weights = cubic(-0.5)((np.arange(size) + 0.5 - centre[:, None]) / width)
        return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
    weights = np.zeros((out, size))
    source = centre - 0.5
    for k in (-1, 0, 1, 2):
        neighbour = np.floor(source).astype(int) + k
        at = np.clip(neighbour, 0, size - 1)
        np.add.at(weights, (np.arange(out), at), cubic(-0.75)(source - neighbour))
    return weights.astype(np.float32)


class ViT(nnx.Module):
    """Images to tokens. Parameters carry the block on axis 0 under "blocks"."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        width, tokens = config.width, (config.size // config.patch) ** 2
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = linear(3 * config.patch**2, width, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (1, 1, width)))
        if config.masked:
            self.mask = nnx.Param(jnp.zeros((1, width)))
        self.positions = nnx.Param(normal(rngs.params(), (1, 1 + tokens, width)))
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (1, config.registers, width)))
        self.blocks = stack(lambda r: _block(config, r), config.depth, rngs)
        if config.affine:
            self.norm = normed("layer", width, config.eps, rngs)

    def final(self, x: jax.Array) -> jax.Array:
        """Gives the norm after the last block."""
        return self.norm(x) if self.config.affine else layer_norm(x, self.config.eps)

    def table(self, grid: tuple[int, int]) -> jax.Array:
        """Gives the position table (1, 1 + rows columns, width) for a grid of patches: the class row is never
        resampled.
        """
        side = math.isqrt(self.positions.shape[1] - 1)
        if grid == (side, side):
            return self.positions[...]
        own = self.positions[0, 1:].reshape(side, side, -1)
        rows, columns = (_axis_weights(side, n, self.config.antialias, self.config.offset) for n in grid)
        found = jnp.einsum("hi,wj,ijc->hwc", rows, columns, own, precision="highest")
        return jnp.concatenate([self.positions[:, :1], found.reshape(1, grid[0] * grid[1], -1)], 1)

    def embed(self, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps images (B, H, W, 3) -> the tokens (B, 1 + registers + N, width) that the first block takes.

        Args:
          mask: (B, N) bool, patches that are replaced by the mask token (training of DINOv2).

        Raises GenError for images that do not consist of whole patches.
        """
        patch = self.config.patch
        if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % patch or images.shape[2] % patch:
            raise GenError(
                f"this encoder takes images (B, H, W, 3) with sides that {patch} divides, got {images.shape}"
            )
        x = self.patch(patchify(images, patch))
        if mask is not None:
            if not self.config.masked:
                raise GenError("this encoder has no mask token; give images without a mask")
            x = jnp.where(mask[..., None], self.mask[...], x)
        x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1])), x], 1)
        x = x + self.table((images.shape[1] // patch, images.shape[2] // patch))
        if not self.config.registers:
            return x
        registers = jnp.broadcast_to(self.registers[...], (len(x), *self.registers.shape[1:]))
        return jnp.concatenate([x[:, :1], registers, x[:, 1:]], 1)

    def __call__(
        self, images: jax.Array, *, mask: jax.Array | None = None, keep: tuple[int, ...] = ()
    ) -> dict[str, jax.Array]:
        """Encodes images (B, H, W, 3) float32 that have ImageNet's mean and deviation removed.

        Args:
          mask: see `embed`.
          keep: blocks whose output, through the final norm, is returned as "block_0" ...

        Returns:
          "cls" (B, width), "registers" (B, R, width) and "patches" (B, N, width) after the final norm; "prenorm", all
          tokens before it.

        Raises GenError for images that do not consist of whole patches.
        """
        x, _, kept = run_stack(self.blocks, self.embed(images, mask), lambda block, x, _: (block(x), None), keep=keep)
        last, start = self.final(x), 1 + self.config.registers
        found = {f"block_{i}": self.final(kept[i]) for i in keep}
        parts = {"cls": last[:, 0], "registers": last[:, 1:start], "patches": last[:, start:], "prenorm": x}
        return found | parts
