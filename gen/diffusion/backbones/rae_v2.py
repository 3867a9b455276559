"""RAEv2's transformer: conditions as tokens, a shallow wide head, and an early head for internal guidance.

arXiv 2605.18324; the head on every token is the one of "decoupled diffusion transformers" (DDT). The trunk sees the
noisy tokens beside tokens of the time and of the class, and has no adaptive norms. The head starts from the noisy input
again, and is modulated, token by token, by what the trunk says of it. An early head reads the trunk after some of its
blocks: a weaker model from the same call.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.diffusion.backbones.backbone import Backbone, BackboneConfig, Call, Factors, Output, branch_factors
from gen.diffusion.prediction import EARLY
from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.layers import Embed, Remat, linear, patchify, run_stack, stack, unpatchify
from gen.nn.network import Buffer, Cond
from gen.nn.rotary import axial_rotation, rotate_pairs
from gen.nn.vit import Gated
from gen.training.sharding import constrain

__all__ = ["RAEv2", "RAEv2Config"]

BRANCHES = ("attention", "mlp")
FREQUENCIES = 256  # of the time's features


@dataclasses.dataclass(frozen=True)
class RAEv2Config(BackboneConfig):
    """The defaults are the published ImageNet model on 16 x 16 x 1024 latents.

    Attributes:
      size: (H, W) of the latents, one token each.
      channels: of the latents.
      width, depth, heads: of the trunk.
      head_width, head_depth, head_heads: of the head.
      early: blocks of the trunk before the early head.
      mlp_ratio: of the gated MLPs, whose hidden size is int(2/3 width mlp_ratio).
      time_tokens, class_tokens: how many tokens say the time and the class.
      num_classes: number of labels; there is a null label beside them.
      times: 1, or 2 for flow maps: the second time's embedding, 0 at first, is added to the first's.
      dtype: compute type of the matrix products.
      remat, scan: as DiT's.

    Raises GenError for an early head after no block that there is, no classes, and a size of heads that 4 does not
    divide.
    """

    size: tuple[int, int] = (16, 16)
    channels: int = 1024
    width: int = 1440
    depth: int = 28
    heads: int = 20
    head_width: int = 2048
    head_depth: int = 2
    head_heads: int = 16
    early: int = 8
    mlp_ratio: float = 4.0
    time_tokens: int = 4
    class_tokens: int = 8
    num_classes: int = 1000
    times: Literal[1, 2] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"
    scan: bool = True

    def __post_init__(self) -> None:
        for width, heads in ((self.width, self.heads), (self.head_width, self.head_heads)):
            if width % heads or width // heads % 4:
                raise GenError(f"RAEv2 width {width} with {heads} heads; heads are to be of a multiple of 4 channels")
        if not 1 <= self.early <= self.depth:
            raise GenError(f"RAEv2's early head is after block {self.early} of {self.depth}; give one that there is")
        if self.num_classes < 1:
            raise GenError("RAEv2 is class-conditional; give num_classes, 1 for data without classes")

    def build(self, rngs: nnx.Rngs) -> "RAEv2":
        """Gives the module with freshly drawn parameters."""
        return RAEv2(self, rngs)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=1e-6, rngs=rngs)


class _Block(nnx.Module):
    """x += attention(norm1 x); x += mlp(norm2 x), both with gates, scales and shifts where it is modulated."""

    def __init__(
        self, width: int, heads: int, config: RAEv2Config, rngs: nnx.Rngs, places: int, modulated: bool = False
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.places, self.grid = places, config.size
        self.norm1, self.norm2 = _norm(width, rngs), _norm(width, rngs)
        self.attn = Attention(width, heads, norm=_norm, dtype=dtype, rngs=rngs)
        self.mlp = Gated(width, int(2 / 3 * width * config.mlp_ratio), jax.nn.silu, dtype=dtype, rngs=rngs)
        self.modulated = modulated
        if modulated:
            zeros = nnx.initializers.zeros_init()
            self.ada = linear(width, 6 * width, dtype=dtype, rngs=rngs, init=zeros)

    def _rotate(self, x: jax.Array) -> jax.Array:
        return rotate_pairs(x, *rotation(self.grid, x.shape[-1], self.places - self.grid[0] * self.grid[1]))

    def __call__(self, x: jax.Array, s: jax.Array | None = None, factors: Factors = None) -> jax.Array:
        first, second = (1.0, 1.0) if factors is None else factors
        if s is None:
            x = x + first * self.attn(self.norm1(x), rotate=self._rotate)
            return x + second * self.mlp(self.norm2(x))
        parts = jnp.split(self.ada(jax.nn.silu(s)).astype(jnp.float32), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = self.norm1(x) * (1.0 + scale1) + shift1
        x = x + gate1 * self.attn(h, rotate=self._rotate)
        return x + gate2 * self.mlp(self.norm2(x) * (1.0 + scale2) + shift2)


def rotation(size: tuple[int, int], head: int, further: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives cos and sin of the tokens' angles; `further` tokens that follow the image's are not turned."""
    cos, sin = axial_rotation(size, head)
    return np.concatenate([cos, np.ones((further, head), np.float32)]), np.pad(sin, ((0, further), (0, 0)))


class _Last(nnx.Module):
    """linear(norm(u) (1 + scale) + shift), with shift and scale linear in silu(s), token by token; 0 at first."""

    def __init__(self, width: int, channels: int, rngs: nnx.Rngs) -> None:
        zeros = nnx.initializers.zeros_init()
        self.norm = _norm(width, rngs)
        self.ada = linear(width, 2 * width, rngs=rngs, init=zeros)
        self.out = linear(width, channels, rngs=rngs, init=zeros)

    def __call__(self, u: jax.Array, s: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.ada(jax.nn.silu(s)), 2, axis=-1)
        return self.out(self.norm(u) * (1.0 + scale) + shift).astype(jnp.float32)


