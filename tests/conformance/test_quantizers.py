"""One suite over every registered quantizer; an example is made as for every other member."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.arrays import flatten
from gen.config import from_json, to_json
from gen.kinds import KINDS
from gen.nn.network import Network
from tests.conformance import examples

BATCH, GRID = 4, (2, 3)

every_quantizer = pytest.mark.parametrize("kind", KINDS["quantizer"])


def built(kind: str) -> tuple[Any, Network, Any, jax.Array, jax.Array]:
    """(config, network, parameters, vectors, keys) of the example of a kind."""
    config = examples.example(kind)
    z = 0.5 * jax.random.normal(jax.random.key(1), (BATCH, *GRID, config.width))
    return config, Network(config), Network(config).init(jax.random.key(0)), z, jax.random.split(jax.random.key(2), 4)


@every_quantizer
def test_ids_and_codes_go_both_ways(kind: str) -> None:
    config, net, params, z, keys = built(kind)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    found = jax.jit(net)(params, z, keys)
    assert found.codes.shape == z.shape
    assert found.codes.dtype == jnp.float32
    if config.kind == "bits":
        assert (config.vocabulary, found.ids.dtype, found.ids.shape) == (None, jnp.uint8, z.shape)
        assert set(np.unique(found.ids)) <= {0, 1}
    else:
        assert (found.ids.dtype, found.ids.shape[0]) == (jnp.int32, BATCH)
        assert 0 <= int(found.ids.min()) <= int(found.ids.max()) < config.vocabulary
    embedded = net.apply(params, found.ids, method="embed")
    np.testing.assert_allclose(embedded, found.codes, atol=1e-6)
    np.testing.assert_array_equal(net.apply(params, embedded, method="snap").ids, found.ids)
    for i in range(BATCH):  # an image's ids are its own
        np.testing.assert_array_equal(net(params, z[i : i + 1], keys[i : i + 1]).ids[0], found.ids[i])


@every_quantizer
def test_gradients_reach_the_encoder(kind: str) -> None:
    _, net, params, z, keys = built(kind)
    weights = jax.random.normal(jax.random.key(3), z.shape)
    grad = jax.grad(lambda z: (weights * net(params, z, keys).codes).sum())(z)
    assert np.isfinite(grad).all()
    assert (np.abs(grad).reshape(BATCH, -1).max(axis=1) > 0).all()


@every_quantizer
def test_losses_and_statistics(kind: str) -> None:
    """Losses are one an image; statistics are new values of buffers."""
    _, net, params, z, keys = built(kind)
    found = net(params, z, keys)
    for loss in found.losses.values():
        assert loss.shape == (BATCH,)
        assert np.isfinite(loss).all()
    assert set(found.statistics) <= net.buffers
    for path, value in found.statistics.items():
        assert value.shape == flatten(params)[path].shape
