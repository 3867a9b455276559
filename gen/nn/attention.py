"""Attention: the one place where softmax(q k^T) v is calculated, and the layer of self-attention made of it.

The form is chosen when a program is lowered for its device (`jax.lax.platform_dependent`), not while it is traced:
cuDNN's fused kernel on NVIDIA GPUs and the flash kernel on TPUs where their conditions hold, explicit products with a
hand-written gradient on TPUs otherwise, and plain explicit products everywhere else, for a trained bias, for a single
query over a cache, whose heads lie as these products want them, and under `gen.nn.forward_mode`: the other forms have
no Jacobian-vector product.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gen.nn.forward_mode import in_forward_mode
from gen.nn.layers import linear, xavier
from gen.nn.mesh import BATCH_AXES, ambient_parts

__all__ = ["Attention", "attention", "extend_cache", "new_cache"]

FLASH_FROM = 512  # tokens from which the TPU's flash kernel wins by the compiler's estimate
FLASH_BLOCKS = (512, 256, 128)  # tokens that it handles at a time: the first that divides
FLASH_HEAD = 256  # largest head for which its blocks fit the fast memory
CUDNN_HEAD = 128  # largest head of cuDNN's kernel on every GPU that has it


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """softmax(scale q k^T + bias) v for every head, with the softmax in float32.

    Args:
      q: (*B, N, H, D) with any number of leading axes.
      k, v: (*B, S, G, D), all of one type. G divides H: each key head serves H / G query heads that follow each other.
      mask: bool, broadcast to (*B, H, N, S): where to look; None for everywhere. Padded keys are masked by
        (*B, 1, 1, S).
      bias: float32, broadcast to (*B, H, N, S), added to the scaled products; None for none.
      scale: factor on the products; None for 1 / sqrt(D).
      causal: query i looks at the keys 0 to i alone.

    Returns:
      (*B, N, H, D) in the type of v.
    """
    given, scale = mask, q.shape[-1] ** -0.5 if scale is None else scale
    if causal:
        earlier = jnp.tri(q.shape[-3], k.shape[-3], dtype=bool)
        mask = earlier if mask is None else mask & earlier
    if bias is not None or in_forward_mode() or q.shape[-3] == 1:
        return _products(q, k, v, mask, bias, scale)
    arrays = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    mask, given = (_flat_mask(m, q.shape[:-3]) for m in (mask, given))
    forms: dict[str, Callable[..., jax.Array]] = {"tpu": functools.partial(_kept_weights, mask, scale)}
    if given is None and _fits_flash(*arrays):
        forms["tpu"] = functools.partial(_flash, causal, scale)
    if _fits_cudnn(*arrays):
        forms["cuda"] = functools.partial(_cudnn, given, causal, scale)
    plain = functools.partial(_products, mask=mask, bias=None, scale=scale)
    return jax.lax.platform_dependent(*arrays, default=plain, **forms).reshape(q.shape)


def _flat_mask(mask: jax.Array | None, lead: tuple[int, ...]) -> jax.Array | None:
    """A mask over one batch axis: (B, 1 or H, 1 or N, 1 or S)."""
    if mask is None:
        return None
    whole = jnp.broadcast_to(mask, jnp.broadcast_shapes(mask.shape, (*lead, 1, 1, 1)))
    return whole.reshape(-1, *whole.shape[-3:])


def _products(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None, scale: float
) -> jax.Array:
    """`attention` as two products; every derivative.

    The heads are moved in front of the tokens first: einsums over the given layout copy the N x S weights as well,
    which costs a CPU half of the time again. Query heads that share a key head are rows of one product.
    """
    q, k, v = (x.swapaxes(-2, -3) for x in (q, k, v))
    rows = q.reshape(*k.shape[:-2], -1, q.shape[-1])
    batch, last = tuple(range(q.ndim - 2)), q.ndim - 1
    scores = jax.lax.dot_general(rows, k, (((last,), (last,)), (batch, batch)), preferred_element_type=jnp.float32)
    scores = scores.reshape(*q.shape[:-1], -1) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(*rows.shape[:-1], -1)
    return jax.lax.dot_general(weights, v, (((last,), (last - 1,)), (batch, batch))).reshape(q.shape).swapaxes(-2, -3)


def _fits_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN's kernel takes these arrays, and jax has the CUDA plugin, which lowers it."""
    return v.dtype == jnp.bfloat16 and q.shape[-1] <= CUDNN_HEAD and q.shape[-1] % 8 == 0 and _has_cuda()


@functools.cache
def _has_cuda() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


