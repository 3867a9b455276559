"""Attention against jax's own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from gen.nn import attention as home
from gen.nn.attention import attention, extend_cache, new_cache
from gen.nn.layers import linear


@pytest.mark.parametrize(("masked", "biased"), [(False, False), (True, False), (True, True)])
def test_attention_is_that_of_jax(masked, biased):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 5, 3, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((2, 7, 3, 8)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.random((2, 1, 5, 7)) < 0.6).at[..., 0].set(True) if masked else None
    bias = jnp.asarray(rng.standard_normal((1, 3, 5, 7)), jnp.float32) if biased else None
    weight = jnp.asarray(rng.standard_normal((2, 5, 3, 8)), jnp.float32)

    def run(function):
        call = lambda q, k, v: function(q, k, v, mask=mask, bias=bias)  # noqa: E731
        return call(q, k, v), *jax.grad(lambda *qkv: (call(*qkv) * weight).sum(), (0, 1, 2))(q, k, v)

    expected = run(jax.nn.dot_product_attention)
    for ours, theirs in zip(run(attention), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_attention_keeps_the_type_of_v_and_its_softmax_in_float32():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 6, 2, 4)), jnp.bfloat16) for _ in range(3))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_further_leading_axes_are_batches():
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 3, 4, 2, 8)), jnp.float32) for _ in range(3))
    bias = jnp.asarray(rng.standard_normal((3, 2, 4, 4)), jnp.float32)
    expected = [jax.nn.dot_product_attention(q[:, i], k[:, i], v[:, i], bias=bias[i][None]) for i in range(3)]
    np.testing.assert_allclose(attention(q, k, v, bias=bias), jnp.stack(expected, 1), atol=2e-6)


def arrays(kv_heads=4, tokens=6, keys=6):
    rng = np.random.default_rng(5)
    q, weight = (jnp.asarray(rng.standard_normal((2, tokens, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((2, keys, kv_heads, 8)), jnp.float32) for _ in range(2))
    return q, k, v, weight


def padding(keys=6):
    return (jnp.arange(keys) < jnp.asarray([[keys], [3]]))[:, None, None]


@pytest.mark.parametrize(
    ("kv_heads", "masked", "causal"), [(4, False, False), (2, True, False), (1, False, True), (2, True, True)]
)
def test_shared_heads_padding_and_causal_masks_are_those_of_jax(kv_heads, masked, causal):
    q, k, v, _ = arrays(kv_heads)
    mask = padding() if masked else None
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
    np.testing.assert_allclose(attention(q, k, v, mask=mask, causal=causal), expected, atol=2e-6)


@pytest.mark.parametrize(("kv_heads", "masked"), [(4, False), (2, True)])
def test_the_form_of_tpus_has_the_values_and_gradients_of_plain_products(kv_heads, masked):
    q, k, v, weight = arrays(kv_heads)
    mask = padding() if masked else None

    def run(function):
        return jax.value_and_grad(lambda q, k, v: (function(q, k, v) * weight).sum(), (0, 1, 2))(q, k, v)

    ours = run(lambda q, k, v: home._kept_weights(mask, 0.4, q, k, v))
    plain = run(lambda q, k, v: home._products(q, k, v, mask, None, 0.4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, plain)


@pytest.mark.parametrize(("masked", "causal"), [(False, False), (True, False), (False, True), (True, True)])
def test_odd_numbers_of_tokens_and_padding_masks_reach_cudnn_as_it_wants_them(masked, causal, monkeypatch):
    q, k, v, weight = arrays(2, tokens=7, keys=9)
    mask = padding(9) if masked else None
    real, seen = jax.nn.dot_product_attention, []

    def kernel(q, k, v, *, mask, implementation, **options):
        assert implementation == "cudnn"
        seen.append((q.shape[1], k.shape[1], None if mask is None else mask.shape[2:]))
        return real(q, k, v, mask=mask, **options)

    def run(function):
        return jax.value_and_grad(lambda q, k, v: (function(q, k, v) * weight).sum(), (0, 1, 2))(q, k, v)

    plain = run(lambda q, k, v: attention(q, k, v, mask=mask, causal=causal, scale=0.4))
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    ours = run(lambda q, k, v: home._cudnn(mask, causal, 0.4, q, k, v))
    assert seen == [(8, 10, (8, 10) if masked else None)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, plain)


def test_a_layer_on_a_tpu_cuts_its_heads_as_elsewhere():
    rng = np.random.default_rng(6)
    layer, out = linear(8, 24, rngs=nnx.Rngs(0)), linear(8, 8, rngs=nnx.Rngs(1))
    layer.bias[...] = jnp.asarray(rng.standard_normal(24), jnp.float32)
    x = jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32)
    forms = []

    def both(*args, default, tpu):
        forms.append((default(*args), tpu(*args)))
        return default(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", both)
        home._join_heads(out, home._split_heads(layer, x, 2)[0])
    assert len(forms) == 2
    for here, there in forms:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), here, there)


def test_a_token_at_a_time_with_a_cache_is_causal_attention():
    q, k, v, _ = arrays(kv_heads=2)

    def step(cache, token):
        q, k, v, at = token
        cache, k, v, mask = extend_cache(cache, 1, k[:, None], v[:, None], at)
        return cache, attention(q[:, None], k, v, mask=mask)[:, 0]

    tokens = (*(x.swapaxes(0, 1) for x in (q, k, v)), jnp.arange(6))
    cache, out = jax.lax.scan(step, new_cache(2, 2, 6, 2, 8, jnp.float32), tokens)
    assert not cache["k"][0].any()  # another layer's
    np.testing.assert_allclose(out.swapaxes(0, 1), attention(q, k, v, causal=True), atol=2e-6)


def test_the_kernels_conditions():
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays())
    long = [jnp.zeros((1, 512, 2, 64), jnp.bfloat16)] * 3
    assert home._fits_flash(*long)
    assert not home._fits_flash(q, k, v)
    assert not home._fits_flash(*(x.astype(jnp.float32) for x in long))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "_has_cuda", lambda: True)
        assert home._fits_cudnn(q, k, v)
        assert not home._fits_cudnn(*(x[..., 1:] for x in (q, k, v)))
        assert not home._fits_cudnn(*(x.astype(jnp.float32) for x in (q, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_the_flash_kernel_interpreted_is_attention(causal):
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 512, heads, 64)), jnp.bfloat16) for heads in (2, 1, 1))
    with pltpu.force_tpu_interpret_mode():
        out = home._flash(causal, q.shape[-1] ** -0.5, q, k, v)
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), is_causal=causal)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
