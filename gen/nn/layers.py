"""Transformer parts shared by tokenizers and backbones, and depth as one scanned stack.

Parameters are float32; `dtype` is the compute type of the matrix products. Norms, softmax and residual sums
are float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.nn.mesh import gathered

__all__ = [
    "MLP",
    "Embed",
    "Remat",
    "StackOutput",
    "TimeEmbedder",
    "add_gated",
    "dropout",
    "layer_norm",
    "linear",
    "matrix_product",
    "modulate",
    "patchify",
    "run_stack",
    "sincos_positions",
    "sinusoid",
    "stack",
    "unpatchify",
    "xavier",
]

Remat = Literal["none", "dots", "full"]

xavier = nnx.initializers.xavier_uniform()
_vectors = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)  # unit length on average


def linear(
    features_in: int,
    features_out: int,
    *,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    bias: bool = True,
    init: Callable[..., jax.Array] = xavier,
) -> nnx.Linear:
    """Gives a dense layer, (..., features_in) -> (..., features_out), with Xavier-uniform weights and zero bias unless
    told otherwise; float32 parameters, products in `dtype`.
    """
    return nnx.Linear(
        features_in, features_out, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=_dot, rngs=rngs
    )


def matrix_product(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """x (..., K) times kernel (K, M) as one product of matrices; `options` are those of `jax.lax.dot`.

    With several leading axes the gradient of the kernel would become a product of transposed copies, at a third of the
    speed on a CPU.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jax.lax.dot(rows, kernel, **options).reshape(*x.shape[:-1], kernel.shape[-1])


def _dot(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`matrix_product` as `nnx.Linear` calls it: always over the last axis of x and the first of the kernel."""
    del dimension_numbers
    return matrix_product(x, gathered(kernel), **options)


class Embed(nnx.Module):
    """A table of vectors, read by index; each device holds it whole meanwhile (`gen.nn.mesh.gathered`)."""

    def __init__(self, rows: int, width: int, *, init: Callable[..., jax.Array] = _vectors, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(init(rngs.params(), (rows, width), jnp.float32))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Maps (...) int32 -> (..., width) float32."""
        return jnp.take(gathered(self.embedding[...], table=True), indices, axis=0)


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Zeroes each entry of x (B, ...) with probability `rate`, to within 2^-16, and divides the others by 1 - rate.

    Each sample draws from its own of the `keys` (B,). Sixteen bits an entry: a U-Net on a CPU feels the cost of noise.
    """
    size = math.prod(x.shape[1:])
    words = jax.vmap(lambda key: jax.random.bits(key, (-(-size // 2),), jnp.uint32))(keys)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape[0], -1)[:, :size].reshape(x.shape)
    return jnp.where(bits >= np.uint16(rate * 2**16), x / (1.0 - rate), 0.0)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm without affine over the last axis, in float32.

    Of a half-precision x the variance is E[x^2] - E[x]^2: its own rounding outweighs the cancellation, and both means
    are sums of one pass.
    """
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    if x.dtype == jnp.float32:
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    else:
        variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0.0)
    return (wide - mean) * jax.lax.rsqrt(variance + eps)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift with shift and scale (B, D) broadcast over the tokens of x (B, N, D)."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def add_gated(x: jax.Array, gate: jax.Array, branch: jax.Array) -> jax.Array:
    """x + gate branch, summed in float32, in the type of the residual stream x (B, N, D); gate (B, D)."""
    return (x.astype(jnp.float32) + gate[:, None] * branch.astype(jnp.float32)).astype(x.dtype)


def sinusoid(t: jax.Array, width: int = 256, max_period: float = 10000.0) -> jax.Array:
    """Features of a time: [cos(t f), sin(t f)], f_k = max_period^(-k / (width / 2)); (B,) -> (B, width) float32.

    Half of an odd width is rounded down, and a zero fills the last place.
    """
    half = width // 2
    # the published networks round the exponent to float32; an angle of 1000 radians shows a last digit of the frequency
    exponents = -math.log(max_period) * np.arange(half, dtype=np.float32) / half
    freqs = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), jnp.zeros((t.shape[0], width % 2))], axis=-1)


