"""Attention against jax's own, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.nn.attention import attention


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
