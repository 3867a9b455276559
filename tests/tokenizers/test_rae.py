import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.features.mae import mae
from gen.features.vit import ViTConfig
from gen.nn.network import Network, count, param_shapes
from gen.tokenizers.rae import LatentNoise, RAEConfig, rae
from gen.tokenizers.trunk import Tower

SMALL = RAEConfig((12, 12, 3), 6, ViTConfig(16, 4, 16, 1, 2, 16, registers=1, affine=False), Tower(8, 1, 2), 16)


def test_published_sizes() -> None:
    """The decoder XL has about 415 M parameters; the encoder is DINOv2-B with registers, without its last norm."""
    shapes = param_shapes(rae("XL"))
    assert round(count(shapes["decoder"]) / 1e6) == 415
    assert count(shapes["encoder"]) == 86_580_480 + 4 * 768 - 2 * 768
    assert rae("XL").spec.shape == (16, 16, 768)
    with pytest.raises(GenError, match="unknown RAE decoder 'S'"):
        rae("S")


def test_an_encoder_of_patches_of_16_sees_the_image_itself() -> None:
    config = rae("B", encoder=mae("B", affine=False, eps=1e-12))
    assert config.grid[0] * config.encoder.patch == config.image[0]


def test_noise_is_each_sample_s_own_and_the_encoder_has_no_gradient() -> None:
    params = jax.jit(Network(SMALL).init)(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, 12, 12, 3), minval=-1.0)
    training, keys = LatentNoise(0.8), jax.random.split(jax.random.key(2), 3)
    draws = training.draw(SMALL, keys)
    np.testing.assert_array_equal(draws.noise[1:2], training.draw(SMALL, keys[1:2]).noise)
    assert draws.level.shape == (3, 1, 1, 1)

    def loss(params: dict) -> jax.Array:
        _, latents = training.encode(SMALL, params, images, draws)
        decoded = training.decode(SMALL, params, latents, draws)
        return jnp.square(decoded - images).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["encoder"]))
    assert np.asarray(gradient["decoder"]["head"]["kernel"]).any()
    clean = jax.jit(SMALL.encode)(params, images)
    np.testing.assert_array_equal(clean.sample(keys), clean.mode())
    noise = training.latents(clean, draws) - clean.mode()
    np.testing.assert_allclose(noise, 0.8 * draws.level * draws.noise, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(GenError, match="an RAE takes squares"):
        dataclasses.replace(SMALL, image=(12, 24, 3))
    with pytest.raises(GenError, match="do not divide into patches"):
        dataclasses.replace(SMALL, patch=5)
    with pytest.raises(GenError, match="is at least 0"):
        LatentNoise(-1.0)
    shapes = param_shapes(SMALL)
    with pytest.raises(GenError, match=r"this RAE takes \(B, 12, 12, 3\)"):
        jax.eval_shape(SMALL.encode, shapes, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(GenError, match="this RAE decodes"):
        jax.eval_shape(SMALL.decode, shapes, jnp.zeros((1, 2, 2, 3)))
