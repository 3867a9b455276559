"""EDM2's U-Net: every layer keeps the magnitude of its activations, and weights are unit vectors times fixed gains.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), config G.
No biases, no learned norms: activations have unit magnitude on expectation as long as weights do, which training
enforces by normalising the stored weights before every step (`UnitWeight`; eq. 65 and appendix B.4).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gen.config import suggest
from gen.diffusion.backbones.backbone import Call, Output, UNetBackbone, UNetConfig
from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.convolution import convolution
from gen.nn.layers import dropout
from gen.nn.mesh import gathered
from gen.nn.network import Buffer, Cond, Projected
from gen.training.sharding import constrain

__all__ = [
    "SIZES",
    "EDM2Block",
    "EDM2Config",
    "EDM2UNet",
    "Fourier",
    "Layer",
    "MPConv",
    "edm2",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize",
    "pixel_norm",
]

# name -> base channels, table 6 of the paper (appendix A)
SIZES: dict[str, int] = {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}

EPS = 1e-4  # of every normalisation


def normalize(x: jax.Array, axes: int | Sequence[int]) -> jax.Array:
    """Gives x divided by its root mean square over `axes`, computed in float32 (eq. 47): x / (1e-4 + rms)."""
    rms = jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean(axes, keepdims=True))
    return x / (EPS + rms).astype(x.dtype)


def pixel_norm(x: jax.Array) -> jax.Array:
    """`normalize` over the channels (last axis), eq. 30."""
    return normalize(x, -1)


def mp_silu(x: jax.Array) -> jax.Array:
    """Computes silu(x) / 0.596: unit magnitude for normal inputs (eq. 81)."""
    return jax.nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
    """Gives ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), eq. 88."""
    return (a + t * (b - a)) / math.hypot(1.0 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
    """Gives a and b side by side on the last axis, scaled so that b contributes the share t (eq. 103)."""
    na, nb = a.shape[-1], b.shape[-1]
    c = math.sqrt((na + nb) / ((1.0 - t) ** 2 + t**2))
    return jnp.concatenate([c * (1.0 - t) / math.sqrt(na) * a, c * t / math.sqrt(nb) * b], axis=-1)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row of a network's plan.

    Attributes:
      name: its official name, such as "16x16_block0".
      inputs, outputs: channels; `inputs` of a block that takes a skip counts it.
      heads: of attention; 0 for none.
    """

    name: str
    inputs: int
    outputs: int
    heads: int = 0

    @property
    def resample(self) -> str:
        """Tells whether the layer goes down, up or neither."""
        end = self.name.rpartition("_")[2]
        return end if end in ("down", "up") else ""

    @property
    def takes_skip(self) -> bool:
        """Tells whether it is a decoder block that reads an encoder output (where it stands in the decoder)."""
        return "block" in self.name


