"""1D image tokenizers: TiTok and TA-TiTok, with a codebook or with continuous latents.

A ViT encoder reads image patches together with K learned latent tokens and keeps only the latter; a ViT decoder reads
them together with mask tokens and paints the patches.

- Single stage: the decoder paints pixels (Kim et al. 2025, TA-TiTok, arXiv 2501.07730, which also releases this form
  without text). TA-TiTok's decoder reads the features of a caption beside the latent tokens.
- Two stages (Yu et al. 2024, "An Image is Worth 32 Tokens", arXiv 2406.07550): the decoder first learns to name the
  codes of a frozen 2D tokenizer (`TiTokConfig.logits`), then that tokenizer's decoder paints the mixture of its codes
  and is tuned along with it.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import check_choices
from gen.errors import GenError
from gen.nn.attention import Attention
from gen.nn.conditions import Condition
from gen.nn.layers import MLP, Remat, linear, patchify, run_stack, stack, unpatchify
from gen.nn.network import Cond, Network, Params
from gen.tokenizers.base import Gaussian, Quantized, TokenizerSpec
from gen.tokenizers.maskgit_vqgan import Decoder, MaskGITVQGANConfig
from gen.tokenizers.quantizers.base import within
from gen.tokenizers.trunk import Tower
from gen.training.sharding import constrain

__all__ = ["BASE", "LARGE", "SMALL", "TiTok", "TiTokConfig", "Tower"]


SMALL, BASE, LARGE = Tower(512, 8, 8), Tower(768, 12, 12), Tower(1024, 24, 16)  # the published sizes


@dataclasses.dataclass(frozen=True)
class TiTokConfig:
    """A 1D tokenizer; itself the `gen.tokenizers.base.Tokenizer`.

    Attributes:
      image: (H, W, C) of the images, multiples of the patches.
      patch: side of a square patch in pixels.
      tokens: number of latent tokens K.
      channels: channels per continuous latent token, of which the encoder gives a Gaussian posterior; None with a
        quantizer, whose width it is.
      encoder, decoder: sizes of the two towers.
      quantizer: what makes tokens or bits of the encoder's output (a `gen.tokenizers.quantizers.base.Quantizer`); None
        for continuous latents.
      decoder_patch: side of the patches that the decoder paints; None for `patch`.
      text: (length, width) of the caption's features that the decoder reads; None for a decoder of latents alone.
      pixels: the 2D tokenizer whose codes the decoder names and whose own decoder paints them; None for a decoder that
        paints pixels. With it the tokens are laid out as in the first TiTok, where the encoder's output is
        reinterpreted in memory: each token reads a part of every latent token.
      init: of the dense layers. "normal" has standard deviation 0.02 (published, but for the attentions' q, k and v);
        "xavier" is uniform by fan and paints unfiltered patches at first.
      dtype: compute type of the matrix products.
      remat: what the backward pass recomputes (see `gen.nn.layers.run_stack`).
      scan: one scan over depth, or unrolled layers (faster on CPU for a few of them).

    Raises GenError where the settings do not fit together.
    """

    image: tuple[int, int, int] = (256, 256, 3)
    patch: int = 16
    tokens: int = 32
    channels: int | None = 16
    encoder: Tower = SMALL
    decoder: Tower = LARGE
    quantizer: Any = None
    decoder_patch: int | None = None
    text: tuple[int, int] | None = None
    pixels: MaskGITVQGANConfig | None = None
    init: Literal["xavier", "normal"] = "xavier"
    dtype: str = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        h, w, _ = self.image
        for patch in (self.patch, self.painted):
            if h % patch or w % patch:
                raise GenError(
                    f"images of {h}x{w} do not divide into patches of {patch}; choose a patch that divides both"
                )
        if (self.channels is None) != (self.quantizer is not None):
            raise GenError(
                f"channels {self.channels} with {'a' if self.quantizer else 'no'} quantizer; give the channels of "
                "continuous latents, or a quantizer and channels None"
            )
        if self.pixels is not None and (self.quantizer is None or self.text is not None):
            raise GenError("a decoder of another tokenizer's codes is TiTok's, with a quantizer and without text")
        if self.pixels is not None and (self.pixels.factor, self.pixels.image) != (self.painted, self.image):
            raise GenError(
                f"the decoder paints {self.image} in patches of {self.painted}, its 2D tokenizer {self.pixels.image} "
                f"in codes of {self.pixels.factor} pixels; make them equal"
            )

    @property
    def painted(self) -> int:
        """Side of the decoder's patches."""
        return self.patch if self.decoder_patch is None else self.decoder_patch

    def grid(self, patch: int) -> tuple[int, int]:
        """Patches of a side along height and width."""
        return self.image[0] // patch, self.image[1] // patch

    @property
    def width(self) -> int:
        """Channels of a latent token or code."""
        return (self.channels or 0) if self.quantizer is None else int(self.quantizer.width)

    @property
    def spec(self) -> TokenizerSpec:
        """Continuous latents (tokens, channels), token ids (tokens,), or bits (tokens, width)."""
        text = {} if self.text is None else {"text": Condition(self.text)}
        if self.quantizer is None:
            return TokenizerSpec("continuous", (self.tokens, self.width), self.image, conditions=text)
        kind = self.quantizer.kind
        shape = (self.tokens,) if kind == "tokens" else (self.tokens, self.width)
        return TokenizerSpec(kind, shape, self.image, self.quantizer.vocabulary, self.width, conditions=text)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "conv_out/kernel" if self.pixels is None else "pixel_decoder/conv_out/kernel"

    def build(self, rngs: nnx.Rngs) -> "TiTok":
        """Gives the module with freshly drawn parameters."""
        return TiTok(self, rngs=rngs)

    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Gaussian | Quantized:
        """images (B, H, W, C) float in [-1, 1] -> posterior over latents, or ids, of its latent tokens.

        `keys` (B,) choose what a quantizer draws while it trains.
        """
        del cond
        return Network(self).apply(params, images, keys, method="encode")

    def embed(self, params: Params, ids: jax.Array) -> jax.Array:
        """Code vectors (B, tokens, width) of ids."""
        return Network(self).module(params).quantizer.embed(ids)

    def snap(self, params: Params, codes: jax.Array) -> Quantized:
        """Gives the nearest codes of vectors (B, tokens, width)."""
        return Network(self).apply(params, codes, method="snap")

    def decode(
        self,
        params: Params,
        codes: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Any = None,
    ) -> jax.Array:
        """Latents or codes (B, tokens, width), and cond["text"] where it reads one -> images, about [-1, 1].

        Raises GenError without the text that it reads.
        """
        del keys, options
        text = None if self.text is None else (cond or {}).get("text")
        if self.text is not None and text is None:
            raise GenError(f"this decoder reads a caption: give its features, (B, {self.text[0]}, {self.text[1]})")
        return Network(self).apply(params, codes, text, method="decode")

    def logits(self, params: Params, codes: jax.Array) -> jax.Array:
        """Codes (B, tokens, width) -> logits (B, h, w, n) of the codes of the 2D tokenizer `pixels`.

        Raises GenError for a tokenizer that paints pixels.
        """
        if self.pixels is None:
            raise GenError("this decoder paints pixels; only the two-stage TiTok names a 2D tokenizer's codes")
        return Network(self).apply(params, codes, method="logits")


class Block(nnx.Module):
    """Pre-norm attention and exact-GELU MLP, both norms affine with eps 1e-5."""

    def __init__(self, tower: Tower, *, init: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)
        self.attn = Attention(tower.width, tower.heads, proj_init=init, dtype=dtype, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)
        self.mlp = MLP(tower.width, 4 * tower.width, approximate=False, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Trunk(nnx.Module):
    """What both towers share: position tables, norms and blocks over [class, patches, latents, text]."""

    def __init__(self, config: TiTokConfig, tower: Tower, patch: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        rows, columns = config.grid(patch)
        self.class_embedding = _table(1, tower.width, rngs)
        self.positions = _table(rows * columns + 1, tower.width, rngs)  # row 0 belongs to the class token
        self.latent_positions = _table(config.tokens, tower.width, rngs)
        self.ln_pre = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)
        make, init = Block, _INITS[config.init]
        self.blocks = stack(lambda r: make(tower, init=init, dtype=config.dtype, rngs=r), tower.depth, rngs)
        self.ln_post = nnx.LayerNorm(tower.width, epsilon=1e-5, rngs=rngs)

    def joined(self, patches: jax.Array, latents: jax.Array, text: tuple[jax.Array, ...] = ()) -> jax.Array:
        """(B, N, W) patches, (B, K, W) latents and (B, T, W) text, embedded -> (B, 1 + N + K + T, W) after `ln_pre`."""
        head = jnp.broadcast_to(self.class_embedding[...], (patches.shape[0], 1, patches.shape[2]))
        grid = jnp.concatenate([head, patches], axis=1) + self.positions[...]
        return self.ln_pre(jnp.concatenate([grid, latents + self.latent_positions[...], *text], axis=1))

    def __call__(self, patches: jax.Array, latents: jax.Array, text: tuple[jax.Array, ...] = ()) -> jax.Array:
        """Gives the sequence of `joined` after all blocks, before `ln_post`."""
        config, x = self.config, constrain(self.joined(patches, latents, text))

        def call(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x)), None

        return run_stack(self.blocks, x, call, remat=config.remat, scan=config.scan).x


class Namer(nnx.Module):
    """Linear -> tanh -> Linear: logits of the codes of a 2D tokenizer."""

    def __init__(self, width: int, codes: int, *, init: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(width, 2 * width, init=init, dtype=dtype, rngs=rngs)
        self.fc2 = linear(2 * width, codes, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jnp.tanh(self.fc1(x)))


class TiTok(nnx.Module):
    """The two towers of a `TiTokConfig`. Images are [0, 1] inside, as in the published models."""

    def __init__(self, config: TiTokConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        enc, dec, dtype, init = config.encoder, config.decoder, config.dtype, _INITS[config.init]
        channels, width = config.image[2], config.width
        self.latent_tokens = _table(config.tokens, enc.width, rngs)
        self.patch_embed = linear(config.patch**2 * channels, enc.width, init=init, dtype=dtype, rngs=rngs)
        self.encoder = Trunk(config, enc, config.patch, rngs=rngs)
        self.encoder_out = linear(enc.width, width if config.quantizer else 2 * width, init=init, rngs=rngs)
        self.decoder_embed = linear(width, dec.width, init=init, dtype=dtype, rngs=rngs)
        self.mask_token = _table(1, dec.width, rngs)
        self.decoder = Trunk(config, dec, config.painted, rngs=rngs)
        if config.pixels is None:
            self.head: Any = linear(dec.width, config.painted**2 * channels, init=init, dtype=dtype, rngs=rngs)
            filters = _dirac if config.init == "xavier" else init
            self.conv_out = nnx.Conv(channels, channels, (3, 3), kernel_init=filters, rngs=rngs)
        else:
            codes, inner = config.pixels.quantizer.vocabulary, config.pixels.quantizer.width
            self.head = Namer(dec.width, codes, init=init, dtype=dtype, rngs=rngs)
            self.pixel_codes = nnx.Param(jax.random.normal(rngs.params(), (codes, inner)) * inner**-0.5)
            self.pixel_decoder = Decoder(config.pixels, rngs)
        if config.quantizer is not None:
            self.quantizer = config.quantizer.build(rngs)
        if config.text is not None:
            self.text_embed = linear(config.text[1], dec.width, init=init, dtype=dtype, rngs=rngs)
            self.text_positions = _table(config.text[0], dec.width, rngs)

    def latents(self, images: jax.Array) -> jax.Array:
        """(B, H, W, C) in [-1, 1] -> (B, K, width), or twice as wide for a posterior: what is quantised."""
        config = self.config
        _expect("images", images, config.image)
        patches = self.patch_embed(patchify(0.5 * (images + 1.0), config.patch))
        tokens = jnp.broadcast_to(self.latent_tokens[...], (images.shape[0], *self.latent_tokens.shape))
        x = self.encoder.ln_post(self.encoder(patches, tokens)[:, -config.tokens :])
        if config.pixels is not None:
            x = x.reshape(x.shape[0], x.shape[2], x.shape[1]).swapaxes(1, 2)
        return self.encoder_out(x)

    def encode(self, images: jax.Array, keys: jax.Array | None = None) -> Gaussian | Quantized:
        """(B, H, W, C) in [-1, 1] -> Gaussian over (B, K, channels), or the ids of K codes."""
        latents = self.latents(images)
        if self.config.quantizer is not None:
            return self.snap(latents, keys)
        mean, logvar = jnp.split(latents, 2, axis=-1)
        return Gaussian(mean, logvar)

    def snap(self, codes: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the nearest codes of vectors (B, K, width)."""
        return within("quantizer", self.quantizer(codes, keys))

    def painted(self, codes: jax.Array, text: jax.Array | None = None) -> jax.Array:
        """Gives the mask tokens (B, h w, W) after the decoder's last norm."""
        config = self.config
        _expect("codes", codes, (config.tokens, config.width))
        rows, columns = config.grid(config.painted)
        masks = jnp.broadcast_to(self.mask_token[...], (codes.shape[0], rows * columns, config.decoder.width))
        beside = () if text is None else (self.text_embed(text) + self.text_positions[...],)
        return self.decoder.ln_post(self.decoder(masks, self.decoder_embed(codes), beside)[:, 1 : 1 + rows * columns])

    def logits(self, codes: jax.Array) -> jax.Array:
        """(B, K, width) -> (B, h, w, n) of the n codes of the 2D tokenizer, float32."""
        logits = self.head(self.painted(codes)).astype(jnp.float32)
        return logits.reshape(len(codes), *self.config.grid(self.config.painted), -1)

    def mixed(self, logits: jax.Array) -> jax.Array:
        """(B, h, w, n) -> the mean code (B, h, w, width of the 2D tokenizer's codes) under their softmax."""
        return jax.nn.softmax(logits, axis=-1) @ self.pixel_codes[...]

    def decode(self, codes: jax.Array, text: jax.Array | None = None) -> jax.Array:
        """(B, K, width) -> (B, H, W, C), about [-1, 1]."""
        config = self.config
        if config.pixels is not None:
            return 2.0 * self.pixel_decoder(self.mixed(self.logits(codes))) - 1.0
        x = unpatchify(self.head(self.painted(codes, text)), config.image[:2], config.painted)
        return 2.0 * self.conv_out(x.astype(jnp.float32)) - 1.0


def _expect(name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise GenError(f"{name} are {x.shape}; this tokenizer takes (B, {', '.join(map(str, shape))})")


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * width**-0.5)


def _dirac(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
    """The identity as a convolution: the head paints unfiltered patches until training says otherwise."""
    del key, out_sharding
    return jnp.zeros(shape, dtype).at[shape[0] // 2, shape[1] // 2].set(jnp.eye(shape[2], shape[3], dtype=dtype))


_INITS = {"xavier": nnx.initializers.xavier_uniform(), "normal": nnx.initializers.normal(0.02)}
