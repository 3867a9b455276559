"""LightningDiT: DiT with the parts of later transformers (Yao, Yang & Wang 2025, "Reconstruction vs. Generation").

Each part is a switch; all of them off is DiT. The published runs use rmsnorm, swiglu and rope on VA-VAE latents
(16 x 16 x 32, patch 1). Clock and sign are SiT's: see `gen.diffusion.backbones.sit.parameterization`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.diffusion.backbones.backbone import Factors, scaled
from gen.diffusion.backbones.dit import DiT, DiTConfig
from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.layers import MLP, add_gated, layer_norm, linear, modulate
from gen.nn.rotary import axial_rotation, rotate_pairs

__all__ = ["SIZES", "LightningDiT", "LightningDiTConfig", "lightningdit"]

# name -> (depth, width, heads)
SIZES: dict[str, tuple[int, int, int]] = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}


@dataclasses.dataclass(frozen=True)
class LightningDiTConfig(DiTConfig):
    """A LightningDiT. The defaults are the published XL/1 for 256 px VA-VAE latents.

    Attributes (beside DiT's; `learned_variance` doubles the output channels, whose second half has no meaning):
      rmsnorm: RMSNorm with a gain in place of LayerNorm without, in the blocks, before the last layer, and for q and k.
      swiglu: the MLP is w3(silu(a) b), [a, b] = w12(x), of hidden size 2/3 that of the plain one.
      rope: rotary positions on q and k of every block, beside the additive ones.
      qk_norm: q and k are normed over each head (against divergence of long runs).
      shift: the blocks' modulation has shifts; False for the official ``wo_shift``.

    Raises GenError for heads whose size rotary positions do not divide.
    """

    size: tuple[int, ...] = (16, 16)
    channels: int = 32
    patch: int = 1
    rmsnorm: bool = True
    swiglu: bool = True
    rope: bool = True
    qk_norm: bool = False
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope and self.head_dim % (2 * len(self.size)):
            raise GenError(
                f"LightningDiT head size {self.head_dim} is not a multiple of {2 * len(self.size)}, which rotary "
                "positions need; change width or heads, or set rope to false"
            )

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Gives the hidden size of the MLP."""
        hidden = int(self.width * self.mlp_ratio)
        return int(2 / 3 * hidden) if self.swiglu else hidden

    def build(self, rngs: nnx.Rngs) -> "LightningDiT":
        """Gives the module with freshly drawn parameters."""
        return LightningDiT(self, rngs)


def lightningdit(name: str, **changes: Any) -> LightningDiTConfig:
    """Gives a published size by name: "B/1" to "1p6B/1" on 16 x 16 x 32 latents, "B/2" to "1p6B/2" on 32 x 32 x 4.

    Raises GenError for an unknown name.
    """
    family, _, patch = name.partition("/")
    known = [f"{family}/{patch}" for family in SIZES for patch in (1, 2)]
    if name not in known:
        raise GenError(f"unknown LightningDiT size '{name}'; {suggest(name, known)}")
    depth, width, heads = SIZES[family]
    size, channels = ((16, 16), 32) if patch == "1" else ((32, 32), 4)
    config = LightningDiTConfig(size, channels, int(patch), width, depth, heads)
    return dataclasses.replace(config, **changes)


class SwiGLU(nnx.Module):
    """w3(silu(a) b) with [a, b] = w12(x)."""

    def __init__(self, width: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.w12 = linear(width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.w3 = linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(a) * b)


def _norm(config: LightningDiTConfig) -> Callable[[int, nnx.Rngs], Any]:
    """Norms with parameters, in float32: of q and k always, of the tokens only with rmsnorm."""
    if config.rmsnorm:
        return lambda width, rngs: nnx.RMSNorm(width, epsilon=1e-6, rngs=rngs)
    return lambda width, rngs: nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """x += gate1 Attention(norm(x) (1 + scale1) + shift1); x += gate2 MLP(norm(x) (1 + scale2) + shift2)."""

    def __init__(self, config: LightningDiTConfig, rngs: nnx.Rngs) -> None:
        self.config, dtype, width = config, jnp.dtype(config.dtype), config.width
        norm = _norm(config)
        self.attn = Attention(width, config.heads, norm=norm if config.qk_norm else None, dtype=dtype, rngs=rngs)
        make = SwiGLU if config.swiglu else MLP
        self.mlp = make(width, config.hidden, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.ada = linear(width, (6 if config.shift else 4) * width, dtype=dtype, rngs=rngs, init=zeros)
        if config.rmsnorm:
            self.norm1, self.norm2 = norm(width, rngs), norm(width, rngs)

    def rotate(self, x: jax.Array) -> jax.Array:
        """Gives x (B, N, H, D) turned by its tokens' positions; unchanged without rope."""
        config = self.config
        if not config.rope:
            return x
        return rotate_pairs(x, *axial_rotation(config.grid, config.head_dim, spacing=config.spacing))

    def modulation(self, c: jax.Array) -> list[jax.Array]:
        """Gives shift1, scale1, gate1, shift2, scale2, gate2, each (B, width) float32."""
        m = self.ada(jax.nn.silu(c)).astype(jnp.float32)
        if self.config.shift:
            return jnp.split(m, 6, axis=-1)
        scale1, gate1, scale2, gate2 = jnp.split(m, 4, axis=-1)
        none = jnp.zeros_like(scale1)
        return [none, scale1, gate1, none, scale2, gate2]

    def __call__(self, x: jax.Array, c: jax.Array, factors: Factors = None) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        gate1, gate2 = scaled((gate1, gate2), factors)
        h = modulate(self.norm1(x) if self.config.rmsnorm else layer_norm(x), shift1, scale1)
        x = add_gated(x, gate1, self.attn(h, rotate=self.rotate))
        h = modulate(self.norm2(x) if self.config.rmsnorm else layer_norm(x), shift2, scale2)
        return add_gated(x, gate2, self.mlp(h))


class LightningDiT(DiT):
    """The network of a `LightningDiTConfig`; called as DiT, with the same taps and controls."""

    def __init__(self, config: LightningDiTConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs, Block)
        if config.rmsnorm:
            self.norm_final = _norm(config)(config.width, rngs)

    def norm(self, tokens: jax.Array) -> jax.Array:
        """Gives the norm before the last layer."""
        return self.norm_final(tokens) if self.config.rmsnorm else layer_norm(tokens)