def sincos_positions(shape: Sequence[int], width: int, spacing: float = 1.0) -> np.ndarray:
    """Gives the fixed position table of MAE and DiT, (prod(shape), width) float32, computed in float64.

    One axis: [sin(p w_k), cos(p w_k)], w_k = 10000^(-k / (width / 2)), with p = `spacing` times the index. Two axes
    (rows, columns): the first half of the channels encodes the column, the second half the row.
    """

    def axis(position: np.ndarray, width: int) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2.0))
        angles = position.reshape(-1).astype(np.float64)[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    if len(shape) == 1:
        return axis(spacing * np.arange(shape[0], dtype=np.float32), width).astype(np.float32)
    rows, columns = np.meshgrid(*(spacing * np.arange(n, dtype=np.float32) for n in shape), indexing="ij")
    return np.concatenate([axis(columns, width // 2), axis(rows, width // 2)], axis=1).astype(np.float32)


def patchify(x: jax.Array, patch: int | Sequence[int]) -> jax.Array:
    """Cuts (B, *size, C) with one to three spatial axes into tokens (B, N, pixels of a patch times C).

    Tokens are row-major; inside a token the order is (row in patch, column in patch, channel), channel fastest.
    `patch`, one side for all axes or one for each, must divide every entry of size.
    """
    b, *size, c = x.shape
    axes, sides = len(size), _sides(patch, len(size))
    split = [m for n, side in zip(size, sides, strict=True) for m in (n // side, side)]
    order = (0, *range(1, 2 * axes + 1, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(b, *split, c).transpose(order).reshape(b, -1, math.prod(sides) * c)


def unpatchify(tokens: jax.Array, size: Sequence[int], patch: int | Sequence[int]) -> jax.Array:
    """Gives the inverse of `patchify`: tokens (B, N, pixels of a patch times C) back to (B, *size, C)."""
    axes, sides = len(size), _sides(patch, len(size))
    x = tokens.reshape(tokens.shape[0], *(n // side for n, side in zip(size, sides, strict=True)), *sides, -1)
    order = (0, *(m for i in range(axes) for m in (1 + i, 1 + axes + i)), 2 * axes + 1)
    return x.transpose(order).reshape(tokens.shape[0], *size, -1)


def _sides(patch: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (patch,) * axes if isinstance(patch, int) else tuple(patch)


class TimeEmbedder(nnx.Module):
    """Sinusoid -> Linear -> SiLU -> Linear; (B,) -> (B, width); 0 at first where `silent`."""

    def __init__(
        self,
        width: int,
        *,
        frequencies: int = 256,
        max_period: float = 10000.0,
        silent: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        init = nnx.initializers.normal(0.02)
        self.frequencies, self.max_period = frequencies, max_period
        self.fc1 = linear(frequencies, width, rngs=rngs, init=init)
        self.fc2 = linear(width, width, rngs=rngs, init=nnx.initializers.zeros_init() if silent else init)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(sinusoid(t, self.frequencies, self.max_period))))


class MLP(nnx.Module):
    """Linear -> GELU -> Linear; `approximate` chooses the tanh form of GELU (DiT) or the exact one (ViT)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        approximate: bool = True,
        init: Callable[..., jax.Array] = xavier,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.approximate = approximate
        self.fc1 = linear(width, hidden, init=init, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.approximate))


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` modules as one whose parameters carry the layer on axis 0."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def _unstacked(layers: Any, depth: int) -> list[Any]:
    """The layers of a tree of stacked arrays, cut at once: the gradient is one concatenation.

    Indexing layer by layer would make it a sum of `depth` padded arrays, which a compiler fuses into every array of the
    optimiser's update: that took a TPU twice the time.
    """
    cut = jax.tree.map(lambda a: [part[0] for part in jax.lax.split(a, (1,) * depth)], layers)
    return [jax.tree.map(lambda _, parts, i=i: parts[i], layers, cut) for i in range(depth)]


class StackOutput(NamedTuple):
    """What `run_stack` gives.

    Attributes:
      x: the output of the last block that ran.
      outputs: what each block gave beside it, with the layer on axis 0: caches, losses; None where blocks give None.
      kept: outputs of chosen blocks, by layer index.
    """

    x: jax.Array
    outputs: Any
    kept: dict[int, jax.Array]


def run_stack(
    blocks: nnx.Module,
    x: jax.Array,
    call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    *,
    per_layer: Any = None,
    remat: Remat = "none",
    scan: bool = True,
    keep: tuple[int, ...] = (),
    start: int = 0,
    stop: int | None = None,
) -> StackOutput:
    """Runs x through stacked blocks: ``x, output = call(block, x, extra)`` for each layer.

    Args:
      blocks: what `stack` made.
      call: applies one block; `extra` is this layer's slice of `per_layer` (None without). Its second result is any
        tree of arrays, or None.
      per_layer: a tree of arrays with the layer on axis 0: masks, caches, other controls.
      remat: what the backward pass recomputes: nothing, all but matrix products, or everything.
      scan: one `lax.scan` over depth (constant compile time) or a Python loop (faster on CPU for a few layers).
      keep: layer indices whose outputs are returned; the stack is split there, so other layers cost no memory.
      start, stop: run only the layers from `start` to before `stop`.
    """
    graphdef, params = nnx.split(blocks)
    depth = jax.tree.leaves(params)[0].shape[0]

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, extra = layer
        return call(nnx.merge(graphdef, gathered(weights)), x, extra)

    if remat != "none":
        body = partial(jax.checkpoint, policy=_POLICIES[remat], prevent_cse=not scan)(body)
    kept: dict[int, jax.Array] = {}
    parts: list[Any] = []  # the outputs of runs of layers
    stop = depth if stop is None else stop
    for end in sorted({*(k + 1 for k in keep if start <= k < stop), stop}):
        layers = jax.tree.map(lambda a, s=start, e=end: a[s:e], (params, per_layer))
        if scan:
            x, outputs = jax.lax.scan(body, x, layers)
            parts.append(outputs)
        else:
            for layer in _unstacked(layers, end - start):
                x, output = body(x, layer)
                parts.append(jax.tree.map(lambda a: a[None], output))
        if end - 1 in keep:
            kept[end - 1] = x
        start = end
    return StackOutput(x, jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts) if parts else None, kept)
