"""DINOv2's vision transformer (Oquab et al. 2023), with or without registers (Darcet et al. 2023)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.arrays import flatten
from gen.errors import GenError
from gen.features.resize import cubic, resize, resize_host
from gen.features.weights import Converted, network_of
from gen.nn.attention import Attention
from gen.nn.layers import MLP, linear, patchify, run_stack, stack
from gen.nn.network import Network, Params, param_shapes

__all__ = ["DEVIATION", "MEAN", "DINOv2", "DINOv2Config", "DINOv2Extractor"]

# ImageNet's, of the range [0, 1]
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Architecture; the defaults are ViT-S/14 without registers.

    Attributes:
      size: side in pixels of the square images whose patches the position table is for.
      patch: side of a patch; divides the sides of every image.
      width, depth, heads, hidden: of the transformer; `hidden` is the inner width of the feed-forward layers.
      swiglu: gated feed-forward layers (ViT-g) instead of an MLP with the exact GELU.
      scaled: whether the branches are scaled by learned vectors (LayerScale), as in every published size.
      registers: tokens beside the class token that carry no position.
      antialias, offset: how the position table is resampled for other sizes: published without registers as
        (False, 0.1), with registers as (True, 0.0).
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

    def __post_init__(self) -> None:
        if self.size % self.patch or self.size < self.patch:
            raise GenError(f"size {self.size} is not a multiple of patch {self.patch}; choose one that is")
        if self.width % self.heads:
            raise GenError(f"width {self.width} cannot be shared by {self.heads} heads; choose a divisor of it")

    def build(self, rngs: nnx.Rngs) -> "DINOv2":
        """The network with fresh weights."""
        return DINOv2(self, rngs)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class _SwiGLU(nnx.Module):
    """fc2(silu(a) b) with (a, b) the halves of fc1."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, 2 * hidden, rngs=rngs)
        self.fc2 = linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = jnp.split(self.fc1(x), 2, -1)
        return self.fc2(jax.nn.silu(gate) * value)


class _Block(nnx.Module):
    """x + g1 attention(norm1 x), then x + g2 feed-forward(norm2 x); g are learned vectors (LayerScale)."""

    def __init__(self, config: DINOv2Config, rngs: nnx.Rngs) -> None:
        width = config.width
        self.norm1, self.norm2 = _norm(width, rngs), _norm(width, rngs)
        self.attn = Attention(width, config.heads, rngs=rngs)
        self.mlp: Any = (
            _SwiGLU(width, config.hidden, rngs=rngs)
            if config.swiglu
            else MLP(width, config.hidden, approximate=False, rngs=rngs)
        )
        self.scaled = config.scaled
        if config.scaled:
            self.scale1, self.scale2 = nnx.Param(jnp.ones(width)), nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (self.scale1[...], self.scale2[...]) if self.scaled else (1.0, 1.0)
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


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


class DINOv2(nnx.Module):
    """Images to tokens. Parameters carry the block on axis 0 under "blocks"."""

    def __init__(self, config: DINOv2Config, rngs: nnx.Rngs) -> None:
        width, tokens = config.width, (config.size // config.patch) ** 2
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.patch = linear(3 * config.patch**2, width, rngs=rngs)
        self.cls = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.mask = nnx.Param(jnp.zeros((1, width)))
        self.positions = nnx.Param(normal(rngs.params(), (1, 1 + tokens, width)))
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (1, config.registers, width)))
        self.blocks = stack(lambda r: _Block(config, r), config.depth, rngs)
        self.norm = _norm(width, rngs)

    def table(self, grid: tuple[int, int]) -> jax.Array:
        """The position table (1, 1 + rows columns, width) for a grid of patches: the class row is never resampled."""
        side = math.isqrt(self.positions.shape[1] - 1)
        if grid == (side, side):
            return self.positions[...]
        own = self.positions[0, 1:].reshape(side, side, -1)
        rows, columns = (_axis_weights(side, n, self.config.antialias, self.config.offset) for n in grid)
        found = jnp.einsum("hi,wj,ijc->hwc", rows, columns, own, precision="highest")
        return jnp.concatenate([self.positions[:, :1], found.reshape(1, grid[0] * grid[1], -1)], 1)

    def embed(self, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """images (B, H, W, 3) -> the tokens (B, 1 + registers + N, width) that the first block takes.

        Args:
          mask: (B, N) bool, patches that are replaced by the mask token (training of DINOv2).
        """
        patch = self.config.patch
        if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % patch or images.shape[2] % patch:
            raise GenError(f"DINOv2 takes images (B, H, W, 3) with sides that {patch} divides, got {images.shape}")
        x = self.patch(patchify(images, patch))
        if mask is not None:
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
        normed, start = self.norm(x), 1 + self.config.registers
        found = {f"block_{i}": self.norm(kept[i]) for i in keep}
        parts = {"cls": normed[:, 0], "registers": normed[:, 1:start], "patches": normed[:, start:], "prenorm": x}
        return found | parts


@dataclasses.dataclass(frozen=True)
class DINOv2Extractor(Converted):
    """The final class token of DINOv2, for the Frechet distance of Stein et al. 2023 (FD-DINOv2).

    Images are resized to exactly `size` by Pillow's bicubic filter, not rounded in between, as EDM2 does.

    Attributes:
      size: side of the images that it sees.
      weights: a file made by ``gen convert dinov2``; that of the per-user cache by default. The published choice is
        ViT-L/14 without registers.
    """

    size: int = 224
    weights: str = ""

    @property
    def name(self) -> str:
        """Short name for protocols and tables."""
        return "dinov2"

    @property
    def resize(self) -> str:
        """See `Extractor`."""
        return f"pil-bicubic {self.size}"

    @property
    def hint(self) -> str:
        """See `Converted`."""
        return "get dinov2_vitl14_pretrain.pth from facebookresearch/dinov2 and run gen convert dinov2 FILE"

    @property
    def network(self) -> DINOv2Config:
        """The architecture of the weights. Raises GenError when there are none."""
        return network_of(self.path, DINOv2Config, self.hint)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Converted`."""
        return {name: value.shape for name, value in flatten(param_shapes(self.network)).items()}

    def fit(self, image: np.ndarray) -> np.ndarray:
        """One image (H, W, 3) of any size resized on the host to (size, size, 3) float32, which a call takes as is."""
        return resize_host(image, (self.size, self.size), "pil-bicubic")

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """images (B, H, W, 3) float32 on the 0..255 grid -> "features" (B, width) float32."""
        x = jnp.clip(resize(images, (self.size, self.size), "pil-bicubic"), 0, 255) / 255
        x = (x - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
        with jax.default_matmul_precision("highest"):
            return {"features": Network(self.network).apply(params, x)["cls"]}
