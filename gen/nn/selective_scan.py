"""The selective scan of Mamba: a linear recurrence whose decay, input and output maps depend on the token.

Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2:

    h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] u_t[d] B_t[n],   h_0 = 0
    y_t[d]    = sum_n C_t[n] h_t[d, n]

A is discretised by zero-order hold and B by the Euler rule, as in the published code. The sequence is cut into chunks;
the gradient is hand-written and keeps only the state at each chunk's start, so that training memory is
O(L D + L / chunk D N), never O(L D N). Everything inside is float32.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gen.errors import GenError
from gen.nn.forward_mode import in_forward_mode

__all__ = ["Method", "selective_scan"]

Method = Literal["scan", "sequential", "associative", "pallas"]

# Tokens; measured on CPU, where short chunks stay in cache (benchmarks/selective_scan.py). By its compiler's estimate a
# TPU v5e takes 301 ms for a step of LaMamba-B of 8 images in log depth, 323 ms token by token.
_CHUNK = 16
_LANES = 128  # channels per block of the Pallas kernel


def selective_scan(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    softplus: bool = False,
    method: Method | None = None,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Gives out = (y + D u) silu(z) along axis 1, and the last state.

    Args:
      u: (b, L, d) inputs.
      delta: (b, L, d) step sizes before bias and softplus.
      A: (d, n) decay rates, negative.
      B, C: (b, L, n); (b, L, g, n) with g groups of d / g consecutive channels; or (d, n), constant in time (then
        held per token: a form of the published operator, not one to train with).
      D: (d,) skip weights, or None.
      z: (b, L, d) gate, or None.
      delta_bias: (d,) added to delta, or None.
      softplus: whether the step size is softplus(delta + delta_bias).
      method: ``sequential`` or ``associative`` inside each chunk, ``pallas`` (a kernel for the forward pass, chunked
        backward), or ``scan``, one plain `lax.scan`. None: ``sequential`` on CPUs and ``associative`` elsewhere, where
        one step at a time is bound by latency; decided when the program is lowered for a platform, so that one that is
        compiled for another machine is what that machine would run. Forward-mode differentiation passes through the
        plain one only, which `gen.nn.forward_mode` therefore takes whatever is asked for here.
      chunk: tokens per chunk. L need not be a multiple.

    Returns:
      out (b, L, d) in u's dtype; the state after the last token (b, d, n) float32.

    Raises GenError when the shapes do not fit together.
    """
    length, channels = u.shape[1:]
    _check(u, delta, A, B, C)
    method = "scan" if in_forward_mode() else method
    chunk = min(chunk, length)
    step = delta.astype(jnp.float32)
    if delta_bias is not None:
        step = step + delta_bias.astype(jnp.float32)
    if softplus:
        step = jax.nn.softplus(step)
    B, C = (_grouped(m.astype(jnp.float32), u) for m in (B, C))
    groups = max(B.shape[2], C.shape[2])
    B, C = (jnp.broadcast_to(m, (*m.shape[:2], groups, m.shape[3])) for m in (B, C))

    def split(x: jax.Array) -> jax.Array:
        """(b, L, d) -> (L, b, g, d / g), padded to whole chunks: a zero step leaves the state alone."""
        x = x.astype(jnp.float32).reshape(*x.shape[:2], groups, channels // groups).swapaxes(0, 1)
        return _pad(x, chunk)

    rates = A.astype(jnp.float32).reshape(groups, channels // groups, -1)
    B, C = (_pad(m.swapaxes(0, 1), chunk) for m in (B, C))
    y, last = _run(split(u), split(step), rates, B, C, method, chunk)
    y = y[:length].swapaxes(0, 1).reshape(u.shape)
    if D is not None:
        y = y + D.astype(jnp.float32) * u.astype(jnp.float32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(jnp.float32))
    return y.astype(u.dtype), last.reshape(last.shape[0], channels, -1)


def _check(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> None:
    b, length, channels = u.shape
    if delta.shape != u.shape:
        raise GenError(f"selective scan step sizes are {delta.shape}; expected {u.shape}, the inputs' shape")
    if A.ndim != 2 or A.shape[0] != channels:
        raise GenError(f"selective scan decay rates are {A.shape}; expected ({channels}, states)")
    states = A.shape[1]
    for name, m in (("B", B), ("C", C)):
        groups = m.shape[2] if m.ndim == 4 else 1
        if m.shape not in ((channels, states), (b, length, states), (b, length, groups, states)) or channels % groups:
            raise GenError(
                f"selective scan {name} is {m.shape}; expected ({b}, {length}, groups, {states}) with groups that "
                f"divide {channels}, ({b}, {length}, {states}) or ({channels}, {states})"
            )


def _grouped(m: jax.Array, u: jax.Array) -> jax.Array:
    """B or C as (b, L, g, n)."""
    if m.ndim == 2:
        return jnp.broadcast_to(m, (*u.shape[:2], *m.shape))
    return m if m.ndim == 4 else m[:, :, None]


def _pad(x: jax.Array, chunk: int) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % chunk), *((0, 0),) * (x.ndim - 1)))


