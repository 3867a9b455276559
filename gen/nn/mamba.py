"""Mamba layers: the causal one for sequences, and the one that scans feature maps along several orders.

Gu & Dao 2023, "Mamba" (`Mamba`, with its token-by-token form), and Liu et al. 2024, "VMamba" (`Scan2D`), as used by
LaMamba-Diff. Parameters and the recurrence are float32; `dtype` is the compute type of the matrix products.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.errors import GenError
from gen.nn.layers import linear
from gen.nn.selective_scan import selective_scan

__all__ = ["Mamba", "MambaConfig", "Order", "Scan2D", "depthwise", "merge_orders", "scan_orders", "step_bias"]

Order = Literal["snake", "raster", "bidirectional"]
DIRECTIONS: dict[str, int] = {"snake": 4, "raster": 4, "bidirectional": 2}


def scan_orders(x: jax.Array, order: Order) -> jax.Array:
    """Gives a feature map (b, H, W, c) as the sequences of its pixels along each direction: (b, H W, K, c).

    ``raster``: row by row, column by column, and both reversed. ``snake``, in which neighbours in the sequence are
    neighbours in the map: rows downwards from the top left, rows upwards from the bottom left, columns rightwards
    from the bottom left, columns leftwards from the bottom right, each turning round at the border.
    ``bidirectional``: row by row, and reversed.
    """
    b, h, w, c = x.shape
    if order == "snake":
        maps = [_turn(_view(x, k)) for k in range(4)]
        return jnp.stack([m.reshape(b, h * w, c) for m in maps], axis=2)
    paths = [x] if order == "bidirectional" else [x, x.swapaxes(1, 2)]
    paths = [p.reshape(b, h * w, c) for p in paths]
    return jnp.stack([*paths, *(p[:, ::-1] for p in paths)], axis=2)


def merge_orders(y: jax.Array, size: tuple[int, int], order: Order) -> jax.Array:
    """Sequences (b, H W, K, c) put back in place and summed over the directions: (b, H, W, c)."""
    b, _, _, c = y.shape
    h, w = size
    if order == "snake":
        shapes = [(h, w), (h, w), (w, h), (w, h)]
        maps = [_unview(_turn(y[:, :, k].reshape(b, *shapes[k], c)), k) for k in range(4)]
        return maps[0] + maps[1] + maps[2] + maps[3]
    half = y.shape[2] // 2
    paths = y[:, :, :half] + y[:, ::-1, half:]
    out = paths[:, :, 0].reshape(b, h, w, c)
    return out if order == "bidirectional" else out + paths[:, :, 1].reshape(b, w, h, c).swapaxes(1, 2)


def _turn(x: jax.Array) -> jax.Array:
    """Reverses every second row; flips, where a gather would be slow. Its own inverse."""
    odd = (jnp.arange(x.shape[1]) % 2 == 1)[:, None, None]
    return jnp.where(odd, x[:, :, ::-1], x)


def _view(x: jax.Array, k: int) -> jax.Array:
    """The map turned so that snake k runs along its rows from the top left."""
    if k:
        x = x[:, ::-1]
    if k == 3:
        x = x[:, :, ::-1]
    return x.swapaxes(1, 2) if k >= 2 else x


def _unview(x: jax.Array, k: int) -> jax.Array:
    x = x.swapaxes(1, 2) if k >= 2 else x
    if k == 3:
        x = x[:, :, ::-1]
    return x[:, ::-1] if k else x


def depthwise(x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    """Gives depthwise correlation of (b, *size, c) with a kernel (*window, c), as a sum of shifted copies.

    For windows of a few taps that is faster, in both passes, than a grouped convolution.
    """
    window = kernel.shape[:-1]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    size = [n - k + 1 for n, k in zip(x.shape[1:-1], window, strict=True)]
    out = jnp.zeros((), x.dtype)
    for index in np.ndindex(*window):
        shifted = x[(slice(None), *(slice(i, i + n) for i, n in zip(index, size, strict=True)))]
        out = out + shifted * kernel[index].astype(x.dtype)
    return out


def step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws biases of a shape, float32, whose softplus is log-uniform in [0.001, 0.1] (Mamba's step widths)."""
    low, high = math.log(0.001), math.log(0.1)
    step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape) * (high - low) + low), 1e-4)
    return step + jnp.log(-jnp.expm1(-step))


