"""Matrix products and dropout against jax's own or what is known of them, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gen.nn.layers import dropout, linear, matrix_product


def test_product_of_many_axes_is_that_of_einsum():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((5, 6)), jnp.float32)
    grad = lambda f: jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))(x, kernel)  # noqa: E731
    np.testing.assert_allclose(matrix_product(x, kernel), x @ kernel, atol=1e-5)
    for ours, theirs in zip(grad(matrix_product), grad(lambda x, w: jnp.einsum("abck,km->abcm", x, w)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layers_multiply_matrices_only():
    """The kernel's gradient of a product over two leading axes is slow on CPUs: a layer has none."""
    graphdef, params = nnx.split(linear(16, 24, rngs=nnx.Rngs(0)))

    def loss(params, x):
        return jnp.square(nnx.merge(graphdef, params)(x)).sum()

    text = jax.jit(jax.grad(loss)).lower(params, jnp.ones((2, 8, 16))).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert not any("2x8x" in line for line in products)


def test_dropout_zeroes_the_given_share_with_a_key_per_sample():
    x, keys = jnp.ones((2, 101, 99)), jax.random.split(jax.random.key(0), 2)
    out = np.asarray(dropout(x, 0.25, keys))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    # five standard deviations of a share of 2 x 9,999 draws
    assert abs((out == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / out.size) ** 0.5
    np.testing.assert_array_equal(out[1:], dropout(x[1:], 0.25, keys[1:]))
    assert (out[0] != out[1]).any()