class _Time(nnx.Module):
    """[sin(2 pi W t), cos(2 pi W t)] -> Linear -> SiLU -> Linear, with fixed random W."""

    def __init__(self, width: int, rngs: nnx.Rngs, silent: bool = False) -> None:
        init = nnx.initializers.normal(0.02)
        last = nnx.initializers.zeros_init() if silent else init
        self.frequencies = Buffer(jax.random.normal(rngs.params(), (FREQUENCIES,)))
        self.fc1 = linear(2 * FREQUENCIES, width, rngs=rngs, init=init)
        self.fc2 = linear(width, width, rngs=rngs, init=last)

    def __call__(self, t: jax.Array) -> jax.Array:
        angles = 2.0 * np.pi * t[:, None] * jax.lax.stop_gradient(self.frequencies[...])
        return self.fc2(jax.nn.silu(self.fc1(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))))


class RAEv2(Backbone):
    """The network of a `RAEv2Config`; the time is called unscaled, in [0, 1] with 1 = noise.

    Features: ``block_0`` ..., the trunk's image tokens (B, N, width), and ``condition`` (B, N, head_width). Every call
    also returns ``early`` (B, H, W, C), the raw output of the early head; where nothing reads it, it costs nothing.
    Controls of the trunk's blocks: ``attention``, ``mlp``, ``blocks``, as DiT's.
    """

    title = "RAEv2"

    def __init__(self, config: RAEv2Config, rngs: nnx.Rngs) -> None:
        self.config, width = config, config.width
        further = config.time_tokens + config.class_tokens
        places = config.size[0] * config.size[1]
        normal = nnx.initializers.normal(0.02)
        self.enter = linear(config.channels, width, rngs=rngs)
        self.enter_head = linear(config.channels, config.head_width, rngs=rngs)
        if width != config.head_width:
            self.to_head = linear(width, config.head_width, rngs=rngs)
        self.time = _Time(width, rngs)
        if config.times == 2:
            self.time2 = _Time(width, rngs, silent=True)
        self.time_tokens = nnx.Param(normal(rngs.params(), (config.time_tokens, width)))
        self.class_tokens = nnx.Param(normal(rngs.params(), (config.class_tokens, width)))
        self.label = Embed(config.num_classes + 1, width, init=normal, rngs=rngs)
        self.blocks = stack(
            lambda rngs: _Block(width, config.heads, config, rngs, places + further), config.depth, rngs
        )
        self.head = nnx.Module()
        for i in range(config.head_depth):
            block = _Block(config.head_width, config.head_heads, config, rngs, places, modulated=True)
            setattr(self.head, f"block_{i}", block)
        self.final = _Last(config.head_width, config.channels, rngs)
        self.early = _Last(width, config.channels, rngs)

    def features(self) -> list[str]:
        """Names the trunk's blocks and what they say to the head."""
        return [*(f"block_{i}" for i in range(self.config.depth)), "condition"]

    def controls(self) -> dict[str, tuple[int, ...]]:
        """blocks, attention, mlp."""
        return dict.fromkeys(("blocks", *BRANCHES), (self.config.depth,))

    def embed(self, times: tuple[jax.Array, ...], cond: Cond) -> jax.Array:
        """te (B, width) float32: the sum of the times' embeddings; the label has tokens of its own."""
        del cond
        te: jax.Array = self.time(times[0])
        return te + self.time2(times[1]) if self.config.times == 2 else te

    def forward(self, call: Call) -> Output:
        """Does what `Backbone` says."""
        config = self.config
        dtype, places = jnp.dtype(config.dtype), config.size[0] * config.size[1]
        layers = tuple(i for i in range(config.depth) if f"block_{i}" in call.taps)
        noisy = patchify(call.x, 1)
        te = self.embed(call.times, call.cond)[:, None]
        beside = [self.time_tokens[...] + te, self.class_tokens[...] + self.label(call.cond["label"])[:, None]]
        tokens = constrain(jnp.concatenate([self.enter(noisy), *beside], axis=1).astype(dtype))
        stops = call.stop and "condition" not in call.taps
        tokens, _, kept = run_stack(
            self.blocks,
            tokens,
            lambda block, x, factors: (constrain(block(x, None, factors).astype(dtype)), None),
            per_layer=branch_factors(call.controls, BRANCHES, config.depth),
            remat=config.remat,
            scan=config.scan,
            keep=tuple({*layers, config.early - 1}),
            stop=max(layers, default=-1) + 1 if stops else None,
        )
        features = {f"block_{i}": kept[i][:, :places].astype(jnp.float32) for i in layers}
        if stops:
            return tokens[:, :places].astype(jnp.float32), features
        s = jax.nn.silu(te + tokens[:, :places].astype(jnp.float32))
        if config.width != config.head_width:
            s = self.to_head(s)
        if "condition" in call.taps:
            features["condition"] = s.astype(jnp.float32)
        if call.stop:
            return s.astype(jnp.float32), features
        u = self.enter_head(noisy)
        for i in range(config.head_depth):
            u = getattr(self.head, f"block_{i}")(u, s)
        r = jax.nn.silu(te + kept[config.early - 1][:, :places].astype(jnp.float32))
        features[EARLY] = unpatchify(self.early(r, r), config.size, 1)
        return unpatchify(self.final(u, s), config.size, 1), features
