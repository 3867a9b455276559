"""FlexTok: an ordered sequence of tokens, of which any first few decode to an image (arXiv 2502.13967).

Bachmann et al. 2025. A transformer reads the patches of an autoencoder's latents into registers, which FSQ turns into
tokens. In training the decoder sees the first k tokens only, k drawn for each image (nested dropout): the first tokens
come to say what an image shows, the later ones add detail, and a rectified flow fills in what the given tokens leave
open (`gen.tokenizers.flextok_decoder`).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.config import check_choices, suggest
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.nn.conditions import Condition
from gen.nn.layers import Remat, layer_norm, linear, patchify, run_stack, stack
from gen.nn.network import Cond, Network, Params
from gen.sampling.generator import Sampler
from gen.sampling.grids import Uniform
from gen.sampling.guidance import AdaptiveProjected, ClassifierFree
from gen.sampling.solvers import Euler
from gen.tokenizers.base import Gaussian, Quantized, TokenizerSpec
from gen.tokenizers.flextok_decoder import FlowDecoderConfig
from gen.tokenizers.flextok_layers import EPS, Block, GridPositions, Positions, learned
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.trunk import Tower
from gen.training.sharding import constrain

__all__ = ["PREVIEW", "SIZES", "FlexTok", "FlexTokConfig", "Pixels", "euler_apg", "flextok"]

# one call of the decoder from pure noise: about the mean of the images that the tokens allow, at 1 / 50 of the cost
PREVIEW = Sampler(Euler(), Uniform(), 1, ClassifierFree())


def euler_apg(scale: float = 7.5, norm: float = 2.5, steps: int = 25) -> Sampler:
    """Gives the official decoder: Euler's method on equal steps, guided by APG on the velocity.

    Args:
      scale: of the guidance; 1 for none.
      norm: the length to which guidance is cut; the official one is for latents of 32 x 32 x 16, of whose square root
        it is a share.
      steps: 25 in the published pipeline, 20 in its examples.
    """
    return Sampler(Euler(), Uniform(), steps, AdaptiveProjected(scale, norm=norm, momentum=-0.5, space="velocity"))


@dataclasses.dataclass(frozen=True)
class Pixels:
    """No first stage: the transformers work on the pixels of (H, W, C) images."""

    image: tuple[int, int, int]

    @property
    def spec(self) -> TokenizerSpec:
        """Gives the image itself."""
        return TokenizerSpec("continuous", self.image, self.image)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Gives a module without parameters."""
        del rngs
        return nnx.Module()

    def encode(self, params: Params, images: jax.Array) -> Gaussian:
        """Gives the images, known exactly."""
        del params
        return Gaussian(images, jnp.full_like(images, -30.0))

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Gives the latents."""
        del params
        return latents


@dataclasses.dataclass(frozen=True)
class FlexTokConfig:
    """A FlexTok; itself the `gen.tokenizers.base.DiscreteTokenizer`. The defaults are the published d18-d28.

    Attributes:
      first: the frozen first stage, whose latents are tokenized: a KL autoencoder, or the pixels themselves.
      scaling: factor on its latents before the transformers see them.
      patch: side of a square patch of latents.
      tokens: number of tokens N.
      encoder, decoder: sizes of the two transformers; their gated MLPs are 8 / 3 as wide.
      quantizer: what turns registers into tokens.
      positions: of the patches: learned rows plus columns, rows times columns, or a fixed table of sines.
      length: rows and columns for which positions are learned.
      stretch: spread the learned positions over the grid of patches, for images larger than those trained on; without
        it the grid takes the first ones.
      frequencies: features of the sinusoid of the decoder's time.
      max_time: the official unit of that time: its sinusoid turns by up to 1000 / max_time radians. The published code
        has both 1000 (its default) and 1.
      decoding: how the decoder is sampled where no options are given.
      dtype: compute type of the matrix products.
      remat, scan: see `gen.nn.layers.run_stack`.

    Raises GenError where the numbers do not fit together.
    """

    first: Pixels | KLVAEConfig = KLVAEConfig(channels=16, inner=16)
    scaling: float = 1.0
    patch: int = 2
    tokens: int = 256
    encoder: Tower = Tower(1152, 18, 18)
    decoder: Tower = Tower(1792, 28, 28)
    quantizer: FSQ = FSQ()
    positions: Positions = "sum"
    length: int = 16
    stretch: bool = False
    frequencies: int = 256
    max_time: float = 1000.0
    decoding: Sampler = euler_apg()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "dots"
    scan: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        h, w, _ = self.first.spec.shape
        if self.tokens < 1 or h % self.patch or w % self.patch:
            raise GenError(
                f"{self.tokens} tokens of latents {h}x{w} in patches of {self.patch}; expected at least one token, and "
                "a patch that divides the latents"
            )
        if max(self.grid) > self.length and not self.stretch and self.positions != "sincos":
            raise GenError(
                f"{self.grid[0]}x{self.grid[1]} patches, and positions for {self.length} rows and columns; use smaller "
                "images, or stretch the positions (stretch)"
            )
        for name, tower in (("encoder", self.encoder), ("decoder", self.decoder)):
            if tower.width % tower.heads or (self.positions == "sincos" and tower.width % 4):
                raise GenError(f"{name} width {tower.width} does not divide into {tower.heads} heads; change one")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.first.spec.shape[0] // self.patch, self.first.spec.shape[1] // self.patch

    @property
    def spec(self) -> TokenizerSpec:
        """Tokens (N,); the decoder's condition "keep" is how many of them are used, all by default."""
        keep = Condition((), "int32", default=float(self.tokens))
        quantizer, image = self.quantizer, self.first.spec.image
        return TokenizerSpec(
            "tokens", (self.tokens,), image, quantizer.vocabulary, quantizer.width, conditions={"keep": keep}
        )

    @property
    def last_layer(self) -> str:
        """Does what `gen.tokenizers.base.Tokenizer` says."""
        return "decoder/final/kernel"

    @property
    def flow(self) -> Denoiser:
        """Gives the decoder as a denoiser of scaled latents; its parameters are those under "decoder"."""
        h, w, channels = self.first.spec.shape
        clock = Predict("velocity", scale=1000.0 / self.max_time)
        return Denoiser(FlowDecoderConfig((h, w), channels, self), Linear(), clock)

    def build(self, rngs: nnx.Rngs) -> "FlexTok":
        """Gives the module with freshly drawn parameters."""
        return FlexTok(self, rngs)

    def latents(self, params: Params, images: jax.Array) -> jax.Array:
        """images (B, H, W, C) float in [-1, 1] -> scaled latents (B, h, w, channels), the first stage's mode.

        The official code draws from the first stage instead, and gives slightly different tokens every time.

        Raises GenError for images of another shape.
        """
        if images.shape[1:] != self.first.spec.image:
            raise GenError(f"images are {images.shape[1:]}; this FlexTok takes {self.first.spec.image}")
        return self.scaling * self.first.encode(params.get("first", {}), images).mode()

    def read(self, params: Params, latents: jax.Array, keys: jax.Array | None = None) -> Quantized:
        """Gives the tokens of scaled latents; `keys` (B,) are for what the quantizer draws in training."""
        return Network(self).apply(params, latents, keys, method="read")

    def encode(
        self, params: Params, images: jax.Array, *, cond: Cond | None = None, keys: jax.Array | None = None
    ) -> Quantized:
        """images (B, H, W, C) float in [-1, 1] -> tokens (B, N) and their codes (B, N, width)."""
        del cond, keys
        return self.read(params, self.latents(params, images))

    def embed(self, params: Params, ids: jax.Array) -> jax.Array:
        """Codes (B, N, width) of tokens (B, N). Those beyond "keep" may be anything."""
        return Network(self).apply(params, ids, method="embed")

    def snap(self, params: Params, codes: jax.Array) -> Quantized:
        """Gives the nearest codes of vectors (B, N, width)."""
        return Network(self).apply(params, codes, method="snap")

    def decode(
        self,
        params: Params,
        codes: jax.Array,
        *,
        cond: Cond | None = None,
        keys: jax.Array | None = None,
        options: Sampler | None = None,
    ) -> jax.Array:
        """Images (B, H, W, C) float32, about [-1, 1], unclipped.

        Args:
          codes: (B, N, width).
          cond: "keep" (B,) int32, how many of its tokens each image uses: an array, so that another number compiles
            nothing. 0 or less uses none, N or more all; all without it.
          keys: (B,) typed keys, from which the noise is drawn.
          options: how the decoder is sampled (`euler_apg`, `PREVIEW`); None for the configuration's own.

        Raises GenError without keys.
        """
        if keys is None:
            raise GenError("FlexTok's decoder starts from noise; give it keys, one for each image")
        keep = jnp.full(len(codes), self.tokens) if cond is None or "keep" not in cond else cond["keep"]
        flow, sampler = self.flow, options or self.decoding
        registers = flow.net.apply(params["decoder"], codes, keep, method="condition")
        latents = sampler(flow, params["decoder"], keys, flow.network.shape, registers)
        return self.first.decode(params.get("first", {}), latents / self.scaling)


