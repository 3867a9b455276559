"""The blocks of EDM's U-Nets: resampling convolutions, group norm, residual blocks with attention.

Karras et al. 2022, appendix of "Elucidating the Design Space of Diffusion-Based Generative Models", after Song et al.
2021 and Dhariwal & Nichol 2021. Images are (B, H, W, C).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.nn.attention import attention
from gen.nn.convolution import convolution
from gen.nn.layers import dropout, matrix_product
from gen.nn.mesh import gathered

__all__ = ["BOX", "FIR", "Conv", "EDMLinear", "GroupNorm", "Style", "UNetBlock", "fir_down", "fir_up", "law_of"]

Init = Any  # (key, shape, dtype) -> array; the last two axes of a shape are (in, out)
BOX = (1, 1)
FIR = (1, 3, 3, 1)


def law_of(mode: str, factor: float = 1.0) -> Init:
    """Gives an initialiser by fan: xavier or kaiming, uniform or normal, times `factor` (0 gives zeros)."""
    kind, _, shape_of_noise = mode.partition("-")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
        std = math.sqrt(2.0 / (fan_in + fan_out) if kind == "xavier" else 1.0 / fan_in)
        if shape_of_noise == "uniform":
            return factor * math.sqrt(3.0) * std * jax.random.uniform(key, shape, dtype, -1.0, 1.0)
        return factor * std * jax.random.normal(key, shape, dtype)

    return init


@dataclasses.dataclass(frozen=True)
class Style:
    """What distinguishes the blocks of the two families.

    Attributes:
      adaptive: conditioning scales and shifts (ADM), or is added (SongUNet).
      skip_scale: factor on residual sums.
      eps: of the group norms.
      groups: of the group norms; 0 for min(32, C // 4).
      project: skips that resample have weights even where the width stays.
      taps: low-pass filter of up- and downsampling, of even length.
      channels_per_head: of attention; 0 for one head. Narrower blocks than one head have no attention at all.
      head_count: attention heads of every block, whatever its width; 0 for `channels_per_head`.
      dropout: share of activations dropped before the second convolution, in training.
      law: of weights; of layers that start at zero, or nearly; of the attention's qkv.
      bias: factor of `law` for biases; 0 for zero biases.

    Raises GenError for a resampling filter of an odd number of taps, and a dropout outside [0, 1).
    """

    adaptive: bool = True
    skip_scale: float = 1.0
    eps: float = 1e-5
    groups: int = 0
    project: bool = False
    taps: tuple[int, ...] = BOX
    channels_per_head: int = 64
    head_count: int = 0
    dropout: float = 0.0
    law: tuple[str, float] = ("kaiming-uniform", math.sqrt(1 / 3))
    zero: tuple[str, float] = ("kaiming-uniform", 0.0)
    qkv: tuple[str, float] = ("kaiming-uniform", math.sqrt(1 / 3))
    bias: float = 1.0

    def __post_init__(self) -> None:
        if len(self.taps) % 2 or sum(self.taps) == 0:
            raise GenError(f"resampling filter {self.taps} needs an even number of taps with a sum; use 1,1 or 1,3,3,1")
        if not 0 <= self.dropout < 1:
            raise GenError(f"dropout is {self.dropout}; expected a share in [0, 1)")

    def heads(self, channels: int) -> int:
        """Gives attention heads of a block with attention; 0 for none."""
        if self.head_count:
            return self.head_count
        return channels // self.channels_per_head if self.channels_per_head else 1


def _filter(x: jax.Array, taps: np.ndarray, step: int) -> jax.Array:
    """Cross-correlates axes 1 and 2 of x (B, H, W, C) with `taps` (K,), every `step` pixels, without padding.

    Written as sums of slices: depthwise convolutions are slow on CPUs, and these fuse.
    """
    for axis in (1, 2):
        length = (x.shape[axis] - len(taps)) // step + 1
        limit = step * (length - 1) + 1
        parts = [
            jax.lax.slice_in_dim(x, k, k + limit, step, axis) * jnp.asarray(t, x.dtype) for k, t in enumerate(taps)
        ]
        x = sum(parts[1:], parts[0])
    return x


def fir_down(x: jax.Array, taps: tuple[int, ...], pad: int | None = None) -> jax.Array:
    """Halves axes 1 and 2 of (B, H, W, C) with a low-pass filter; zeros outside.

    Args:
      taps: the filter along one axis; normalised here. (1, 1) gives the mean of 2 x 2 pixels.
      pad: zeros around the image; (K - 1) // 2 by default, which gives half the size.
    """
    f = np.asarray(taps, np.float64) / sum(taps)
    p = (len(taps) - 1) // 2 if pad is None else pad
    return _filter(jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0))), f, 2)


def fir_up(x: jax.Array, taps: tuple[int, ...], pad: int | None = None) -> jax.Array:
    """Doubles axes 1 and 2 of (B, H, W, C): the transpose of `fir_down`, times 4.

    Args:
      taps: as in `fir_down`. (1, 1) repeats every pixel.
      pad: rows and columns cut from each side of the full result; (K - 1) // 2 by default, which gives twice the size.
    """
    f = 2.0 * np.asarray(taps, np.float64)[::-1] / sum(taps)
    p = len(taps) - 1 - ((len(taps) - 1) // 2 if pad is None else pad)
    zero = jnp.zeros((), x.dtype)
    return _filter(jax.lax.pad(x, zero, ((0, 0, 0), (p, p, 1), (p, p, 1), (0, 0, 0))), f, 1)


class Conv(nnx.Module):
    """A convolution with "same" zero padding after (or, `fused`, around) a resampling; kernel 0 only resamples.

    Fused resampling pads once for both: down is the convolution, then the filter; up the filter, then the convolution.
    With a stride of 2 there is no filter: the convolution alone halves the image.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        taps: tuple[int, ...] = BOX,
        fused: bool = False,
        stride: int = 1,
        law: Init = law_of("kaiming-normal"),
        bias: float = 0.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.size, self.up, self.down, self.taps, self.fused, self.dtype = kernel, up, down, taps, fused, dtype
        self.stride = stride
        if kernel:
            shape = (kernel, kernel, inputs, outputs)
            self.kernel = nnx.Param(law(rngs.params(), shape))
            # a bias is drawn by the law of the weights' fan
            self.bias = nnx.Param(bias * law(rngs.params(), shape)[0, 0, 0] if bias else jnp.zeros((outputs,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, inputs) -> (B, H', W', outputs) in the compute type."""
        x = x.astype(self.dtype)
        half, p = self.size // 2, (len(self.taps) - 1) // 2
        if self.fused and self.size and self.down:
            return fir_down(self._conv(x, half + p), self.taps, 0) + self._bias
        if self.fused and self.size and self.up:
            return self._conv(fir_up(x, self.taps, max(p - half, 0)), max(half - p, 0)) + self._bias
        if self.up:
            x = fir_up(x, self.taps)
        if self.down:
            x = fir_down(x, self.taps)
        return self._conv(x, half) + self._bias if self.size else x

    @property
    def _bias(self) -> jax.Array:
        return self.bias[...].astype(self.dtype)

    def _conv(self, x: jax.Array, pad: int) -> jax.Array:
        kernel = gathered(self.kernel[...].astype(self.dtype))
        if self.size == 1 and pad == 0:
            return matrix_product(x, kernel[0, 0])
        return convolution(x, kernel, stride=self.stride, padding=pad)


class EDMLinear(nnx.Module):
    """x W + b with the initialisation laws of this family; float32."""

    def __init__(self, inputs: int, outputs: int, law: Init, bias: float | None, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(law(rngs.params(), (inputs, outputs)))
        self.bias = None if bias is None else nnx.Param(jnp.zeros((outputs,)))
        if bias:  # drawn by the law of the weights' fan
            self.bias = nnx.Param(bias * law(rngs.params(), (inputs, outputs))[0])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ gathered(self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


class GroupNorm(nnx.Module):
    """Group normalisation in float32, with the groups of a style and an affine map."""

    def __init__(self, channels: int, style: Style) -> None:
        self.groups, self.eps = style.groups or max(min(32, channels // 4), 1), style.eps
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) -> the same shape, float32."""
        # sums over pixels first, channel by channel, and then of the few channels of a group
        x = x.astype(jnp.float32)
        centred = x - self._mean(x)
        return centred * (jax.lax.rsqrt(self._mean(jnp.square(centred)) + self.eps) * self.scale[...]) + self.bias[...]

    def _mean(self, x: jax.Array) -> jax.Array:
        """The mean of each image and group at each of its channels, (B, 1, 1, C)."""
        b, _, _, c = x.shape
        means = x.mean((1, 2)).reshape(b, self.groups, c // self.groups).mean(-1)
        return jnp.repeat(means, c // self.groups, axis=-1)[:, None, None]


class UNetBlock(nnx.Module):
    """Norm, SiLU, convolution, conditioning, norm, SiLU, dropout, convolution; a skip; optional attention.

    Args:
      inputs, outputs, emb: channels of the image in and out, width of the conditioning vector.
      heads: of attention; 0 for none.
      times: 2 adds the conditioning of a second vector (CTM's target time).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        emb: int,
        style: Style,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        times: int = 1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.style, self.heads = style, heads
        law, zero = law_of(*style.law), law_of(*style.zero)
        shared: dict[str, Any] = {"taps": style.taps, "law": law, "bias": style.bias, "dtype": dtype, "rngs": rngs}
        sampled: dict[str, Any] = {**shared, "up": up, "down": down}
        width = outputs * (2 if style.adaptive else 1)
        self.norm0 = GroupNorm(inputs, style)
        self.conv0 = Conv(inputs, outputs, 3, **sampled)
        self.affine = EDMLinear(emb, width, law, style.bias, rngs)
        if times == 2:
            self.affine_s = EDMLinear(emb, width, law, style.bias, rngs)
        self.norm1 = GroupNorm(outputs, style)
        self.conv1 = Conv(outputs, outputs, 3, **{**shared, "law": zero})
        size = 1 if style.project or outputs != inputs else 0
        self.skip = Conv(inputs, outputs, size, **sampled) if outputs != inputs or up or down else None
        if heads:
            self.norm2 = GroupNorm(outputs, style)
            self.qkv = Conv(outputs, 3 * outputs, 1, **{**shared, "law": law_of(*style.qkv)})
            self.proj = Conv(outputs, outputs, 1, **{**shared, "law": zero})

    def __call__(
        self,
        x: jax.Array,
        embs: tuple[jax.Array, ...],
        keys: jax.Array | None = None,
        keep: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Gives the block's output (B, H', W', outputs).

        Args:
          x: (B, H, W, inputs).
          embs: one or two vectors (B, emb).
          keys: (B,) PRNG keys, given in training, for dropout.
          keep: whether to run the residual branch and the attention, two () bools; without them the skip and the
            identity are left.
        """
        scale = self.style.skip_scale
        skip = x if self.skip is None else self.skip(x)
        runs = (True, True) if keep is None else keep
        x = _cond(
            runs[0], lambda x, skip: (self._residual(x, embs, keys) + skip) * scale, lambda x, skip: skip, x, skip
        )
        if not self.heads:
            return x
        return _cond(runs[1], lambda x: (self.proj(self._attend(x)) + x) * scale, lambda x: x, x)

    def _residual(self, x: jax.Array, embs: tuple[jax.Array, ...], keys: jax.Array | None) -> jax.Array:
        style = self.style
        h = self.conv0(jax.nn.silu(self.norm0(x)))
        p = self.affine(embs[0]) if len(embs) == 1 else self.affine(embs[0]) + self.affine_s(embs[1])
        p = p[:, None, None]
        if style.adaptive:
            scale, shift = jnp.split(p, 2, axis=-1)
            h = jax.nn.silu(self.norm1(h) * (scale + 1.0) + shift)
        else:
            h = jax.nn.silu(self.norm1(h.astype(jnp.float32) + p))
        if keys is not None and style.dropout:
            h = dropout(h, style.dropout, keys)
        return self.conv1(h)

    def _attend(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        # the projection's channels are ordered by head, then channel, then q, k, v
        qkv = self.qkv(self.norm2(x)).reshape(b, h * w, self.heads, c // self.heads, 3)
        q, k, v = (qkv[..., i] for i in range(3))
        return attention(q, k, v).reshape(b, h, w, c)


def _cond(runs: Any, yes: Any, no: Any, *args: jax.Array) -> jax.Array:
    """`yes` where nothing is chosen at run time, else one of both: what is skipped is not computed."""
    if runs is True:
        return yes(*args)
    return jax.lax.cond(runs, lambda *a: yes(*a).astype(args[-1].dtype), no, *args)
