"""MaskGen-VQ: captions to the tokens of TA-TiTok by masked modelling (Kim et al. 2025, arXiv 2501.07730).

Masks, loss and decoding are MaskGIT's; the network is a two-stream transformer over the image's tokens and CLIP's
features of the caption, which come from files. A dropped caption is replaced by the empty one's features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gen.autoregressive.joint import JointTrunk, TextConfig, TrunkConfig, caption_of, truncated, without_caption
from gen.autoregressive.masked import MaskedModel
from gen.config import suggest
from gen.errors import GenError
from gen.nn.conditions import Conditions
from gen.nn.layers import Embed
from gen.nn.network import Cond
from gen.training.task import Frozen

__all__ = ["TRUNKS", "MaskGen", "MaskGenConfig", "maskgen"]

TRUNKS = {"L": TrunkConfig(), "XL": TrunkConfig(1280, 20)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGenConfig(MaskedModel):
    """The defaults are the published L over TA-TiTok-BL-128's tokens.

    Attributes:
      shape, vocabulary: of one image's tokens.
      spare: rows of the table of tokens behind the mask, which published files have and nothing reads.
      trunk: the transformer.
      text: what captions are given by.
    """

    shape: tuple[int, ...] = (128,)
    vocabulary: int = 8192
    spare: int = 0
    trunk: TrunkConfig = TrunkConfig()
    text: TextConfig = TextConfig()

    @property
    def conditions(self) -> Conditions:
        """Gives the caption's."""
        return self.text.conditions

    def build(self, rngs: nnx.Rngs) -> "MaskGen":
        """Gives the module with freshly drawn parameters."""
        return MaskGen(self, rngs)

    def forced(self, frozen: Frozen, tokens: jax.Array) -> Cond:
        """Gives the empty caption's features, frozen role ``empty``, where they are known."""
        return caption_of(frozen, len(tokens))


def maskgen(name: str, **changes: Any) -> MaskGenConfig:
    """Gives a published size, "L" or "XL". Raises GenError for another name."""
    if name not in TRUNKS:
        raise GenError(f"unknown MaskGen '{name}'; {suggest(name, TRUNKS)}")
    return MaskGenConfig(trunk=TRUNKS[name], **changes)


class MaskGen(nnx.Module):
    """The network of a `MaskGenConfig`. The logits are products with the tokens' own embeddings."""

    def __init__(self, config: MaskGenConfig, rngs: nnx.Rngs) -> None:
        rows, width = config.vocabulary + 1 + config.spare, config.trunk.width
        self.config = config
        self.embedding = Embed(rows, width, init=truncated, rngs=rngs)
        self.trunk = JointTrunk(config.trunk, config.text, config.length, rngs)

    def null(self, cond: Cond) -> Cond:
        """Gives the same conditions with the empty caption."""
        return without_caption(cond)

    def __call__(self, tokens: jax.Array, cond: Cond) -> jax.Array:
        """Gives logits (B, N, vocabulary) float32.

        Args:
          tokens: (B, N) int32 in [0, vocabulary], the last of which is the mask.
          cond: ``prompt`` (B, T, D), ``pooled`` (B, D) and, of a model that knows it, ``aesthetic`` (B,).

        Raises GenError for another number of tokens than the configuration's.
        """
        if tokens.shape[1:] != (self.config.length,):
            raise GenError(f"tokens are {tokens.shape}; this MaskGen takes (B, {self.config.length})")
        x = self.trunk(self.embedding(tokens), cond)
        dtype = jnp.dtype(self.config.trunk.dtype)
        codes = self.embedding.embedding[...][: self.config.vocabulary]
        return jnp.einsum("bnd,vd->bnv", x.astype(dtype), codes.astype(dtype), preferred_element_type=jnp.float32)
