"""MaskGen-KL: captions to continuous tokens of TA-TiTok, MAR's way (Kim et al. 2025, arXiv 2501.07730).

The two-stream transformer of MaskGen-VQ, with a mask token in the place of what is not known, gives z of every token,
and MAR's diffusion head draws it. No file of it is read: the published ones name nothing that could be checked here.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.joint import JointTrunk, TextConfig, TrunkConfig, caption_of, truncated, without_caption
from gen.autoregressive.latent_tokens import LatentTokenModel
from gen.autoregressive.maskgen import TRUNKS
from gen.autoregressive.token_head import HeadConfig, TokenHead
from gen.config import suggest
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.layers import linear
from gen.nn.network import Cond
from gen.training.task import Frozen

__all__ = ["MaskGenKL", "MaskGenKLConfig", "maskgen_kl"]

TEXT = TextConfig(period=10000.0, interleaved=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGenKLConfig(LatentTokenModel):
    """The defaults are the published L over TA-TiTok-BL-32's latents, which are divided by 1 / 0.7525.

    Attributes:
      shape: (tokens, channels) of one image.
      trunk: the transformer.
      text: what captions are given by.
      head_depth: residual blocks of the diffusion head, which is as wide as the transformer.

    Raises GenError for dropout, which the network has not.
    """

    shape: tuple[int, ...] = (32, 16)
    trunk: TrunkConfig = TrunkConfig()
    text: TextConfig = TEXT
    head_depth: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise GenError("MaskGen-KL drops no activations; set dropout to 0")

    @property
    def length(self) -> int:
        """Does what `LatentTokenModel.length` says."""
        return math.prod(self.shape[:-1])

    @property
    def head(self) -> HeadConfig:
        """Does what `LatentTokenModel.head` says."""
        width = self.trunk.width
        return HeadConfig(self.shape[-1], width, width, self.head_depth, self.trunk.dtype)

    @property
    def conditions(self) -> Conditions:
        """Gives the caption's."""
        return self.text.conditions

    def sequence(self, latents: jax.Array) -> jax.Array:
        """Does what `LatentTokenModel.sequence` says."""
        return latents.reshape(len(latents), self.length, -1)

    def stored(self, tokens: jax.Array) -> jax.Array:
        """Does what `LatentTokenModel.stored` says."""
        return tokens.reshape(len(tokens), *self.shape)

    def forced(self, frozen: Frozen, rows: int) -> Cond:
        """Gives the empty caption's features, frozen role ``empty``, where they are known."""
        return caption_of(frozen, rows)

    def build(self, rngs: nnx.Rngs) -> "MaskGenKL":
        """Gives the module with freshly drawn parameters."""
        return MaskGenKL(self, rngs)


def maskgen_kl(name: str, **changes: Any) -> MaskGenKLConfig:
    """Gives a published size, "L" or "XL". Raises GenError for another name."""
    if name not in TRUNKS:
        raise GenError(f"unknown MaskGen '{name}'; {suggest(name, TRUNKS)}")
    return MaskGenKLConfig(trunk=TRUNKS[name], **changes)


class MaskGenKL(nnx.Module):
    """The network of a `MaskGenKLConfig`."""

    def __init__(self, config: MaskGenKLConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.trunk.width, jnp.dtype(config.trunk.dtype)
        self.config = config
        self.enter = linear(config.shape[-1], width, init=truncated, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(truncated(rngs.params(), (1, width)))
        self.trunk = JointTrunk(config.trunk, config.text, config.length, rngs)
        self.head = TokenHead(config.head, rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the same conditions with the empty caption."""
        return without_caption(cond)

    def __call__(self, tokens: jax.Array, mask: jax.Array, cond: Cond, room: int) -> jax.Array:
        """Gives z (B, L, width) float32, see `LatentTokenModel.z`; it reads all positions, whatever the room.

        Raises GenError for tokens of another shape than the configuration's.
        """
        del room
        if tokens.shape[1:] != (self.config.length, self.config.shape[-1]):
            raise GenError(f"tokens are {tokens.shape}; this MaskGen takes (B, {self.config.length}, channels)")
        x = jnp.where(mask[..., None], self.mask_token[...], self.enter(tokens).astype(jnp.float32))
        z: jax.Array = self.trunk(x, cond)
        return z
