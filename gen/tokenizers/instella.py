"""Instella's 1D tokenizer: an image as a few tokens, each a vector of bits.

Instella-T2I, arXiv 2506.21022. A transformer reads learned latent tokens together with image patches and keeps the
former, whose bits are drawn by a `gen.tokenizers.quantizers.binary.Binary`; another one reads codes together with mask
tokens and paints the patches. In the middle of each the image part changes its resolution by two. The same bits can be
decoded at any size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.nn.convolution import convolution
from gen.nn.layers import Remat, linear, patchify, run_stack, stack, unpatchify
from gen.nn.network import Cond, Network, Params
from gen.nn.vit import ViTBlock, normed
from gen.tokenizers.base import TokenizerSpec
from gen.tokenizers.discrete import Discrete, DiscreteModule
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.trunk import Tower
from gen.training.sharding import constrain

__all__ = ["DecodedSize", "Instella", "InstellaConfig", "positions", "rotate"]


@dataclasses.dataclass(frozen=True)
class DecodedSize:
    """Options of `InstellaConfig.decode`: another size of the images than the tokenizer's.

    Attributes:
      height, width: in pixels.
    """

    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class InstellaConfig(Discrete):
    """A 1D tokenizer of bits; itself the `gen.tokenizers.base.DiscreteTokenizer`. The defaults are published.

    Attributes:
      image: (H, W, C) of the images it is used on.
      patch: side of a square patch in pixels.
      tokens: number of latent tokens.
      encoder, decoder: sizes of the two towers, whose MLPs are gated and four times as wide.
      halve_after: indices of the encoder's blocks after which the image part is halved along each side.
      double_after: the same of the decoder, where it is doubled.
      axes: channels of each head that are turned by the index of a latent token, the row and the column of a patch.
      span: side in pixels of the images whose positions images of every size share; None for each patch's own number.
      quantizer: of the bits of a token.
      aligned_width: channels of a head on the decoder's image part that training aligns to a frozen encoder, or 0.
      aligned_after: index of the decoder's block whose output the head reads.
      dtype: compute type of the matrix products.
      remat: what the backward pass recomputes (see `gen.nn.layers.run_stack`).
      scan: one scan over depth, or unrolled layers (faster on CPU for a few of them).

    Raises GenError where the numbers do not fit together.
    """

    image: tuple[int, int, int] = (512, 512, 3)
    patch: int = 16
    tokens: int = 128
    encoder: Tower = Tower(768, 12, 12)
    decoder: Tower = Tower(1024, 16, 16)
    halve_after: tuple[int, ...] = (7,)
    double_after: tuple[int, ...] = (7,)
    axes: tuple[int, int, int] = (8, 28, 28)
    span: int | None = 1024
    quantizer: Binary = Binary(64, temperature=0.1)
    aligned_width: int = 0
    aligned_after: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan: bool = True

    def __post_init__(self) -> None:
        self.check_size(self.image[0], self.image[1])
        for name, tower, after in (
            ("encoder", self.encoder, self.halve_after),
            ("decoder", self.decoder, self.double_after),
        ):
            if (
                tower.width % tower.heads
                or tower.width // tower.heads != sum(self.axes)
                or any(a % 2 for a in self.axes)
            ):
                raise GenError(
                    f"{name} heads of {tower.width} / {tower.heads} channels are not turned by axes {self.axes}, even "
                    "numbers that add up to a head's channels; change one of them"
                )
            if not all(0 <= i < tower.depth for i in after) or list(after) != sorted(set(after)):
                raise GenError(f"the {name} has blocks 0 to {tower.depth - 1}; {after} are not some of them in order")
        if self.aligned_width and not 0 <= self.aligned_after < self.decoder.depth:
            raise GenError(f"the decoder has no block {self.aligned_after}, which the aligned head is to read")

    def check_size(self, height: int, width: int) -> None:
        """Raises GenError for images that do not divide into patches, or the patches not into halves."""
        unit = self.patch * 2 ** max(len(self.halve_after), len(self.double_after))
        if height % unit or width % unit:
            raise GenError(f"images of {height}x{width}; this tokenizer takes sides that are multiples of {unit}")

    @property
    def spec(self) -> TokenizerSpec:
        """Bits (tokens, bits of a token)."""
        shape = (self.tokens, self.quantizer.width)
        return TokenizerSpec("bits", shape, self.image, width=self.quantizer.width)

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "to_pixel/kernel"

    def build(self, rngs: nnx.Rngs) -> "Instella":
        """Gives the module with freshly drawn parameters."""
        return Instella(self, rngs)

    def decode(
        self,
        params: Params,
        codes: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: DecodedSize | None = None,
    ) -> jax.Array:
        """codes (B, tokens, bits) -> images (B, H, W, C) float32, about [-1, 1], unclipped; `options` say the size."""
        del cond, keys
        size = self.image[:2] if options is None else (options.height, options.width)
        self.check_size(*size)
        return Network(self).apply(params, codes, size, method="decode")


def positions(
    tokens: int, grid: Sequence[int], axes: tuple[int, int, int], span: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles of latent tokens and then patches, each (tokens + patches, sum(axes)) float32.

    An axis of d channels has d / 2 frequencies 10000^(-2k / d), each for two neighbouring channels. The index of a
    latent token turns the first axis; the row r and the column of a patch the second and the third, or, where all
    sizes share `span` positions, r (span - 1) / (H - 1) and so on.
    """
    sides = [np.arange(n, dtype=np.float64) * (1.0 if span is None else (span - 1) / max(n - 1, 1)) for n in grid]
    rows, columns = (a.reshape(-1) for a in np.meshgrid(*sides, indexing="ij"))
    ids = np.zeros((tokens + rows.size, 3))
    ids[:tokens, 0], ids[tokens:, 1], ids[tokens:, 2] = np.arange(tokens), rows, columns
    parts = [np.repeat(10000.0 ** (-2.0 * np.arange(d // 2) / d), 2) * ids[:, i : i + 1] for i, d in enumerate(axes)]
    angles = np.concatenate(parts, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: jax.Array, cos: Any, sin: Any) -> jax.Array:
    """x cos + [-b, a] sin with [a, b] the halves of x (B, N, H, D); cos and sin (N, D); float32.

    Angles come in neighbouring pairs and channels are turned in halves, so that this is no rotation: the published
    weights were trained with it.
    """
    x = x.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    return x * jnp.asarray(cos)[:, None] + jnp.concatenate([-second, first], -1) * jnp.asarray(sin)[:, None]


class Halve(nnx.Module):
    """(B, h, w, D) -> (B, h/2, w/2, D): a 3x3 convolution of stride 2, plus means of 2x2."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.conv = _conv(width, width, 2, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, d = x.shape
        return self.conv(x) + x.reshape(b, h // 2, 2, w // 2, 2, d).mean(axis=(2, 4))


class Double(nnx.Module):
    """(B, h, w, D) -> (B, 2h, 2w, D): a 3x3 convolution to four times the channels spread over 2x2, plus copies."""

    def __init__(self, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.conv = _conv(width, 4 * width, 1, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, d = x.shape
        spread = self.conv(x).reshape(b, h, w, d, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, d)
        return spread + x.repeat(2, axis=1).repeat(2, axis=2)


def _conv(inputs: int, outputs: int, stride: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Conv:
    def apply(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return convolution(x, kernel, stride=stride, padding=1)

    return nnx.Conv(inputs, outputs, (3, 3), dtype=dtype, conv_general_dilated=apply, rngs=rngs)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=1e-6, rngs=rngs)


class Trunk(nnx.Module):
    """The blocks of a tower over latent tokens and patches, with the image part resized after some of them."""

    def __init__(
        self, config: InstellaConfig, tower: Tower, resizes: type, after: tuple[int, ...], rngs: nnx.Rngs
    ) -> None:
        self.config, self.after, self.depth = config, after, tower.depth
        dtype = jnp.dtype(config.dtype)

        def block(rngs: nnx.Rngs) -> ViTBlock:
            hidden = 4 * tower.width
            return ViTBlock(
                tower.width,
                tower.heads,
                hidden,
                feedforward="swiglu",
                norm="rms",
                bias=False,
                qk_norm=True,
                dtype=dtype,
                rngs=rngs,
            )

        self.blocks = stack(block, tower.depth, rngs)
        self.resize = nnx.Dict({f"after{i}": resizes(tower.width, dtype, rngs) for i in after})

    def __call__(
        self, latent: jax.Array, image: jax.Array, span: float | None, tap: int | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(latent tokens (B, K, D), image part (B, h, w, D), image part after block `tap`, a sequence)."""
        config, tapped, start = self.config, None, 0
        for end in sorted({*(i + 1 for i in self.after), *(() if tap is None else (tap + 1,)), self.depth}):
            b, h, w, d = image.shape
            k = latent.shape[1]
            call = _turned(positions(k, (h, w), config.axes, span))
            x = jnp.concatenate([latent, image.reshape(b, h * w, d)], axis=1)
            x = run_stack(self.blocks, x, call, remat=config.remat, scan=config.scan, start=start, stop=end).x
            latent, image, start = x[:, :k], x[:, k:].reshape(b, h, w, d), end
            if end - 1 == tap:
                tapped = x[:, k:]
            if end - 1 in self.after:
                before, image = h, self.resize[f"after{end - 1}"](image)
                span = None if span is None else (span // 2 if image.shape[1] < before else span * 2)
        return latent, image, tapped


def _turned(angles: tuple[np.ndarray, np.ndarray]) -> Callable[[Any, jax.Array, Any], tuple[jax.Array, None]]:
    def call(block: Any, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return constrain(block(x, lambda y: rotate(y, *angles))), None

    return call


class Encoder(nnx.Module):
    """Images (B, H, W, C) -> latent tokens (B, tokens, width)."""

    def __init__(self, config: InstellaConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.encoder.width, jnp.dtype(config.dtype)
        self.config = config
        self.patch_embed = linear(config.patch**2 * config.image[2], width, dtype=dtype, rngs=rngs)
        self.latent_tokens = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.tokens, width)))
        self.trunk = Trunk(config, config.encoder, Halve, config.halve_after, rngs)
        self.norm_out = _norm(width, rngs)
        self.proj_out = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        config, (b, h, w, _) = self.config, images.shape
        x = self.patch_embed(patchify(images, config.patch))
        grid = x.reshape(b, h // config.patch, w // config.patch, -1)
        latent = jnp.broadcast_to(self.latent_tokens[...], (b, *self.latent_tokens.shape)).astype(x.dtype)
        span = None if config.span is None else config.span / config.patch
        return self.proj_out(self.norm_out(self.trunk(latent, grid, span)[0]))


class Decoder(nnx.Module):
    """Latent tokens (B, tokens, width of the encoder) -> the decoder's image part (B, h, w, width)."""

    def __init__(self, config: InstellaConfig, rngs: nnx.Rngs) -> None:
        width, dtype = config.decoder.width, jnp.dtype(config.dtype)
        self.config = config
        self.norm_in = _norm(config.encoder.width, rngs)
        self.proj_in = linear(config.encoder.width, width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.trunk = Trunk(config, config.decoder, Double, config.double_after, rngs)
        self.norm_out = _norm(width, rngs)
        if config.aligned_width:
            self.align_in = linear(width, width, dtype=dtype, rngs=rngs)
            self.align_norm = normed("layer", width, 1e-5, rngs)
            self.align_out = linear(width, config.aligned_width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, size: tuple[int, int], tap: int | None = None) -> tuple[Any, Any]:
        """(normed image part, image part after block `tap`)."""
        config = self.config
        latent = self.proj_in(self.norm_in(tokens))
        factor = 2 ** len(config.double_after)
        h, w = (side // (config.patch * factor) for side in size)
        grid = jnp.broadcast_to(self.mask_token[...], (len(latent), h, w, config.decoder.width)).astype(latent.dtype)
        span = None if config.span is None else config.span / config.patch
        if span is not None and factor > 1:
            span //= factor  # the published code rounds down
        _, image, tapped = self.trunk(latent, grid, span, tap)
        return self.norm_out(image), tapped

    def align(self, tapped: jax.Array) -> jax.Array:
        """Gives the head that training aligns: Linear, LayerNorm, ReLU, Linear."""
        return self.align_out(jax.nn.relu(self.align_norm(self.align_in(tapped))))


class Instella(DiscreteModule):
    """The network of an `InstellaConfig`."""

    def __init__(self, config: InstellaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, bits = config.encoder.width, config.quantizer.width
        self.encoder = Encoder(config, rngs)
        self.to_bits = linear(width, bits, rngs=rngs)
        self.quantizer = config.quantizer.build(rngs)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (bits, width)))
        self.decoder = Decoder(config, rngs)
        self.to_pixel = linear(config.decoder.width, config.patch**2 * config.image[2], rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """images (B, H, W, C) in [-1, 1] of any size that fits -> logits of the bits (B, tokens, bits) float32.

        Raises GenError for images of other channels.
        """
        if images.ndim != 4 or images.shape[3] != self.config.image[2]:
            raise GenError(f"images are {images.shape}; this tokenizer takes (B, H, W, {self.config.image[2]})")
        self.config.check_size(*images.shape[1:3])
        return self.to_bits(self.encoder(images).astype(jnp.float32))

    def pixels(self, codes: jax.Array) -> jax.Array:
        """codes (B, tokens, bits) -> images (B, H, W, C) float32 of the tokenizer's size."""
        return self.decode(codes, self.config.image[:2])

    def decode(self, codes: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """codes (B, tokens, bits) -> images (B, *size, C) float32."""
        size = self.config.image[:2] if size is None else size
        return self._painted(self.decoder(self.embedded(codes), size)[0], size)

    def decode_aligned(self, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images, and the features (B, patches after that block, aligned_width) that training aligns."""
        size = self.config.image[:2]
        image, tapped = self.decoder(self.embedded(codes), size, self.config.aligned_after)
        return self._painted(image, size), self.decoder.align(tapped)

    def embedded(self, codes: jax.Array) -> jax.Array:
        """codes (B, tokens, bits) as the decoder's tokens (B, tokens, width of the encoder)."""
        return codes @ self.embedding[...]

    def _painted(self, image: jax.Array, size: tuple[int, int]) -> jax.Array:
        tokens = self.to_pixel(image.reshape(len(image), -1, image.shape[-1]))
        return unpatchify(tokens.astype(jnp.float32), size, self.config.patch)
