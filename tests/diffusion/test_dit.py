"""The DiT backbone: published sizes, initialisation, one and two dimensions, one and two times, taps, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.dit import SIZES, DiTConfig, dit
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes

TINY = DiTConfig((4, 6), 3, 2, 16, 3, 2, num_classes=5, remat="none")
# parameters at 32 x 32 x 4, learned variance, 1000 classes and null, for patch 2, 4, 8 (computed from the official
# constructors, without the fixed position table)
COUNTS = {
    "S": (32_865_056, 32_920_448, 33_142_016),
    "B": (130_315_808, 130_426_496, 130_869_248),
    "L": (457_840_672, 457_988_224, 458_578_432),
    "XL": (674_834_720, 675_000_704, 675_664_640),
}


@functools.cache
def noisy(config: DiTConfig, seed: int = 0):
    """Parameters with nothing left at zero."""
    params = Network(config).init(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), params)


def inputs(config: DiTConfig, batch: int = 2):
    x = jax.random.normal(jax.random.key(7), (batch, *config.size, config.channels))
    times = tuple(jnp.linspace(0.0, 1.0, batch) * (i + 1) for i in range(config.times))
    return x, times, {"label": jnp.arange(batch, dtype=jnp.int32)}


@pytest.mark.parametrize("family", SIZES)
def test_published_parameter_counts(family: str) -> None:
    assert tuple(count(param_shapes(dit(f"{family}/{p}"))) for p in (2, 4, 8)) == COUNTS[family]


def test_initial_network_is_zero_and_its_blocks_the_identity() -> None:
    net = Network(TINY)
    x, times, cond = inputs(TINY)
    out, features = net(net.init(jax.random.key(0)), x, times, cond, taps=("tokens", "block_0", "block_2"))
    np.testing.assert_array_equal(out, np.zeros((2, 4, 6, 3)))
    np.testing.assert_array_equal(features["block_2"], features["tokens"])
    params = net.init(jax.random.key(0))
    assert abs(float(params["label"]["embedding"].std()) - 0.02) < 0.004
    assert abs(float(params["time"]["fc1"]["kernel"].std()) - 0.02) < 0.004
    bound = np.sqrt(6 / (16 + 48))
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    assert 0.95 * bound < float(jnp.abs(kernel).max()) <= bound
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(TINY, size=(5,), patch=1, times=2), dataclasses.replace(TINY, learned_variance=True)],
    ids=["sequence", "image"],
)
def test_every_parameter_and_input_matters(config: DiTConfig) -> None:
    net, params = Network(config), noisy(config)
    x, times, cond = inputs(config, 3)

    def loss(params, x, times):
        out, _ = net(params, x, times, cond)
        return (out * jax.random.normal(jax.random.key(1), out.shape)).sum()

    out = jax.eval_shape(net, params, x, times, cond)[0]
    assert out.shape == (3, *config.size, config.channels * (2 if config.learned_variance else 1))
    assert out.dtype == jnp.float32
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, times)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(gradient).max()) > 0, jax.tree_util.keystr(path)


def test_samples_of_a_batch_are_independent() -> None:
    net, params = Network(TINY), noisy(TINY)
    x, times, cond = inputs(TINY, 3)
    whole, _ = net(params, x, times, cond)
    one, _ = net(params, x[1:2], (times[0][1:2],), {"label": cond["label"][1:2]})
    np.testing.assert_allclose(one[0], whole[1], rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_keeps_float32_outside() -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    net, params = Network(config), noisy(TINY)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(param_shapes(config)))
    x, times, cond = inputs(TINY)
    low, features = net(params, x, times, cond, taps=("block_1",))
    high, _ = Network(TINY)(params, x, times, cond)
    assert low.dtype == features["block_1"].dtype == jnp.float32
    error = float(jnp.abs(low - high).max() / jnp.abs(high).max())
    assert 1e-5 < error < 0.05


def test_stop_ends_at_the_last_tap() -> None:
    """Later weights are not read: they may even be NaN."""
    params = noisy(TINY)
    x, times, cond = inputs(TINY)
    _, expected = Network(TINY)(params, x, times, cond, taps=("tokens", "block_1"))
    broken = {**params, "blocks": jax.tree.map(lambda a: a.at[2].set(jnp.nan), params["blocks"])}
    out, features = Network(TINY)(broken, x, times, cond, taps=("tokens", "block_1"), stop=True)
    np.testing.assert_allclose(features["block_1"], expected["block_1"], rtol=1e-5)
    np.testing.assert_array_equal(out, features["block_1"])
    out, features = Network(TINY)(broken, x, times, cond, taps=("tokens",), stop=True)
    np.testing.assert_array_equal(features["tokens"], expected["tokens"])


def test_null_label() -> None:
    net, params = Network(TINY), noisy(TINY)
    null = net.apply(params, {"label": jnp.array([1, 4]), "more": jnp.ones(2)}, method="null")
    np.testing.assert_array_equal(null["label"], [5, 5])
    assert "more" in null
    assert param_shapes(TINY)["label"]["embedding"].shape[0] == 6
    for changes, message in (({"null_class": False}, "no null class"), ({"num_classes": 0}, "is unconditional")):
        bare = dataclasses.replace(TINY, **changes)
        with pytest.raises(GenError, match=message):
            Network(bare).apply(Network(bare).init(jax.random.key(0)), {"label": jnp.array([1])}, method="null")


def test_unconditional_network_reads_no_label() -> None:
    config = dataclasses.replace(TINY, num_classes=0)
    params = noisy(config)
    x, times, _ = inputs(config)
    assert "label" not in params
    assert Network(config)(params, x, times, {})[0].shape == x.shape


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"size": (5, 4)}, "cut evenly by patch 2"),
        ({"size": (4, 4, 4)}, "size"),
        ({"heads": 3}, "divisible by heads 3"),
        ({"width": 18}, "multiple of 4"),
    ],
)
def test_numbers_that_do_not_fit(changes, part: str) -> None:
    with pytest.raises(GenError, match=part):
        dataclasses.replace(TINY, **changes)


def test_calls_that_do_not_fit() -> None:
    net, params = Network(TINY), Network(TINY).init(jax.random.key(0))
    x, times, cond = inputs(TINY)
    with pytest.raises(GenError, match=r"input is \(4, 4, 3\); expected \(4, 6, 3\)"):
        net(params, x[:, :, :4], times, cond)
    with pytest.raises(GenError, match="given 2 times; expected 1"):
        net(params, x, times * 2, cond)
    with pytest.raises(GenError, match="no feature 'block_3'; did you mean 'block_"):
        net(params, x, times, cond, taps=("block_3",))
    with pytest.raises(GenError, match="no control 'skip'"):
        net(params, x, times, cond, controls={"skip": jnp.ones(1)})
    with pytest.raises(GenError, match="unknown DiT size 'XXL/2'"):
        dit("XXL/2")
    with pytest.raises(GenError, match="did you mean 'B/"):
        dit("B/3")
