import jax
import jax.numpy as jnp
import pytest

from gen.errors import GenError
from gen.nn.network import count, param_shapes
from gen.tokenizers.detok import DeTokConfig, LatentDenoising, detok
from gen.tokenizers.trunk import Tower


def test_published_size() -> None:
    """DeTok-BB has 172 M parameters (readme of the release)."""
    assert round(count(param_shapes(detok("B-B"))) / 1e6) == 172
    assert detok("B-B").spec.shape == (16, 16, 16)


def test_refusals() -> None:
    with pytest.raises(GenError, match="unknown l-DeTok 'B'; did you mean 'S-B'"):
        detok("B")
    with pytest.raises(GenError, match="250x256 pixels do not divide into patches of 16x16"):
        detok("B-B", image=(250, 256, 3))
    with pytest.raises(GenError, match="rotary positions need heads of 8, 12"):
        DeTokConfig((8, 8, 3), 4, 2, Tower(24, 1, 4), Tower(32, 1, 4))
    with pytest.raises(GenError, match=r"the mask is in \[0, 1\)"):
        LatentDenoising(mask=1.0)
    small = DeTokConfig((8, 8, 3), 4, 2, Tower(32, 1, 4), Tower(32, 1, 4))
    shapes = param_shapes(small)
    with pytest.raises(GenError, match=r"this l-DeTok takes \(B, 8, 8, 3\)"):
        jax.eval_shape(small.encode, shapes, jnp.zeros((1, 8, 4, 3)))
    with pytest.raises(GenError, match="this l-DeTok decodes"):
        jax.eval_shape(small.decode, shapes, jnp.zeros((1, 2, 2, 3)))