# name -> (depth of the encoder, of the decoder); the width is 64 for each layer, the size of a head
SIZES: dict[str, tuple[int, int]] = {"d12-d12": (12, 12), "d18-d18": (18, 18), "d18-d28": (18, 28)}


def flextok(name: str, **changes: Any) -> FlexTokConfig:
    """Gives a published size by name (`SIZES`). Raises GenError for an unknown name."""
    if name not in SIZES:
        raise GenError(f"unknown FlexTok size '{name}'; {suggest(name, SIZES)}")
    encoder, decoder = (Tower(64 * depth, depth, depth) for depth in SIZES[name])
    return dataclasses.replace(FlexTokConfig(encoder=encoder, decoder=decoder), **changes)


class Encoder(nnx.Module):
    """Latents -> registers: a transformer over patches and registers, in which the k-th register sees those before it.

    Every token sees all patches; patches see no register. A register therefore depends on the image and on earlier
    registers alone.
    """

    def __init__(self, config: FlexTokConfig, rngs: nnx.Rngs) -> None:
        self.config, tower, dtype = config, config.encoder, jnp.dtype(config.dtype)
        values = config.patch**2 * config.first.spec.shape[2]
        self.patch = linear(values, tower.width, dtype=dtype, rngs=rngs)
        self.positions = GridPositions(config.positions, tower.width, config.length, config.grid, rngs)
        self.registers = learned(rngs, config.tokens, tower.width)
        self.blocks = stack(lambda r: Block(tower.width, tower.heads, dtype=dtype, rngs=r), tower.depth, rngs)
        zeros = nnx.initializers.zeros_init()
        self.out = linear(tower.width, config.quantizer.width, dtype=dtype, rngs=rngs, init=zeros)

    def mask(self) -> np.ndarray:
        """(P + N, P + N) bool: which of the P patches and N registers (second axis) each of them sees (first axis)."""
        patches, tokens = self.config.grid[0] * self.config.grid[1], self.config.tokens
        seen = np.zeros((patches + tokens, patches + tokens), bool)
        seen[:, :patches] = True
        seen[patches:, patches:] = np.tri(tokens, dtype=bool)
        return seen

    def start(self, latents: jax.Array) -> jax.Array:
        """Latents (B, h, w, channels) as patches with positions, then the registers: (B, P + N, D) float32."""
        config = self.config
        patches = self.patch(patchify(latents, config.patch)).astype(jnp.float32)
        patches = patches + self.positions(config.grid, stretch=config.stretch)
        registers = jnp.broadcast_to(self.registers[...], (len(patches), *self.registers.shape))
        return jnp.concatenate([patches, registers], axis=1)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """Scaled latents (B, h, w, channels) -> (B, N, width) float32, before they are quantised."""
        mask = jnp.asarray(self.mask())
        x, _, _ = run_stack(
            self.blocks,
            constrain(self.start(latents)),
            lambda block, x, _: (constrain(block(x, mask)), None),
            remat=self.config.remat,
            scan=self.config.scan,
        )
        return self.out(layer_norm(x[:, -self.config.tokens :], EPS)).astype(jnp.float32)


class FlexTok(nnx.Module):
    """The networks of a `FlexTokConfig`: the first stage, encoder and decoder."""

    def __init__(self, config: FlexTokConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.first = config.first.build(rngs)
        self.encoder = Encoder(config, rngs)
        self.quantizer = config.quantizer.build(rngs)
        self.decoder = config.flow.network.build(rngs)

    def read(self, latents: jax.Array, keys: jax.Array | None) -> Quantized:
        """Does what `FlexTokConfig` says."""
        return self.quantizer(self.encoder(latents), keys)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Does what `FlexTokConfig` says."""
        return self.quantizer.embed(ids)

    def snap(self, codes: jax.Array) -> Quantized:
        """Does what `FlexTokConfig` says."""
        return self.quantizer.snap(codes)
