"""What the golden numbers of the discriminators do not say: sizes, whole networks, the losses' own identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.adversarial import r1_penalty
from gen.nn.discriminators import PatchGAN, StyleGAN, TiTokDiscriminator, adaptive_max_pool
from gen.nn.network import Network, count, param_shapes
from gen.nn.token_discriminator import TokenDiscriminator
from gen.training.part import with_buffers


@pytest.mark.parametrize(
    ("config", "parameters", "logits"),
    [
        (PatchGAN(), 2_765_633 + 2 * (128 + 256 + 512), (2, 30, 30)),  # and batch norm's running averages
        (TiTokDiscriminator(), 1_909_889, (2, 16, 16)),  # 1.91M
        (StyleGAN(), None, (2, 1)),
        (StyleGAN((32, 3), multiplier=0.25, group=2), None, (2, 1)),
    ],
)
def test_sizes(config, parameters, logits):
    shapes = param_shapes(config)
    side = config.image[0] if isinstance(config, StyleGAN) else 256
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    found, statistics = jax.eval_shape(Network(config), shapes, images)
    assert (found.shape, found.dtype) == (logits, jnp.float32)
    assert set(statistics) == Network(config).buffers
    assert parameters is None or count(shapes) == parameters


def test_minibatch_deviation_sees_the_batch():
    config = StyleGAN((8, 1), multiplier=1 / 64, group=2)
    params = Network(config).init(jax.random.key(0))
    a, b, c = jax.random.normal(jax.random.key(1), (3, 1, 8, 8, 1))
    pair = Network(config)(params, jnp.concatenate([a, b]))[0]
    other = Network(config)(params, jnp.concatenate([a, c]))[0]
    assert abs(float(pair[0, 0] - other[0, 0])) > 1e-6
    with pytest.raises(GenError, match="groups of 2"):
        Network(config)(params, jnp.concatenate([a, b, c]))


def test_adaptive_pool_of_fewer_pixels_repeats_them():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_array_equal(adaptive_max_pool(x, 6), x.repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(adaptive_max_pool(x, 1)[0, 0, 0], [8.0])


def test_r1_of_a_linear_discriminator_is_its_squared_length():
    direction = jnp.array([1.0, -2.0, 0.5])
    penalty = r1_penalty(lambda x: (x @ direction)[:, None], jnp.ones((4, 3)))
    np.testing.assert_allclose(penalty, 0.5 * jnp.square(direction).sum(), rtol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    for make, message in (
        (lambda: StyleGAN((48, 3)), "power of two"),
        (lambda: TiTokDiscriminator(width=48), "multiple of 32"),
        (lambda: PatchGAN(layers=0), "positive"),
    ):
        with pytest.raises(GenError, match=message):
            make()


def test_heads_on_tokens_are_spectrally_normalised_and_know_no_first_token():
    config = TokenDiscriminator(width=6, heads=2, kernel=3)
    params = jax.jit(Network(config).init)(jax.random.key(0))
    tokens = list(jax.random.normal(jax.random.key(1), (2, 3, 5, 6)))
    call = jax.jit(Network(config))
    logits, statistics = call(params, tokens)
    assert logits.shape == (3, 10)
    assert set(statistics) == Network(config).buffers
    rolled, _ = call(params, [jnp.roll(x, 1, axis=1) for x in tokens])
    np.testing.assert_allclose(rolled[:, :5], jnp.roll(logits[:, :5], 1, axis=1), atol=1e-5)
    for _ in range(60):  # power iterations
        params = with_buffers(params, call(params, tokens)[1])
    kernel = np.asarray(params["heads"]["head0"]["second"]["kernel"]).reshape(-1, 6)
    left = np.asarray(params["heads"]["head0"]["second"]["left"])
    np.testing.assert_allclose(np.linalg.norm(kernel @ left), np.linalg.norm(kernel, 2), rtol=1e-3)
    with pytest.raises(GenError, match="one for each"):
        Network(config)(params, tokens[:1])
