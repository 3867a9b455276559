import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.metrics.sources import QUANTISERS, balanced_labels, from_arrays, generated
from tests.metrics.toy import PARAMS, draw, images


def test_quantisers():
    levels = np.arange(256)
    x = jnp.asarray(levels / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(QUANTISERS["round"](x), levels)
    between = jnp.asarray((levels[:-1] + 0.75) / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(QUANTISERS["round"](between), levels[1:])
    np.testing.assert_array_equal(QUANTISERS["truncate"](between), levels[:-1])
    for quantise in QUANTISERS.values():
        np.testing.assert_array_equal(quantise(jnp.array([-9.0, 9.0])), [0, 255])


def test_balanced_labels():
    np.testing.assert_array_equal(np.bincount(balanced_labels(40, 10)), [4] * 10)


def test_a_sample_depends_on_its_seed_alone():
    labels = balanced_labels(20, 4)
    early = generated(draw, PARAMS, seeds=range(20), identity="g", labels=labels)
    late = generated(draw, PARAMS, seeds=range(5, 15), identity="g", labels=labels[5:15])
    whole = early.function(early.arguments, jnp.arange(20))
    part = jax.jit(late.function)(late.arguments, jnp.array([3, 0]))
    np.testing.assert_array_equal(part["label"], whole["label"][jnp.array([8, 5])])
    np.testing.assert_allclose(part["image"], whole["image"][jnp.array([8, 5])], atol=1e-6)
    assert (early.seeds, late.seeds) == ("0-19", "5-14")
    assert early.function == late.function  # one compiled program serves both


def test_identity_follows_the_content():
    pixels = images(8)
    one = from_arrays(pixels, np.arange(8))
    assert one.identity == from_arrays(pixels.copy(), np.arange(8)).identity
    assert one.identity != from_arrays(pixels[::-1], np.arange(8)).identity
    assert one.identity != from_arrays(pixels, np.arange(8)[::-1]).identity


def test_refuses():
    pixels = images(8)
    for call, message in (
        (lambda: from_arrays(pixels[:0]), "N > 0"),
        (lambda: from_arrays(pixels[0]), "expected \\(N, H, W, C\\)"),
        (lambda: from_arrays(pixels.astype(np.int64)), "expected uint8"),
        (lambda: from_arrays(pixels / 255.0), "need a quantiser"),
        (lambda: from_arrays(pixels, np.arange(7)), "one integer per image"),
        (lambda: from_arrays(pixels, np.arange(8.0)), "one integer per image"),
        (lambda: generated(draw, PARAMS, seeds=range(0), identity="g"), "at least one seed"),
        (lambda: generated(draw, PARAMS, seeds=range(3), identity="g", labels=np.arange(4)), "make the two agree"),
        (lambda: generated(draw, PARAMS, seeds=range(3), identity="g", quantiser="nearest"), "unknown quantiser"),
    ):
        with pytest.raises(GenError, match=message):
            call()
