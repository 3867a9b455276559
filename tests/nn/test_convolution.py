"""Winograd's convolution against XLA's: values, derivatives of first and second order, batches, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.nn import convolution as module
from gen.nn.convolution import CONVOLUTIONS, convolution


def xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.fixture(params=[((2, 13, 10, 9), 1 << 24), ((3, 16, 7, 9), 1 << 14)], ids=str)
def given(request, monkeypatch):
    """x and a kernel, in one block of tiles or several, of even and of odd sizes."""
    shape, size = request.param
    monkeypatch.setattr(module, "_CHANNELS", 8)
    monkeypatch.setattr(module, "_KERNEL", 2)
    monkeypatch.setattr(module, "_BYTES", size)
    jax.clear_caches()
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (3, 3, shape[3], 8))


def close(found, expected) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * float(jnp.abs(b).max()))


def cubes(convolve):
    return lambda x, kernel: (convolve(x, kernel) ** 3).sum()


def test_values_and_derivatives_are_those_of_the_plain_sum(given) -> None:
    assert "forward_3x3" in str(jax.make_jaxpr(convolution)(*given))
    close(jax.jit(convolution)(*given), xla(*given))
    gradients = {f: jax.grad(cubes(f), (0, 1)) for f in (convolution, xla)}
    close(jax.jit(gradients[convolution])(*given), gradients[xla](*given))
    along = jax.tree.map(lambda a: a[::-1], given)
    forward_over_reverse = [
        jax.jit(lambda f: jax.jvp(gradients[f], given, along)[1], static_argnums=0)(f) for f in gradients
    ]
    close(*forward_over_reverse)
    norm = {f: lambda *a, f=f: sum(jnp.square(g).sum() for g in gradients[f](*a)) for f in gradients}
    close(*(jax.jit(jax.grad(norm[f], (0, 1)))(*given) for f in gradients))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_batches_of_images_and_of_kernels(given, axes) -> None:
    stacked = [a if axis is None else jnp.stack([a, 2 - a]) for a, axis in zip(given, axes, strict=True)]
    close(*(jax.jit(jax.vmap(jax.grad(cubes(f), (0, 1)), axes))(*stacked) for f in (convolution, xla)))


def test_other_shapes_types_and_strides_are_left_to_xla(given) -> None:
    x, kernel = given
    halved = convolution(x, kernel, stride=2)
    close(halved, xla(x, kernel)[:, ::2, ::2])
    close(convolution(x, kernel, padding=0), xla(x, kernel)[:, 1:-1, 1:-1])
    close(convolution(x, kernel[:1]), xla(x, kernel[:1]))
    for a, b in (
        (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)),
        (x[..., :7], kernel[:, :, :7]),
        (x[:1, :6], kernel),
    ):
        trace = str(jax.make_jaxpr(convolution)(a, b))
        assert "conv_general_dilated" in trace
        assert not any(name in trace for name in CONVOLUTIONS)


def test_a_nan_stays_in_its_image(given) -> None:
    x, kernel = given
    out = jax.jit(convolution)(x.at[0, 0, 0, 0].set(jnp.nan), kernel)
    assert bool(jnp.isnan(out[0, 0, 0]).all())
    close(out[1:], xla(x, kernel)[1:])