def _cudnn(mask: jax.Array | None, causal: bool, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` by cuDNN's kernel. Its gradient wants even numbers of tokens: one that nobody looks at is added."""
    tokens, keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = None
    if mask is not None:  # the kernel does not broadcast a mask over tokens
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], tokens, keys))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, tokens % 2), (0, keys % 2)))
    elif keys % 2:
        lengths = jnp.full((len(k),), keys, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :tokens]


def _fits_flash(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether the TPU's flash kernel takes these arrays and is worth it: long sequences in bfloat16."""
    long = all(tokens >= FLASH_FROM and not tokens % FLASH_BLOCKS[-1] for tokens in (q.shape[1], k.shape[1]))
    return long and v.dtype == jnp.bfloat16 and q.shape[-1] <= FLASH_HEAD


def _flash(causal: bool, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` by the TPU's flash kernel (Dao et al. 2022, arXiv 2205.14135), which keeps no N x S weights."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # costs a second to import

    rows, columns = (next(b for b in FLASH_BLOCKS if not x.shape[1] % b) for x in (q, k))
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        use_fused_bwd_kernel=True,
    )
    shape = (q.shape[1], k.shape[1])
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    masks = splash.MultiHeadMask([mask] * q.shape[2])
    kernel = splash.make_splash_mha(masks, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    parts = ambient_parts()
    if parts > 1 and not q.shape[0] % parts:  # XLA cannot divide a kernel over devices by itself
        run = jax.shard_map(run, in_specs=P(BATCH_AXES), out_specs=P(BATCH_AXES), check_vma=False)
    return run(q, k, v)


def _repeated(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k and v with as many heads as q."""
    times = q.shape[2] // k.shape[2]
    return (k, v) if times == 1 else (jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2))


def _kept_weights(mask: jax.Array | None, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`attention` with a gradient by hand, in the order of axes that costs a TPU least.

    Kept for the gradient are e = exp(scores - maximum) in the type of v, half the bytes of what automatic
    differentiation keeps of bfloat16 products, and no second array of the size N x S; the sums of e are one more column
    of the product with v. With the head in front of the batch XLA lets the projections write their products as they
    are needed here, without copies.
    """
    q, k, v = (x.transpose(2, 0, 1, 3) for x in (q, *_repeated(q, k, v)))  # (H, B, tokens, D)
    return _weighted(q, k, v, None if mask is None else mask.swapaxes(0, 1), scale).transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, scale: float) -> jax.Array:
    return _weighted_fwd(q, k, v, mask, scale)[0]


def _weighted_fwd(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, scale: float
) -> tuple[jax.Array, Any]:
    scores = jnp.einsum("hbnd,hbsd->hbns", q, k, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    e = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    counted = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    out = jnp.einsum("hbns,hbsd->hbnd", e, counted, preferred_element_type=jnp.float32)
    out, total = out[..., :-1], out[..., -1:]
    out = (out / total).astype(v.dtype)
    return out, (q, k, v, mask, e, total, out)


def _weighted_bwd(scale: float, kept: Any, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    """With p = e / total and d = sum_D(grad out): d scores = p (grad v^T - d)."""
    q, k, v, mask, e, total, out = kept
    share = grad.astype(jnp.float32) / total
    d = (share * out.astype(jnp.float32)).sum(-1, keepdims=True)
    share = share.astype(grad.dtype)
    scores = jnp.einsum("hbnd,hbsd->hbns", share, v, preferred_element_type=jnp.float32) - d
    scores = (e.astype(jnp.float32) * scores * scale).astype(q.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, 0)
    dq = jnp.einsum("hbns,hbsd->hbnd", scores, k)
    dk = jnp.einsum("hbns,hbnd->hbsd", scores, q)
    return dq, dk, jnp.einsum("hbns,hbnd->hbsd", e, share), None


_weighted.defvjp(_weighted_fwd, _weighted_bwd)


def new_cache(layers: int, batch: int, length: int, heads: int, size: int, dtype: Any) -> dict[str, jax.Array]:
    """Keys and values of all layers before the first token: ``k`` and ``v`` (layers, batch, heads, length, size), zero.

    Heads come before tokens, as the products want them. Where a mesh is set the cache is split over batch and heads.
    """
    zeros = jnp.zeros((layers, batch, heads, length, size), dtype)
    sizes, parts = dict(jax.sharding.get_abstract_mesh().shape), ambient_parts()
    tensor = "tensor" if sizes.get("tensor", 1) > 1 and not heads % sizes["tensor"] else None
    if (parts > 1 and not batch % parts) or tensor:
        split = P(None, BATCH_AXES if not batch % parts else None, tensor)
        zeros = jax.lax.with_sharding_constraint(zeros, split)
    return {"k": zeros, "v": zeros}


def extend_cache(
    cache: Mapping[str, jax.Array], layer: jax.Array | int, k: jax.Array, v: jax.Array, at: jax.Array | int
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
    """Writes the keys and values (B, N, G, D) that a layer has of the tokens `at` to at + N - 1 into a cache.

    Carried through a loop, the cache is changed in place.

    Returns:
      The new cache; the layer's keys and values (B, S, G, D); (N, S) bool, True where a token may look: at itself and
      what came before. A step of a generator is ``cache, k, v, mask = extend_cache(cache, layer, k, v, at)``, then
      ``attention(q, k, v, mask=mask)``.
    """
    rows = {"k": k, "v": v}
    cache = {
        name: jax.lax.dynamic_update_slice(old, rows[name].swapaxes(1, 2)[None].astype(old.dtype), (layer, 0, 0, at, 0))
        for name, old in cache.items()
    }
    k, v = (jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False).swapaxes(1, 2) for name in ("k", "v"))
    return cache, k, v, jnp.arange(k.shape[1]) <= at + jnp.arange(rows["k"].shape[1])[:, None]


class Attention(nnx.Module):
    """Multi-head self-attention; one qkv projection with rows ordered q, k, v, then head, then head_dim.

    Args of the constructor:
      bias, proj_bias: whether the projection to q, k and v, and the last one, have biases.
      norm: makes the norms of q and k, each over head_dim, from (head_dim, rngs); None for none.
      scale: factor on the products of q and k; None for 1 / sqrt(head_dim).
      init, proj_init: of the weights of the projection to q, k and v, and of the last one.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        proj_bias: bool = True,
        norm: Callable[[int, nnx.Rngs], Any] | None = None,
        scale: float | None = None,
        init: Callable[..., jax.Array] = xavier,
        proj_init: Callable[..., jax.Array] = xavier,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, self.normed, self.scale = heads, norm is not None, scale
        self.qkv = linear(width, 3 * width, bias=bias, init=init, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, bias=proj_bias, init=proj_init, dtype=dtype, rngs=rngs)
        if norm is not None:
            self.q_norm, self.k_norm = norm(width // heads, rngs), norm(width // heads, rngs)

    def project(
        self, x: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k and v (B, N, H, D) of x (B, N, width), q and k normed and rotated."""
        q, k, v = _split_heads(self.qkv, x, self.heads)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return q.astype(v.dtype), k.astype(v.dtype), v

    def __call__(
        self,
        x: jax.Array,
        *,
        rotate: Callable[[jax.Array], jax.Array] | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Attends; `rotate` acts on q and k (B, N, H, D): the caller's choice of position encoding, or None."""
        q, k, v = self.project(x, rotate)
        return _join_heads(self.proj, attention(q, k, v, mask=mask, scale=self.scale))


def _split_heads(layer: nnx.Linear, x: jax.Array, heads: int) -> tuple[jax.Array, ...]:
    """q, k and v (B, N, H, D) of a projection to all three.

    A TPU calculates each by a product of its own, which writes it in the order of axes that attention wants; cutting
    one product in three costs it a copy. A CPU has it the other way round.
    """

    def together(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        del weights
        return tuple(part.reshape(*x.shape[:-1], heads, -1) for part in jnp.split(layer(x), 3, axis=-1))

    def each(x: jax.Array, kernel: jax.Array, *given: jax.Array) -> tuple[jax.Array, ...]:
        x, kernel, *bias = (a.astype(layer.dtype) for a in (x, kernel, *given))
        kernels = kernel.reshape(kernel.shape[0], 3, heads, -1)
        parts = [jnp.einsum("bnc,chd->hbnd", x, kernels[:, i]) for i in range(3)]
        for b in bias:
            parts = [p + b.reshape(3, heads, 1, 1, -1)[i] for i, p in enumerate(parts)]
        return tuple(p.transpose(1, 2, 0, 3) for p in parts)

    return jax.lax.platform_dependent(x, *_weights(layer), tpu=each, default=together)


def _join_heads(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """(B, N, width) of attention's output (B, N, H, D); on a TPU without a copy, as `_split_heads`."""

    def together(x: jax.Array, *weights: jax.Array) -> jax.Array:
        del weights
        return layer(x.reshape(*x.shape[:-2], -1))

    def each(x: jax.Array, kernel: jax.Array, *given: jax.Array) -> jax.Array:
        x, kernel, *bias = (a.astype(layer.dtype) for a in (x, kernel, *given))
        return sum(bias, jnp.einsum("bnhd,hdc->bnc", x, kernel.reshape(*x.shape[-2:], -1)))

    return jax.lax.platform_dependent(x, *_weights(layer), tpu=each, default=together)


def _weights(layer: nnx.Linear) -> list[jax.Array]:
    return [layer.kernel[...], *([] if layer.bias is None else [layer.bias[...]])]
