"""MAR: masked autoregression over continuous tokens (Li et al. 2024, arXiv 2406.11838), with the two towers of MAE.

The encoder reads the known tokens alone, behind a buffer of copies of the class; the decoder reads them at their
places, with mask tokens in the gaps. Its output, plus a third table of positions, is what the diffusion head is given.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.latent_tokens import LatentTokenModel
from gen.autoregressive.token_head import HeadConfig, TokenHead
from gen.config import suggest
from gen.errors import GenError
from gen.nn.conditions import Conditions, label
from gen.nn.layers import Embed, Remat, dropout, linear, run_stack, stack
from gen.nn.network import Cond
from gen.nn.vit import ViTBlock, normed
from gen.training.sharding import constrain

__all__ = ["MAR", "MARConfig", "mar"]

_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MARConfig(LatentTokenModel):
    """The defaults are MAR-B over 16 x 16 x 16 latents of ImageNet.

    Attributes:
      patch: side of the square of latents that is one token.
      num_classes: number of labels; 0 for none.
      width, depth, heads: of the encoder, and of the decoder.
      buffer: copies of the class before the tokens.
      head_width, head_depth: of the diffusion head.
      dtype: compute type of the matrix products.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError for patches that do not divide the latents, heads that do not divide the width, and no buffer.
    """

    shape: tuple[int, ...] = (16, 16, 16)
    patch: int = 1
    num_classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    buffer: int = 64
    head_width: int = 1024
    head_depth: int = 6
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) not in (2, 3) or any(n % self.patch for n in self.shape[:-1]):
            raise GenError(f"latents {self.shape} are not cut into patches of {self.patch}; choose sides that divide")
        if self.width % self.heads or self.buffer < 1:
            raise GenError(
                f"a MAR of width {self.width} with {self.heads} heads and a buffer of {self.buffer}; expected a width "
                "that the heads divide, and at least one token of buffer"
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Gives the numbers of tokens along each axis."""
        return tuple(n // self.patch for n in self.shape[:-1])

    @property
    def length(self) -> int:
        """Does what `LatentTokenModel.length` says."""
        return math.prod(self.sides)

    @property
    def channels(self) -> int:
        """Tells how many numbers one token has."""
        return int(self.shape[-1] * self.patch ** len(self.sides))

    @property
    def conditions(self) -> Conditions:
        """Gives the label of a model with classes."""
        return label(self.num_classes)

    @property
    def head(self) -> HeadConfig:
        """Does what `LatentTokenModel.head` says."""
        return HeadConfig(self.channels, self.width, self.head_width, self.head_depth, self.dtype)

    def sequence(self, latents: jax.Array) -> jax.Array:
        """Does what `LatentTokenModel.sequence` says; within a token the channel comes first, then the place."""
        axes = len(self.sides)
        split = [m for side in self.sides for m in (side, self.patch)]
        x = latents.reshape(len(latents), *split, self.shape[-1])
        order = (0, *range(1, 2 * axes + 1, 2), 2 * axes + 1, *range(2, 2 * axes + 1, 2))
        return x.transpose(order).reshape(len(latents), self.length, self.channels)

    def stored(self, tokens: jax.Array) -> jax.Array:
        """Does what `LatentTokenModel.stored` says."""
        axes = len(self.sides)
        x = tokens.reshape(len(tokens), *self.sides, self.shape[-1], *(self.patch,) * axes)
        order = (0, *(m for i in range(axes) for m in (1 + i, 2 + axes + i)), 1 + axes)
        return x.transpose(order).reshape(len(tokens), *self.shape)

    def build(self, rngs: nnx.Rngs) -> "MAR":
        """Gives the module with freshly drawn parameters."""
        return MAR(self, rngs)


# (width, depth, heads, head width, head depth); the last one's head is not certain
SIZES = {"B": (768, 12, 12, 1024, 6), "L": (1024, 16, 16, 1280, 8), "H": (1280, 20, 16, 1536, 12)}


def mar(name: str, **changes: Any) -> MARConfig:
    """Gives a published size, "B", "L" or "H". Raises GenError for another name."""
    if name not in SIZES:
        raise GenError(f"unknown MAR size '{name}'; {suggest(name, SIZES)}")
    width, depth, heads, head_width, head_depth = SIZES[name]
    sizes = {"width": width, "depth": depth, "heads": heads, "head_width": head_width, "head_depth": head_depth}
    return MARConfig(**sizes | changes)


class _Block(ViTBlock):
    """A ViT block, of which training may drop what attention adds."""

    def __init__(self, config: MARConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config.width, config.heads, 4 * config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.rate = config.dropout

    def step(self, x: jax.Array, mask: jax.Array | None, keys: jax.Array | None) -> jax.Array:
        """x (B, N, width) -> the same; `mask` (B, N) says which tokens there are."""
        seen = None if mask is None else mask[:, None, None]
        added = self.attn(self.norm1(x), mask=seen).astype(jnp.float32)
        x = x + (added if keys is None else dropout(added, self.rate, keys))
        return constrain(x + self.mlp(self.norm2(x)))


class _Tower(nnx.Module):
    """Blocks and a norm."""

    def __init__(self, config: MARConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.blocks = stack(lambda r: _Block(config, r), config.depth, rngs)
        self.norm = normed("layer", config.width, 1e-6, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None, keys: jax.Array | None) -> jax.Array:
        config = self.config
        layers = None if keys is None else jax.vmap(lambda k: jax.random.split(k, config.depth), out_axes=1)(keys)
        options: dict[str, Any] = {"per_layer": layers, "remat": config.remat, "scan": config.scan}
        found = run_stack(self.blocks, x, lambda block, x, own: (block.step(x, mask, own), None), **options)
        out: jax.Array = self.norm(found.x)
        return out


class MAR(nnx.Module):
    """The network of a `MARConfig`; see the module."""

    def __init__(self, config: MARConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, whole, dtype = config.width, config.buffer + config.length, jnp.dtype(config.dtype)

        def table(rows: int) -> nnx.Param[jax.Array]:
            return nnx.Param(_normal(rngs.params(), (rows, width)))

        if config.num_classes:
            self.label = Embed(config.num_classes, width, init=_normal, rngs=rngs)
        self.unknown, self.mask_token = table(1), table(1)
        self.enter = linear(config.channels, width, dtype=dtype, rngs=rngs)
        self.enter_norm = normed("layer", width, 1e-6, rngs)
        self.encoder_positions, self.encoder = table(whole), _Tower(config, rngs)
        self.join = linear(width, width, dtype=dtype, rngs=rngs)
        self.decoder_positions, self.decoder = table(whole), _Tower(config, rngs)
        self.positions = table(config.length)
        self.head = TokenHead(config.head, rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the condition of no class; GenError for a model without classes."""
        if not self.config.num_classes:
            raise GenError("this MAR is unconditional; sample it without guidance")
        return {**cond, "label": jnp.full_like(cond["label"], self.config.num_classes)}

    def encode(
        self, tokens: jax.Array, mask: jax.Array, cond: Cond, room: int, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Reads the known tokens, in order, filled up to `room`.

        Returns:
          (B, buffer + room, width); each token's place among these (B, L), of the known ones.
        """
        rows, buffer = len(tokens), self.config.buffer
        order = jnp.argsort(mask, axis=-1, stable=True)
        kept = order[:, :room]
        known = ~jnp.take_along_axis(mask, kept, axis=-1)
        x = jnp.concatenate([self._buffer(rows, cond), self.enter(tokens).astype(jnp.float32)], axis=1)
        x = self.enter_norm(x + self.encoder_positions[...])
        gathered = jnp.take_along_axis(x[:, buffer:], kept[..., None], axis=1)
        x = constrain(jnp.concatenate([x[:, :buffer], gathered], axis=1))
        seen = jnp.concatenate([jnp.ones((rows, buffer), bool), known], axis=1)
        return self.encoder(x, seen, keys), jnp.argsort(order, axis=-1)

    def _buffer(self, rows: int, cond: Cond) -> jax.Array:
        """The class, (B, buffer, width)."""
        classes, unknown = self.config.num_classes, self.unknown[...]
        vector = jnp.broadcast_to(unknown, (rows, self.config.width))
        if classes:
            known = (cond["label"] < classes)[:, None]
            vector = jnp.where(known, self.label(jnp.minimum(cond["label"], classes - 1)), unknown)
        return jnp.broadcast_to(vector[:, None], (rows, self.config.buffer, self.config.width))

    def __call__(self, tokens: jax.Array, mask: jax.Array, cond: Cond, room: int) -> jax.Array:
        """Gives z (B, L, width) float32; the arguments as in `LatentTokenModel.z`.

        Raises GenError for tokens of another shape than the configuration's.
        """
        config, first, second = self.config, None, None
        if tokens.shape[1:] != (config.length, config.channels):
            raise GenError(f"tokens are {tokens.shape}; this MAR takes (B, {config.length}, {config.channels})")
        if "dropout" in cond:
            first, second = jax.vmap(jax.random.split, out_axes=1)(cond["dropout"])
        encoded, places = self.encode(tokens, mask, cond, room, first)
        x = self.join(encoded).astype(jnp.float32)
        buffer, known = x[:, : config.buffer], x[:, config.buffer :]
        # a masked token's place may lie beyond the room; what is read there is thrown away
        if room:
            known = jnp.take_along_axis(known, jnp.minimum(places, room - 1)[..., None], axis=1)
        x = jnp.where(mask[..., None], self.mask_token[...], known if room else 0.0)
        x = jnp.concatenate([buffer, x], axis=1) + self.decoder_positions[...]
        z: jax.Array = self.decoder(constrain(x), None, second)[:, config.buffer :] + self.positions[...]
        return z