def _uniform(fan_in: int) -> Any:
    """U(-s, s) with s = 1 / sqrt(fan_in)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


def _decays(channels: int, states: int) -> jax.Array:
    """log(1 .. states) for every channel: A = -exp of it."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, states + 1, dtype=jnp.float32)), (channels, states)).copy()


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """A causal Mamba layer.

    Attributes:
      width: channels in and out.
      state: numbers of state per channel.
      conv: taps of the causal convolution.
      expand: inner width over width.
      rank: of the step sizes' projection; ceil(width / 16) when None.
      conv_bias: whether the convolution has a bias.
      bias: whether the first and last projections have one.
      dtype: compute type of the matrix products.
    """

    width: int
    state: int = 16
    conv: int = 4
    expand: float = 2
    rank: int | None = None
    conv_bias: bool = True
    bias: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def inner(self) -> int:
        """Gives the inner width of the layer."""
        return int(self.expand * self.width)

    @property
    def ranks(self) -> int:
        """Gives the rank of the step sizes' projection."""
        return math.ceil(self.width / 16) if self.rank is None else self.rank

    def build(self, rngs: nnx.Rngs) -> "Mamba":
        """Gives the module with freshly drawn parameters."""
        return Mamba(self, rngs)


class Mamba(nnx.Module):
    """projection -> causal convolution, SiLU -> selective scan, gated -> projection; no norm, no residual."""

    def __init__(self, config: MambaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype, inner = jnp.dtype(config.dtype), config.inner
        self.in_proj = linear(
            config.width, 2 * inner, bias=config.bias, dtype=dtype, rngs=rngs, init=_uniform(config.width)
        )
        taps = _uniform(config.conv)
        self.conv = nnx.Param(taps(rngs.params(), (config.conv, inner)))
        self.conv_bias = nnx.Param(taps(rngs.params(), (inner,))) if config.conv_bias else None
        self.x_proj = linear(
            inner, config.ranks + 2 * config.state, bias=False, dtype=dtype, rngs=rngs, init=_uniform(inner)
        )
        self.dt_proj = linear(config.ranks, inner, bias=False, dtype=dtype, rngs=rngs, init=_uniform(config.ranks))
        self.dt_bias = nnx.Param(step_bias(rngs.params(), (inner,)))
        self.A_log = nnx.Param(_decays(inner, config.state))
        self.D = nnx.Param(jnp.ones((inner,)))
        self.out_proj = linear(inner, config.width, bias=config.bias, dtype=dtype, rngs=rngs, init=_uniform(inner))

    def _inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Raw step sizes, B and C of convolved inputs (..., inner)."""
        rank, state = self.config.ranks, self.config.state
        dt, B, C = jnp.split(self.x_proj(x), [rank, rank + state], axis=-1)
        return self.dt_proj(dt), B, C

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, L, width) -> (b, L, width)."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        x = depthwise(x, self.conv[...], ((self.config.conv - 1, 0),))
        x = jax.nn.silu(x if self.conv_bias is None else x + self.conv_bias[...].astype(x.dtype))
        y, _ = selective_scan(
            x,
            *self._scan_arguments(x),
            self.D[...],
            z=z,
            delta_bias=self.dt_bias[...],
            softplus=True,
        )
        return self.out_proj(y)

    def _scan_arguments(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        delta, B, C = self._inputs(x)
        return delta, -jnp.exp(self.A_log[...]), B, C

    def cache(self, batch: int) -> dict[str, jax.Array]:
        """Gives the memory before the first token: ``conv`` (b, taps, inner), newest last, and ``state`` (b, inner,
        n).
        """
        inner = self.config.inner
        return {
            "conv": jnp.zeros((batch, self.config.conv, inner)),
            "state": jnp.zeros((batch, inner, self.config.state)),
        }

    def step(self, x: jax.Array, cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Takes one token (b, width) after those in `cache`: its output (b, width) and the cache with it."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        recent = jnp.concatenate([cache["conv"][:, 1:], x[:, None].astype(jnp.float32)], axis=1)
        x = (recent * self.conv[...]).sum(1)
        x = jax.nn.silu(x if self.conv_bias is None else x + self.conv_bias[...]).astype(z.dtype)
        delta, A, B, C = self._scan_arguments(x)
        delta = jax.nn.softplus(delta.astype(jnp.float32) + self.dt_bias[...])[..., None]
        u, B, C = (m.astype(jnp.float32) for m in (x, B, C))
        state = jnp.exp(delta * A) * cache["state"] + delta * u[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + self.D[...] * u
        return self.out_proj((y * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype)), {"conv": recent, "state": state}


class Scan2D(nnx.Module):
    """VMamba's layer: the map is scanned along K directions, each with its own parameters, and the results summed.

    projection -> depthwise convolution, SiLU -> K selective scans -> sum -> LayerNorm -> gate -> projection.

    Args:
      width: channels in and out.
      order: which directions.
      state: numbers of state per channel.
      expand: inner width over width.
      rank: of the step sizes' projection; ceil(width / 16) when None.
      conv: side of the depthwise convolution, odd; 1 for none.
      conv_bias: whether it has a bias.

    Raises GenError for a convolution of even side.
    """

    def __init__(
        self,
        width: int,
        order: Order,
        *,
        state: int = 1,
        expand: float = 2.0,
        rank: int | None = None,
        conv: int = 3,
        conv_bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if conv % 2 == 0:
            raise GenError(f"the scan layer's convolution has side {conv}; use an odd one")
        self.order, self.state, self.dtype = order, state, dtype
        self.rank = math.ceil(width / 16) if rank is None else rank
        inner, directions = int(expand * width), DIRECTIONS[order]
        self.in_proj = linear(width, 2 * inner, bias=False, dtype=dtype, rngs=rngs)
        taps = _uniform(conv**2)
        self.conv = nnx.Param(taps(rngs.params(), (conv, conv, inner))) if conv > 1 else None
        self.conv_bias = nnx.Param(taps(rngs.params(), (inner,))) if conv > 1 and conv_bias else None
        self.x_proj = nnx.Param(_uniform(inner)(rngs.params(), (directions, inner, self.rank + 2 * state)))
        self.dt_proj = nnx.Param(_uniform(self.rank)(rngs.params(), (directions, self.rank, inner)))
        self.dt_bias = nnx.Param(step_bias(rngs.params(), (directions, inner)))
        self.A_log = nnx.Param(_decays(directions * inner, state))
        self.D = nnx.Param(jnp.ones((directions * inner,)))
        self.norm = nnx.LayerNorm(inner, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.out_proj = linear(inner, width, bias=False, dtype=dtype, rngs=rngs)

    def scan_inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Gives u (b, L, K inner), raw step sizes (same), B and C (b, L, K, state) of a map (b, H, W, inner)."""
        u = scan_orders(x, self.order)
        inputs = jnp.einsum("blkd,kdc->blkc", u, self.x_proj[...].astype(u.dtype))
        dt, B, C = jnp.split(inputs, [self.rank, self.rank + self.state], axis=-1)
        delta = jnp.einsum("blkr,krd->blkd", dt, self.dt_proj[...].astype(u.dtype))
        return u.reshape(*u.shape[:2], -1), delta.reshape(*u.shape[:2], -1), B, C

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives the convolved map (b, H, W, inner) to be scanned, and the gate."""
        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        if self.conv is not None:
            pad = self.conv.shape[0] // 2
            x = depthwise(x, self.conv[...], ((pad, pad), (pad, pad)))
        return jax.nn.silu(x if self.conv_bias is None else x + self.conv_bias[...].astype(x.dtype)), jax.nn.silu(z)

    def scan(self, u: jax.Array, delta: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        """Gives the K scans of `scan_inputs`: (b, L, K inner) float32."""
        A, bias = -jnp.exp(self.A_log[...]), self.dt_bias[...].reshape(-1)
        u = u.astype(jnp.float32)
        return selective_scan(u, delta, A, B, C, self.D[...], delta_bias=bias, softplus=True)[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, H, W, width) -> (b, H, W, width)."""
        b, h, w, _ = x.shape
        x, z = self.project(x)
        y = self.scan(*self.scan_inputs(x)).reshape(b, h * w, -1, x.shape[-1])
        y = self.norm(merge_orders(y, (h, w), self.order))
        return self.out_proj(y.astype(z.dtype) * z)
