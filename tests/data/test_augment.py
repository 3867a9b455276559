import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.data.augment import RandomAffine, affine
from gen.errors import GenError

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(-1, 1, size=(3, 6, 8, 2)), jnp.float32)
EYE = jnp.tile(jnp.eye(2), (3, 1, 1))


def test_identity_changes_nothing() -> None:
    np.testing.assert_array_equal(affine(IMAGES, EYE, jnp.zeros((3, 2))), IMAGES)
    unchanged = RandomAffine(shift=0, rotate=0, scale=0)(jax.random.key(0), IMAGES)
    np.testing.assert_array_equal(unchanged, IMAGES)


def test_whole_shifts_move_pixels_and_fill() -> None:
    out = affine(IMAGES, EYE, jnp.tile(jnp.array([1.0, -2.0]), (3, 1)), fill=0.25)
    np.testing.assert_array_equal(out[:, :-1, 2:], IMAGES[:, 1:, :-2])
    np.testing.assert_array_equal(out[:, -1], 0.25)
    np.testing.assert_array_equal(out[:, :, :2], 0.25)


def test_far_outside_is_fill() -> None:
    np.testing.assert_array_equal(affine(IMAGES, EYE, jnp.full((3, 2), 100.0)), -1.0)


def test_half_shifts_average_neighbours() -> None:
    out = affine(IMAGES, EYE, jnp.tile(jnp.array([0.0, 0.5]), (3, 1)))
    np.testing.assert_allclose(out[:, :, :-1], (IMAGES[:, :, 1:] + IMAGES[:, :, :-1]) / 2, atol=1e-6)


def test_quarter_turn_is_exact() -> None:
    square = IMAGES[:, :, :6]
    turn = jnp.tile(jnp.array([[0.0, 1.0], [-1.0, 0.0]]), (3, 1, 1))
    np.testing.assert_array_equal(affine(square, turn, jnp.zeros((3, 2))), jnp.rot90(square, axes=(1, 2)))


def test_random_maps_are_small_differ_by_image_and_follow_the_key() -> None:
    images = jnp.tile(jnp.asarray(RNG.uniform(-1, 1, (1, 8, 8, 1)), jnp.float32), (16, 1, 1, 1))
    augment = jax.jit(RandomAffine())
    out = np.asarray(augment(jax.random.key(3), images))
    assert out.shape == images.shape
    assert out.min() >= -1
    assert out.max() <= 1
    assert len(np.unique(out.reshape(16, -1), axis=0)) == 16
    np.testing.assert_array_equal(out, augment(jax.random.key(3), images))
    assert np.abs(out - augment(jax.random.key(4), images)).max() > 0.01


def test_ranges_of_each_option() -> None:
    """A ramp shows the map: its value is the source coordinate."""
    size, count = 33, 400
    ramp = jnp.arange(size, dtype=jnp.float32) - size // 2
    y, x = jnp.broadcast_to(ramp[:, None], (size, size)), jnp.broadcast_to(ramp, (size, size))
    images = jnp.tile(jnp.stack([y, x], -1)[None], (count, 1, 1, 1))
    key, middle = jax.random.key(0), size // 2

    shift = np.asarray(RandomAffine(2.0, 0, 0)(key, images))[:, middle, middle]
    assert np.abs(shift).max() <= 2
    assert np.abs(shift).max() > 1.9

    turned = np.asarray(RandomAffine(0, 30.0, 0)(key, images))[:, middle, middle + 8]
    angles = np.rad2deg(np.arctan2(turned[:, 0], turned[:, 1]))
    np.testing.assert_allclose(np.hypot(turned[:, 0], turned[:, 1]), 8, rtol=1e-3)
    assert 28 < np.abs(angles).max() <= 30.01

    scaled = np.asarray(RandomAffine(0, 0, 0.25)(key, images))[:, middle, middle + 8, 1] / 8
    assert 1 / 1.25 - 1e-3 <= scaled.min() < 0.82
    assert 1.22 < scaled.max() <= 1.25 + 1e-3


def test_config() -> None:
    config = RandomAffine(shift=1.0, fill=0.0)
    assert from_json(to_json(config)) == config
    with pytest.raises(GenError, match="must not be negative"):
        RandomAffine(rotate=-1)
