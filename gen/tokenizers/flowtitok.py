"""FlowTok's image tokenizer: a 1D KL tokenizer with as many latents as a caption has tokens.

He et al. 2025, "FlowTok: Flowing Seamlessly Across Text and Image Tokens" (arXiv 2503.10772, section 3): TA-TiTok's
arrangement (Kim et al. 2025, arXiv 2501.07730) with 77 latent tokens, rotary positions in place of learned ones, and
SwiGLU. How the angles run was not published: here they count the sequence, patches first. Published weights therefore
have no importer.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import check_choices
from gen.errors import GenError
from gen.nn.conditions import Condition
from gen.nn.layers import Remat, linear, patchify, unpatchify
from gen.nn.network import Cond, Network, Params
from gen.nn.rotary import axial_rotation, rotate_pairs
from gen.tokenizers.base import Gaussian, TokenizerSpec
from gen.tokenizers.continuous import Continuous
from gen.tokenizers.trunk import Tower, Trunk, grid_of

__all__ = ["FlowTiTok", "FlowTiTokConfig"]


@dataclasses.dataclass(frozen=True)
class FlowTiTokConfig(Continuous):
    """A FlowTiTok; itself the `gen.tokenizers.base.Tokenizer`. The sizes are the paper's, B and L.

    Attributes:
      image: (H, W, C) of the images, multiples of `patch`.
      patch: side of a patch in pixels.
      tokens: number of latent tokens, that of the caption's.
      channels: channels per latent token.
      encoder, decoder: sizes of the two trunks: LayerNorm, SwiGLU of 2/3 of four widths, rotary positions.
      text: (length, width) of the caption's features that the decoder reads, (77, 768) of CLIP ViT-L/14 in the paper;
        None for a decoder of latents alone.
      dtype: compute type of the matrix products; parameters, norms and posterior are float32.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int] = (256, 256, 3)
    patch: int = 16
    tokens: int = 77
    channels: int = 16
    encoder: Tower = Tower(768, 12, 12)
    decoder: Tower = Tower(1024, 24, 16)
    text: tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        grid_of(self.image[:2], (self.patch, self.patch))
        for tower in (self.encoder, self.decoder):
            if tower.width // tower.heads % 2:
                raise GenError(f"rotary positions need heads of an even number of channels; change {tower}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return math.prod(grid_of(self.image[:2], (self.patch, self.patch)))

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (tokens, channels); the decoder is conditioned on text where there is some."""
        text = {} if self.text is None else {"text": Condition(self.text)}
        return TokenizerSpec("continuous", (self.tokens, self.channels), self.image, conditions=text)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "FlowTiTok":
        """Gives the module with freshly drawn parameters."""
        return FlowTiTok(self, rngs)

    def decode(
        self,
        params: Params,
        latents: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """latents (B, tokens, channels) -> images (B, H, W, C) float32, about [-1, 1], unclipped.

        Args:
          cond: ``text`` (B, length, width), where the decoder reads it. Raises GenError without it.
        """
        del keys, options
        text = (cond or {}).get("text")
        return Network(self).apply(params, latents, text, method="decode")


class FlowTiTok(nnx.Module):
    """The two trunks of a `FlowTiTokConfig`."""

    def __init__(self, config: FlowTiTokConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        pixels, dtype = config.patch**2 * config.image[2], jnp.dtype(config.dtype)
        inner, outer = config.encoder.width, config.decoder.width
        self.embed = linear(pixels, inner, dtype=dtype, rngs=rngs)
        self.latent_tokens = _table(config.tokens, inner, rngs)
        self.encoder = self._trunk(config.encoder, rngs)
        self.to_code = linear(inner, 2 * config.channels, rngs=rngs)
        self.from_code = linear(config.channels, outer, dtype=dtype, rngs=rngs)
        self.mask_token = _table(1, outer, rngs)
        if config.text is not None:
            self.from_text = linear(config.text[1], outer, dtype=dtype, rngs=rngs)
        self.decoder = self._trunk(config.decoder, rngs)
        self.head = linear(outer, pixels, dtype=dtype, rngs=rngs)
        self.conv_out = nnx.Conv(config.image[2], config.image[2], (3, 3), rngs=rngs)

    def _trunk(self, tower: Tower, rngs: nnx.Rngs) -> Trunk:
        config = self.config
        return Trunk(
            tower,
            int(2 / 3 * tower.width * 4),
            feedforward="swiglu",
            eps=1e-5,
            dtype=config.dtype,
            remat=config.remat,
            scan=config.scan,
            rngs=rngs,
        )

    def encode(self, images: jax.Array) -> Gaussian:
        """(B, H, W, C) in [-1, 1] -> Gaussian over (B, tokens, channels).

        Raises GenError for images of another shape.
        """
        config = self.config
        if images.shape[1:] != config.image:
            raise GenError(f"images are {images.shape}; this tokenizer takes (B, {', '.join(map(str, config.image))})")
        latents = jnp.broadcast_to(self.latent_tokens[...], (len(images), *self.latent_tokens.shape))
        x = jnp.concatenate([self.embed(patchify(images, config.patch)), latents], axis=1)
        x = _run(self.encoder, config.encoder, x)[:, config.patches :]
        return Gaussian(*jnp.split(self.to_code(x).astype(jnp.float32), 2, axis=-1))

    def decode(self, latents: jax.Array, text: jax.Array | None) -> jax.Array:
        """(B, tokens, channels) and text (B, length, width) -> (B, H, W, C), about [-1, 1].

        Raises GenError for latents or text of another shape, or no text.
        """
        config = self.config
        if latents.shape[1:] != config.spec.shape:
            raise GenError(f"latents are {latents.shape}; this tokenizer decodes (B, *{config.spec.shape})")
        masks = jnp.broadcast_to(self.mask_token[...], (len(latents), config.patches, config.decoder.width))
        parts = [masks, self.from_code(latents)]
        if config.text is not None:
            if text is None or text.shape[1:] != config.text:
                raise GenError(f"this decoder reads text features (B, *{config.text}); give them as cond['text']")
            parts.append(self.from_text(text))
        x = _run(self.decoder, config.decoder, jnp.concatenate(parts, axis=1))[:, : config.patches]
        return self.conv_out(unpatchify(self.head(x).astype(jnp.float32), config.image[:2], config.patch))


def _run(trunk: Trunk, tower: Tower, x: jax.Array) -> jax.Array:
    cos, sin = axial_rotation((x.shape[1],), tower.width // tower.heads)
    return trunk(x, lambda q: rotate_pairs(q, cos, sin))


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * width**-0.5)
