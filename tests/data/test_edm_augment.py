"""EDM's augmentation: strengths, grey images and refusals; the official numbers are in the parity tests."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.edm_augment import EDMAugment
from gen.errors import GenError

X = jax.random.uniform(jax.random.key(0), (3, 8, 8, 3), minval=-1.0)
OFF = EDMAugment(p=1.0, xflip=0.0, yflip=0.0, scale=0.0, rotate=0.0, anisotropic=0.0, translate=0.0)
COLOUR = dataclasses.replace(OFF, brightness=1.0, contrast=1.0, lumaflip=1.0, hue=1.0, saturation=1.0)


@pytest.mark.parametrize(
    ("operation", "draw", "strength"),
    [
        ("scale", "w", {"scale_std": 0.4}),
        ("anisotropic", "w", {"anisotropic_std": 0.4}),
        ("translate", "x", {"translate_std": 0.25}),
        ("brightness", "w", {"brightness_std": 0.4}),
        ("contrast", "w", {"contrast_std": 1.0}),
        ("saturation", "w", {"saturation_std": 2.0}),
    ],
)
def test_twice_the_strength_is_twice_the_draw(operation: str, draw: str, strength: dict[str, float]) -> None:
    pipe = dataclasses.replace(OFF, **{operation: 1.0})
    draws = pipe.draw(jax.random.key(1), 3)
    own: dict[str, Any] = dict(draws[operation])
    if draw == "x":
        own["y"] = own["y"] * 2.0
    twice = {operation: {**own, draw: own[draw] * 2.0}}
    stronger = dataclasses.replace(pipe, **strength)
    expected, labels = pipe.apply(X, twice)
    found, own_labels = stronger.apply(X, draws)
    assert float(jnp.abs(found - X).max()) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(2.0 * own_labels, labels, atol=1e-5)


def test_ranges_of_angles_and_whole_shifts() -> None:
    narrow = dataclasses.replace(OFF, rotate=1.0, hue=1.0, rotate_max=0.25, hue_max=0.1)
    labels = narrow(jax.random.key(2), jnp.zeros((64, 4, 4, 3)))[1]
    angles = np.arctan2(labels[:, 1], labels[:, 0] + 1.0), np.arctan2(labels[:, 3], labels[:, 2] + 1.0)
    assert [round(float(np.abs(a).max() / np.pi), 1) for a in angles] == [0.2, 0.1]
    far = dataclasses.replace(OFF, translate_int=1.0, translate_int_max=2.0)  # mirrored more than once
    draws = {"translate_int": {"x": jnp.full(3, 0.9375), "y": jnp.full(3, 0.5), "gate": jnp.zeros(3)}}
    shifted, labels = far.apply(X, draws)
    np.testing.assert_array_equal(shifted, X)  # 14 columns are one period of the reflection
    np.testing.assert_allclose(labels, [[0.875, 0.0]] * 3)


def test_grey_images_are_coloured_as_rgb() -> None:
    draws = COLOUR.draw(jax.random.key(3), 3)
    grey = X[..., :1]
    expected = COLOUR.apply(jnp.repeat(grey, 3, axis=-1), draws)[0].mean(-1, keepdims=True)
    found = COLOUR.apply(grey, draws)[0]
    assert found.shape == grey.shape
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(GenError, match="translate_int_max is 0; expected a share"):
        EDMAugment(translate_int_max=0.0)
    with pytest.raises(GenError, match="must not be negative"):
        EDMAugment(hue=-1.0)
    with pytest.raises(GenError, match="need 1 or 3 channels, these images have 4"):
        COLOUR(jax.random.key(0), jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(GenError, match="quarter turns need square images, these are 4 x 6"):
        dataclasses.replace(OFF, rotate_int=1.0)(jax.random.key(0), jnp.zeros((1, 4, 6, 3)))
