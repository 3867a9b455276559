"""Matrix products and dropout against jax's own or what is known of them, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.nn.layers import dropout, linear, matrix_product, run_stack, stack


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


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_stack_is_its_blocks_in_turn(scan, remat):
    """Masks by layer, outputs of every layer and of chosen ones, values and gradients."""
    blocks = stack(lambda rngs: linear(4, 4, rngs=rngs), 3, nnx.Rngs(0))
    graphdef, weights = nnx.split(blocks)
    mask, x = jnp.array([1.0, 0.5, 0.0]), jax.random.normal(jax.random.key(1), (2, 4))

    def by_stack(weights, mask, **options):
        def call(block, x, extra):
            branch = extra["mask"] * jnp.tanh(block(x))
            return x + branch, {"branch": branch}

        extra = {"mask": mask}
        return run_stack(nnx.merge(graphdef, weights), x, call, per_layer=extra, remat=remat, scan=scan, **options)

    def by_hand(weights, mask):
        kernel, bias = (nnx.to_pure_dict(weights)[name] for name in ("kernel", "bias"))
        outputs, branches, y = [], [], x
        for i in range(3):
            branches.append(mask[i] * jnp.tanh(y @ kernel[i] + bias[i]))
            y = y + branches[-1]
            outputs.append(y)
        return outputs, jnp.stack(branches)

    def gradients(function):
        return jax.jit(jax.grad(lambda *args: jnp.square(function(*args)).sum(), (0, 1)))(weights, mask)

    outputs, branches = by_hand(weights, mask)
    for options, last in (({}, 2), ({"keep": (0, 2)}, 2), ({"keep": (0,), "stop": 2}, 1)):
        found = by_stack(weights, mask, **options)
        np.testing.assert_allclose(found.x, outputs[last], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.outputs["branch"], branches[: last + 1], rtol=1e-5, atol=1e-6)
        assert set(found.kept) == set(options.get("keep", ()))
        for i, kept in found.kept.items():
            np.testing.assert_allclose(kept, outputs[i], rtol=1e-5, atol=1e-6)
    expected = gradients(lambda *args: by_hand(*args)[0][-1])
    actual = gradients(lambda *args: by_stack(*args).x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