@dataclasses.dataclass(frozen=True)
class EDM2Config(UNetConfig):
    """An EDM2 U-Net. The defaults are EDM2-S for 512 px latents (64 x 64 x 4).

    Attributes:
      size: height and width of the input; divisible by 2^(levels - 1). The network takes inputs of other sides that
        are, square or not; `attention` is counted from this size.
      channels: of the input.
      num_classes: number of labels, 0 for an unconditional network; the label num_classes stands for none (an
        all-zero class vector). Published networks were trained without label dropout: their guides are networks too.
      widths: channels at each level, finest first (1, 2, 3, 4 times the base width in the paper).
      noise: Fourier features of the noise level (published multiplier ``channel_mult_noise``); 0 for widths[0].
      emb: width of the embedding that conditions the blocks (``channel_mult_emb``); 0 for the widest level's.
      blocks: residual blocks per level.
      attention: sizes of the feature maps that have self-attention.
      head_width: channels per attention head (width // head_width heads); narrower layers have no attention.
      dropout: share of activations dropped in training (where PRNG keys (B,) are given as the condition "dropout").
      label_balance, concat_balance, residual_balance, attention_balance: weights t of `mp_sum` and `mp_cat`.
      clip: activations are clipped to +-clip after every block, for 16-bit types.
      uncertainty: Fourier features of the learned log variance u(sigma), which the network always returns as the
        feature "logvar" (B,); 0 for a network without.
      times: 1, or 2 for flow maps: a second time with its own embedding, added to the first by a learned gain that
        starts at zero, so that a network started from one with a single time gives the same outputs.
      dtype: compute type of the image path; parameters, their normalisation and the embeddings are float32.
      remat: what the backward pass recomputes: nothing, or every block.

    Raises GenError where the numbers do not fit together.
    """

    size: int = 64
    channels: int = 4
    num_classes: int = 1000
    widths: tuple[int, ...] = (192, 384, 576, 768)
    blocks: int = 3
    attention: tuple[int, ...] = (16, 8)
    head_width: int = 64
    noise: int = 0
    emb: int = 0
    dropout: float = 0.0
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float = 256.0
    uncertainty: int = 128
    times: Literal[1, 2] = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        if not self.widths or min(self.size, self.channels, self.blocks, self.head_width, *self.widths) < 1:
            raise GenError("an EDM2 U-Net needs at least one level, block and channel; give positive numbers")
        if self.size % 2 ** (len(self.widths) - 1):
            raise GenError(
                f"size {self.size} cannot be halved {len(self.widths) - 1} times; use one that can, or fewer levels"
            )
        for width in (w for w in self.widths if w > self.head_width and w % (w // self.head_width)):
            raise GenError(
                f"EDM2 width {width} is not divisible by its {width // self.head_width} attention heads; change it or "
                f"head_width {self.head_width}"
            )
        if self.noise < 0 or self.emb < 0:
            raise GenError(f"noise is {self.noise} and emb {self.emb}; expected a width, or 0 for that of the levels")
        if not 0 <= self.dropout < 1:
            raise GenError(f"dropout is {self.dropout}; expected a share in [0, 1)")

    def encoder_plan(self) -> tuple[Layer, ...]:
        """Gives the layers from the input to the lowest resolution; each leaves a skip."""
        rows: list[Layer] = []
        width = self.channels + 1
        for level, outputs in enumerate(self.widths):
            name = f"{self.size >> level}x{self.size >> level}"
            rows.append(Layer(f"{name}_conv", width, outputs) if level == 0 else Layer(f"{name}_down", width, width))
            width = rows[-1].outputs
            for i in range(self.blocks):
                rows.append(Layer(f"{name}_block{i}", width, outputs, self._heads(level)))
                width = outputs
        return tuple(rows)

    def decoder_plan(self) -> tuple[Layer, ...]:
        """Gives the layers from the lowest resolution to the output convolution."""
        skips = [row.outputs for row in self.encoder_plan()]
        rows: list[Layer] = []
        width, last = self.widths[-1], len(self.widths) - 1
        for level, outputs in reversed(list(enumerate(self.widths))):
            name = f"{self.size >> level}x{self.size >> level}"
            if level == last:
                rows.append(Layer(f"{name}_in0", width, width, width // self.head_width))
                rows.append(Layer(f"{name}_in1", width, width))
            else:
                rows.append(Layer(f"{name}_up", width, width))
            for i in range(self.blocks + 1):
                rows.append(Layer(f"{name}_block{i}", width + skips.pop(), outputs, self._heads(level)))
                width = outputs
        return tuple(rows)

    @property
    def embedding(self) -> int:
        """Gives the width of the embedding that conditions the blocks."""
        return self.emb or max(self.widths)

    def _heads(self, level: int) -> int:
        return self.widths[level] // self.head_width if self.size >> level in self.attention else 0

    def build(self, rngs: nnx.Rngs) -> "EDM2UNet":
        """Gives the module with freshly drawn parameters."""
        return EDM2UNet(self, rngs)


def edm2(name: str, *, size: int = 64, channels: int = 4, num_classes: int = 1000, **changes: Any) -> EDM2Config:
    """Gives a published size by name, XXS to XXL; ``channels=3`` for the 64 px pixel models. Dropout 0.1 from M on.

    Raises GenError for an unknown name.
    """
    if name not in SIZES:
        raise GenError(f"unknown EDM2 size '{name}'; {suggest(name, SIZES)}")
    width = SIZES[name]
    widths = tuple(width * m for m in (1, 2, 3, 4))
    config = EDM2Config(size, channels, num_classes, widths, dropout=0.1 if width >= SIZES["M"] else 0.0)
    return dataclasses.replace(config, **changes)


class UnitWeight(Projected):
    """A weight at unit root mean square per output: forced weight normalisation (eq. 66).

    Growing weights would slow learning down.
    """

    @staticmethod
    def project(value: jax.Array) -> jax.Array:
        """Gives the weight (..., outputs) normalised over all other axes."""
        return normalize(value, tuple(range(value.ndim - 1)))


class MPConv(nnx.Module):
    """A convolution (k = 1, 3) or dense layer (k = 0) without bias, whose weights are unit vectors (eq. 47).

    The gradient passes through the normalisation, so it is orthogonal to the stored weights.
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        shape = (size, size, inputs, outputs) if size else (inputs, outputs)
        self.kernel = UnitWeight(jax.random.normal(rngs.params(), shape))

    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        """Maps (B, H, W, inputs) or (B, inputs) -> as many axes, outputs channels, in the compute type."""
        stored = self.kernel[...]
        fan_in = stored.size // stored.shape[-1]
        kernel = UnitWeight.project(stored) * (gain / math.sqrt(fan_in))
        x, kernel = x.astype(self.dtype), gathered(kernel.astype(self.dtype))
        if kernel.ndim == 2:
            return x @ kernel
        if kernel.shape[0] == 1:
            return x @ kernel[0, 0]
        return convolution(x, kernel)


class Fourier(nnx.Module):
    """sqrt(2) cos(t f + phi) with fixed random f ~ 2 pi N(0, 1), phi ~ 2 pi U(0, 1) (eq. 75); (B,) -> (B, width).

    The two tables are buffers: checkpoints hold them, and training leaves them alone.
    """

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.freqs = Buffer(2.0 * math.pi * jax.random.normal(rngs.params(), (width,)))
        self.phases = Buffer(2.0 * math.pi * jax.random.uniform(rngs.params(), (width,)))

    def __call__(self, t: jax.Array) -> jax.Array:
        freqs, phases = (jax.lax.stop_gradient(v[...]) for v in (self.freqs, self.phases))
        return math.sqrt(2.0) * jnp.cos(t.astype(jnp.float32)[:, None] * freqs + phases)


def _resampled(x: jax.Array, how: str) -> jax.Array:
    """Means of 2 x 2 pixels (down), or every pixel repeated (up)."""
    b, h, w, c = x.shape
    if how == "down":
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return x.repeat(2, axis=1).repeat(2, axis=2) if how == "up" else x


class EDM2Block(nnx.Module):
    """A residual block with optional self-attention (figure 21 of the paper).

    Encoder blocks normalise the main path per pixel and project their skip first; decoder blocks project it last.
    """

    def __init__(self, config: EDM2Config, layer: Layer, *, encoder: bool, rngs: nnx.Rngs) -> None:
        self.config, self.layer, self.encoder = config, layer, encoder
        inner = layer.outputs if encoder else layer.inputs
        shared: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.emb_gain = nnx.Param(jnp.zeros(()))
        self.conv_res0 = MPConv(inner, layer.outputs, 3, **shared)
        self.emb_linear = MPConv(config.embedding, layer.outputs, 0, rngs=rngs)
        self.conv_res1 = MPConv(layer.outputs, layer.outputs, 3, **shared)
        self.conv_skip = MPConv(layer.inputs, layer.outputs, 1, **shared) if layer.inputs != layer.outputs else None
        if layer.heads:
            self.attn_qkv = MPConv(layer.outputs, 3 * layer.outputs, 1, **shared)
            self.attn_proj = MPConv(layer.outputs, layer.outputs, 1, **shared)

    def __call__(self, x: jax.Array, emb: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Takes x (B, H, W, inputs) and emb (B, embedding); `keys` (B,) PRNG keys, given in training, for dropout."""
        config = self.config
        x = _resampled(x, self.layer.resample)
        if self.encoder:
            x = pixel_norm(self._skip(x))
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, self.emb_gain[...]) + 1.0
        y = mp_silu(y * c[:, None, None].astype(y.dtype))
        if keys is not None and config.dropout:
            y = dropout(y, config.dropout, keys)
        y = self.conv_res1(y)
        x = mp_sum(x if self.encoder else self._skip(x), y, config.residual_balance)
        if self.layer.heads:
            x = mp_sum(x, self.attn_proj(self._attend(x)), config.attention_balance)
        return jnp.clip(x, -config.clip, config.clip)

    def _skip(self, x: jax.Array) -> jax.Array:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _attend(self, x: jax.Array) -> jax.Array:
        """Cosine attention: q, k and v are normalised per head and position."""
        b, h, w, c = x.shape
        heads = self.layer.heads
        # channels of the projection: head, then channel, then q, k, v
        qkv = normalize(self.attn_qkv(x).reshape(b, h * w, heads, c // heads, 3), 3)
        q, k, v = (qkv[..., i] for i in range(3))
        return attention(q, k, v).reshape(b, h, w, c)


class EDM2UNet(UNetBackbone):
    """The network of an `EDM2Config`. At initialisation the output is exactly 0 (its gain is).

    Its clock is ln(sigma) / 4 under EDM preconditioning. Further condition: ``dropout`` (B,) PRNG keys, in training
    only. Features: outputs of layers, ``enc_64x64_conv``, ``enc_64x64_block0``, ... ``dec_...``: (B, h, w, C); and
    without being asked for, ``logvar`` (B,) float32 where the network learns it.
    """

    title = "EDM2"

    def __init__(self, config: EDM2Config, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, noise, emb = jnp.dtype(config.dtype), config.noise or config.widths[0], config.embedding
        self.emb_fourier = Fourier(noise, rngs)
        self.emb_noise = MPConv(noise, emb, 0, rngs=rngs)
        if config.times == 2:
            self.emb_fourier2 = Fourier(noise, rngs)
            self.emb_noise2 = MPConv(noise, emb, 0, rngs=rngs)
            self.emb_gain2 = nnx.Param(jnp.zeros(()))
        if config.num_classes:
            self.emb_label = MPConv(config.num_classes, emb, 0, rngs=rngs)

        def layer(row: Layer, encoder: bool) -> nnx.Module:
            if row.name.endswith("_conv"):
                return MPConv(row.inputs, row.outputs, 3, dtype=dtype, rngs=rngs)
            return EDM2Block(config, row, encoder=encoder, rngs=rngs)

        self.enc = nnx.Dict({row.name: layer(row, True) for row in config.encoder_plan()})
        self.dec = nnx.Dict({row.name: layer(row, False) for row in config.decoder_plan()})
        self.out_gain = nnx.Param(jnp.zeros(()))
        self.out_conv = MPConv(config.widths[0], config.channels, 3, dtype=dtype, rngs=rngs)
        if config.uncertainty:
            self.logvar_fourier = Fourier(config.uncertainty, rngs)
            self.logvar_linear = MPConv(config.uncertainty, 1, 0, rngs=rngs)

    def features(self) -> list[str]:
        """Gives the layers of encoder and decoder."""
        return [f"{side}_{row.name}" for side, row in self._layers()]

    def embed(self, times: tuple[jax.Array, ...], cond: Cond) -> jax.Array:
        """Gives (B, embedding) float32: noise level and label, summed at equal shares, and a second time by its
        gain.
        """
        config = self.config
        emb = self.emb_noise(self.emb_fourier(times[0]))
        if config.times == 2:
            emb = emb + self.emb_noise2(self.emb_fourier2(times[1]), self.emb_gain2[...])
        if config.num_classes:
            one_hot = jax.nn.one_hot(cond["label"], config.num_classes) * math.sqrt(config.num_classes)
            emb = mp_sum(emb, self.emb_label(one_hot), config.label_balance)
        return mp_silu(emb)

    def forward(self, call: Call) -> Output:
        """Does what `Backbone.forward` says."""
        last = max((i for i, name in enumerate(self.features()) if name in call.taps), default=-1)
        features: dict[str, jax.Array] = {}
        if self.config.uncertainty and not call.stop:
            features["logvar"] = self.logvar_linear(self.logvar_fourier(call.times[0]))[:, 0]
        emb, keys = constrain(self.embed(call.times, call.cond)), call.cond.get("dropout")
        x = jnp.concatenate([call.x, jnp.ones_like(call.x[..., :1])], axis=-1).astype(self.config.dtype)
        skips: list[jax.Array] = []
        for i, (side, row) in enumerate(self._layers()):
            if side == "dec" and row.takes_skip:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = constrain(self._run(getattr(self, side)[row.name], x, emb, keys, i))
            if side == "enc":
                skips.append(x)
            if f"{side}_{row.name}" in call.taps:
                features[f"{side}_{row.name}"] = x
            if call.stop and i == last:
                return x, features
        return self.out_conv(x, self.out_gain[...]).astype(jnp.float32), features

    def _run(self, layer: Any, x: jax.Array, emb: jax.Array, keys: jax.Array | None, index: int) -> jax.Array:
        """One layer, recomputed in the backward pass where the configuration says so."""
        if isinstance(layer, MPConv):
            return layer(x)
        own = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
        call: Callable[..., jax.Array] = jax.checkpoint(layer) if self.config.remat == "full" else layer
        return call(x, emb, own)

    def _layers(self) -> list[tuple[str, Layer]]:
        config = self.config
        return [("enc", row) for row in config.encoder_plan()] + [("dec", row) for row in config.decoder_plan()]