# below: u, delta (L, b, g, p); A (g, p, n); B, C (L, b, g, n); states h (b, g, p, n); L a multiple of chunk


def _run(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, method: Method | None, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(y, last state) by the chosen method."""
    if method == "scan":
        last, y = _walk(_zero_state(u, A), A, u, delta, B, C)
        return y, last
    return _chunked(u, delta, A, B, C, method, chunk)


def _walk(
    h: jax.Array, A: jax.Array, u: jax.Array, delta: jax.Array, B: jax.Array, C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(last state, y), token by token from state `h`."""

    def step(h: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u, delta, B, C = xs
        a, x = _terms(u, delta, A, B)
        h = a * h + x
        return h, (h * C[..., None, :]).sum(-1)

    return jax.lax.scan(step, h, (u, delta, B, C))


def _terms(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decays a = exp(delta A) and inputs x = delta u B of the recurrence, (..., g, p, n)."""
    return jnp.exp(delta[..., None] * A), (delta * u)[..., None] * B[..., None, :]


def _zero_state(u: jax.Array, A: jax.Array) -> jax.Array:
    return jnp.zeros((u.shape[1], *A.shape), jnp.float32)


def _cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """(L, ...) -> (L / chunk, chunk, ...)."""
    return tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in arrays)


def _linear(a: jax.Array, x: jax.Array, h: jax.Array, associative: bool, reverse: bool = False) -> jax.Array:
    """All states of h_t = a_t h_{t-1} + x_t over axis 0 (from the end when reversed), starting from `h`."""
    if associative:
        decay, states = jax.lax.associative_scan(
            lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1]), (a, x), reverse=reverse
        )
        return states + decay * h

    def step(h: jax.Array, ax: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = ax[0] * h + ax[1]
        return h, h

    return jax.lax.scan(step, h, (a, x), reverse=reverse)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, method: Method | None, chunk: int
) -> tuple[jax.Array, jax.Array]:
    y, last, _ = _forward(u, delta, A, B, C, method, chunk)
    return y, last


def _by_platform(cpu: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """Calls `cpu` where the program is compiled for a CPU, else `other`.

    Only inside hand-written gradients: differentiating such a choice would keep what both of them need.
    """
    return jax.lax.platform_dependent(*args, cpu=cpu, default=other)


def _forward(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, method: Method | None, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, the last state, and the state at the start of each chunk (L / chunk, b, g, p, n)."""
    if method is None:
        walks = (functools.partial(_forward, method=name, chunk=chunk) for name in ("sequential", "associative"))
        made: tuple[jax.Array, jax.Array, jax.Array] = _by_platform(*walks, u, delta, A, B, C)
        return made
    if method == "pallas":
        return _kernel_call(u, delta, A, B, C, chunk)

    def body(h: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        u, delta, B, C = xs
        if method == "sequential":
            last, y = _walk(h, A, u, delta, B, C)
            return last, (h, y)
        a, x = _terms(u, delta, A, B)
        states = _linear(a, x, h, associative=True)
        return states[-1], (h, (states * C[..., None, :]).sum(-1))

    last, (starts, y) = jax.lax.scan(body, _zero_state(u, A), _cut(chunk, u, delta, B, C))
    return y.reshape(u.shape), last, starts


def _forward_rule(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, method: Method | None, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    y, last, starts = _forward(u, delta, A, B, C, method, chunk)
    return (y, last), (u, delta, A, B, C, starts)


def _backward_rule(
    method: Method | None, chunk: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    sequential, associative = (functools.partial(_adjoint, flag, chunk) for flag in (False, True))
    if method in (None, "pallas"):
        gradients: tuple[jax.Array, ...] = _by_platform(sequential, associative, saved, cotangents)
        return gradients
    return (associative if method == "associative" else sequential)(saved, cotangents)


def _adjoint(
    associative: bool, chunk: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    """The adjoint recurrence G_t = dy_t C_t + a_{t+1} G_{t+1}, chunk by chunk from the end; states are recomputed."""
    u, delta, A, B, C, starts = saved

    def body(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
        g, dA = carry  # a_{t+1} G_{t+1} of the chunk's last token
        u, delta, B, C, dy, start = xs
        a, x = _terms(u, delta, A, B)
        states = _linear(a, x, start, associative)
        after = jnp.concatenate([a[1:], jnp.ones_like(a[:1])])
        G = _linear(after, dy[..., None] * C[..., None, :], g, associative, reverse=True)
        decayed = G * a * jnp.concatenate([start[None], states[:-1]])
        GB = (G * B[..., None, :]).sum(-1)
        gradients = (
            delta * GB,
            u * GB + (decayed * A).sum(-1),
            (G * (delta * u)[..., None]).sum(-2),
            (dy[..., None] * states).sum(-2),
        )
        return (a[0] * G[0], dA + (decayed * delta[..., None]).sum((0, 1))), gradients

    dy, dlast = cotangents
    (_, dA), gradients = jax.lax.scan(
        body, (dlast, jnp.zeros_like(A)), (*_cut(chunk, u, delta, B, C, dy), starts), reverse=True
    )
    du, ddelta, dB, dC = (x.reshape(-1, *x.shape[2:]) for x in gradients)
    return du, ddelta, dA, dB, dC


_chunked.defvjp(_forward_rule, _backward_rule)


def _kernel(
    chunk: int,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    y: Any,
    last: Any,
    starts: Any,
) -> None:
    """One sample, group and block of channels: the state stays on chip while time runs.

    u, delta, y (L, p); A, last (p, n); B, C (L, n); starts (L / chunk, p, n).
    """
    rates = A[...]

    def step(t: jax.Array, h: jax.Array) -> jax.Array:
        d = delta[t, :][:, None]
        h = jnp.exp(d * rates) * h + d * u[t, :][:, None] * B[t, :][None]
        y[t, :] = (h * C[t, :][None]).sum(-1)
        return h

    def one_chunk(i: jax.Array, h: jax.Array) -> jax.Array:
        starts[i, :, :] = h
        return jax.lax.fori_loop(i * chunk, (i + 1) * chunk, step, h)

    last[...] = jax.lax.fori_loop(0, starts.shape[0], one_chunk, jnp.zeros_like(rates))


def _kernel_call(
    u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_forward` by the Pallas kernel; interpreted on CPU."""
    interpreted, compiled = (functools.partial(_kernel_program, chunk, flag) for flag in (True, False))
    made: tuple[jax.Array, jax.Array, jax.Array] = _by_platform(interpreted, compiled, u, delta, A, B, C)
    return made


def _kernel_program(
    chunk: int, interpret: bool, u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    length, b, g, p = u.shape
    n, chunks, block = A.shape[-1], length // chunk, min(p, _LANES)
    channels = pl.BlockSpec((None, None, length, block), lambda i, j, k: (i, j, 0, k))
    tokens = pl.BlockSpec((None, None, length, n), lambda i, j, k: (i, j, 0, 0))
    rates = pl.BlockSpec((None, block, n), lambda i, j, k: (j, k, 0))
    state = pl.BlockSpec((None, None, block, n), lambda i, j, k: (i, j, k, 0))
    states = pl.BlockSpec((None, None, chunks, block, n), lambda i, j, k: (i, j, 0, k, 0))
    y, last, starts = pl.pallas_call(
        functools.partial(_kernel, chunk),
        grid=(b, g, pl.cdiv(p, block)),
        in_specs=[channels, channels, rates, tokens, tokens],
        out_specs=[channels, state, states],
        out_shape=[
            jax.ShapeDtypeStruct((b, g, length, p), jnp.float32),
            jax.ShapeDtypeStruct((b, g, p, n), jnp.float32),
            jax.ShapeDtypeStruct((b, g, chunks, p, n), jnp.float32),
        ],
        interpret=interpret,
    )(*(x.transpose(1, 2, 0, 3) for x in (u, delta)), A, *(x.transpose(1, 2, 0, 3) for x in (B, C)))
    return y.transpose(2, 0, 1, 3), last, starts.transpose(2, 0, 1, 3, 4)
