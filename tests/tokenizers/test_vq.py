"""The codebook of `VQ`: averages, restarts, and what is logged of its use."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.network import Network
from gen.tokenizers.base import Quantized
from gen.tokenizers.quantizers.base import usage, within
from gen.tokenizers.quantizers.vq import VQ

AVERAGES = VQ(4, 2, averages=True, decay=0.5)


def started(config: VQ, seed: int = 0) -> Any:
    return Network(config).init(jax.random.key(seed))


def test_averages_are_means_of_the_vectors_of_a_code() -> None:
    """Statistics of halves of a batch average to the batch's, as microbatches and devices need."""
    params = started(AVERAGES)
    params["sums"] = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]) / 4
    z = jnp.array([[[2.0, 0.1]], [[4.0, -0.1]], [[0.0, -3.0]], [[0.1, 2.0]]])
    found = Network(AVERAGES)(params, z)
    np.testing.assert_array_equal(found.ids[:, 0], [0, 0, 3, 1])
    np.testing.assert_allclose(found.statistics["usage"], [3 / 8, 1 / 4, 1 / 8, 1 / 4])
    moved = {**params, **found.statistics}
    mean = (0.5 * 0.25 * np.array([1.0, 0.0]) + 0.5 * np.array([6.0, 0.0]) / 4) / (3 / 8)
    np.testing.assert_allclose(Network(AVERAGES).module(moved).codes[0], mean, rtol=1e-6)
    np.testing.assert_allclose(Network(AVERAGES).module(moved).codes[2], [-1.0, 0.0])  # unused: as it was
    halves = [Network(AVERAGES)(params, z[i : i + 2]).statistics for i in (0, 2)]
    for name, whole in found.statistics.items():
        np.testing.assert_allclose((halves[0][name] + halves[1][name]) / 2, whole, rtol=1e-6)
    assert set(found.losses) == {"commitment"}


@pytest.mark.parametrize("averages", [False, True])
def test_random_restart_starts_from_the_data_and_revives_dead_codes(averages: bool) -> None:
    config = VQ(4, 2, averages=averages, restart="random")
    net, params = Network(config), started(config)
    z = 5.0 + jax.random.normal(jax.random.key(1), (8, 3, 2))
    keys = jax.random.split(jax.random.key(2), 8)
    params |= net(params, z, keys).statistics
    codes, vectors = np.asarray(net.module(params).codes), np.asarray(z.reshape(-1, 2))
    distance = np.abs(codes[:, None] - vectors).max(axis=-1)
    np.testing.assert_allclose(distance.min(axis=1), 0.0, atol=1e-5)
    assert len(set(distance.argmin(axis=1))) == 4
    if averages:
        params["sums"] = params["sums"] * (4 * jnp.array([0.5, 0.5, 0.001, 0.001]))[:, None]
    params["usage"] = jnp.array([0.5, 0.5, 0.001, 0.001])
    np.testing.assert_allclose(net.module(params).codes, codes, rtol=1e-6)
    after = {**params, **net(params, 5.0 - z, jax.random.split(jax.random.key(3), 8)).statistics}
    moved = np.abs(np.asarray(net.module(after).codes) - codes).max(axis=1)
    assert (moved > 0.5).tolist() == [False, False, True, True]
    assert "offset" not in net(params, z).statistics  # without keys nothing is drawn


def test_unit_vectors_and_losses() -> None:
    config = VQ(6, 3, normalize=True)
    z = jax.random.normal(jax.random.key(0), (2, 4, 3))
    found = Network(config)(started(config), z)
    np.testing.assert_allclose(np.linalg.norm(found.codes, axis=-1), 1.0, rtol=1e-6)
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    expected = np.square(unit - found.codes).mean(axis=(1, 2))
    np.testing.assert_allclose(found.losses["commitment"], expected, rtol=1e-5)
    np.testing.assert_allclose(found.losses["codebook"], expected, rtol=1e-5)


def test_usage_of_tokens_and_of_bits() -> None:
    found = usage(jnp.array([[0, 0, 1, 1], [2, 2, 3, 3]]), 8)
    assert {name: float(value) for name, value in found.items()} == {"usage": 0.5, "entropy": 2.0, "perplexity": 4.0}
    bits = usage(jnp.array([[0, 1, 1, 0], [1, 0, 1, 0]], jnp.uint8), None)
    assert {name: float(value) for name, value in bits.items()} == pytest.approx(
        {"usage": 0.5, "entropy": 0.5, "perplexity": 2**0.5}
    )


def test_within_names_statistics_by_path() -> None:
    named = within("quantizer/a", Quantized(jnp.zeros(1), jnp.zeros(1), {}, {"usage": jnp.ones(2)}))
    assert list(named.statistics) == ["quantizer/a/usage"]


def test_impossible_codebooks_are_refused() -> None:
    for change in ({"vocabulary": 0}, {"decay": 1.0}, {"restart": "never"}):
        with pytest.raises(GenError):
            dataclasses.replace(AVERAGES, **change)
