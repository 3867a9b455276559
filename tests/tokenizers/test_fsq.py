import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.tokenizers.quantizers.fsq import FSQ


def test_every_id_is_the_id_of_its_code() -> None:
    """Also where a level's half is no power of two, so that the codes are rounded."""
    for levels in ((7, 5, 5, 5, 5), (2, 3, 4, 7), (8, 6, 5)):
        quantizer = FSQ(levels).build(None)
        ids = jnp.arange(FSQ(levels).vocabulary)
        codes = quantizer.embed(ids)
        assert len(np.unique(codes, axis=0)) == len(ids)
        # atanh of the code's place between the outermost levels: the input whose bound it is
        reach = (np.asarray(levels) - 1) * 1.001 / 2
        offset = np.where(np.asarray(levels) % 2 == 0, 0.5, 0.0)
        place = (np.asarray(codes) * (np.asarray(levels) // 2) + offset) / reach
        z = np.arctanh(place) - np.arctanh(offset / reach)
        np.testing.assert_array_equal(quantizer(jnp.asarray(z, jnp.float32)).ids, ids)
        np.testing.assert_array_equal(quantizer.snap(codes + 0.02).ids, ids)


def test_a_share_of_samples_is_left_unrounded() -> None:
    z = jax.random.normal(jax.random.key(0), (400, 3, 2))
    keys = jax.random.split(jax.random.key(1), len(z))
    found = FSQ((5, 5), 0.25).build(None)(z, keys)
    whole = np.asarray((found.sample(keys) == found.codes).all((1, 2)))
    assert 0.7 < whole.mean() < 0.8


@pytest.mark.parametrize("levels", [(), (1, 5), (2**16, 2**16)])
def test_levels_that_make_no_grid(levels: tuple[int, ...]) -> None:
    with pytest.raises(GenError, match="FSQ levels"):
        FSQ(levels)


def test_vectors_of_another_width() -> None:
    with pytest.raises(GenError, match="3 channels, and FSQ has levels for 2"):
        FSQ((5, 5)).build(None)(jnp.zeros((1, 4, 3)))
