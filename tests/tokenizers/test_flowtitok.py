import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.network import Network
from gen.tokenizers.flowtitok import FlowTiTokConfig
from gen.tokenizers.trunk import Tower

SMALL = FlowTiTokConfig((8, 12, 3), 4, 5, 6, Tower(16, 1, 2), Tower(16, 1, 2), text=(3, 7), scan=False)


def test_the_decoder_reads_the_caption() -> None:
    params = Network(SMALL).init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1.0)
    text = jax.random.normal(jax.random.key(2), (2, 3, 7))
    posterior = jax.jit(SMALL.encode)(params, images)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 5, 6)
    decode = jax.jit(lambda z, text: SMALL.decode(params, z, cond={"text": text}))
    decoded = decode(posterior.mode(), text)
    assert (decoded.shape, decoded.dtype) == (images.shape, jnp.float32)
    other = decode(posterior.mode(), text.at[0].add(1.0))
    assert np.abs(other[0] - decoded[0]).max() > 1e-4
    np.testing.assert_allclose(other[1], decoded[1], atol=1e-6)
    with pytest.raises(GenError, match=r"reads text features \(B, \*\(3, 7\)\)"):
        jax.eval_shape(SMALL.decode, params, posterior.mode())


def test_refusals() -> None:
    with pytest.raises(GenError, match="an even number of channels"):
        dataclasses.replace(SMALL, encoder=Tower(15, 1, 3))
    with pytest.raises(GenError, match="do not divide into patches"):
        dataclasses.replace(SMALL, patch=5)
    shapes = jax.eval_shape(Network(SMALL).init, jax.random.key(0))
    with pytest.raises(GenError, match=r"this tokenizer takes \(B, 8, 12, 3\)"):
        jax.eval_shape(SMALL.encode, shapes, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(GenError, match="this tokenizer decodes"):
        jax.eval_shape(SMALL.decode, shapes, jnp.zeros((1, 4, 6)))
