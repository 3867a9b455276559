"""EDM's U-Nets: published sizes, initialisation, two times, dropout, precision, and what they refuse."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.edm_blocks import fir_down, fir_up
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig, SongUNetConfig
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes

SONG = SongUNetConfig(8, width=8, mult=(1, 2), emb=2, blocks=1, attention=(4,), num_classes=3, augment=2)
ADM = DhariwalUNetConfig(8, width=32, mult=(1, 2), emb=1, blocks=1, attention=(4,), num_classes=3)
CIFAR = SongUNetConfig(augment=9)
NCSN = {"embedding": "fourier", "noise": 2, "encoder": "residual", "taps": (1, 3, 3, 1)}
WIDE = SongUNetConfig(64, mult=(1, 2, 2, 2), augment=9)
# of the official classes, and NCSN++'s 128 fixed frequencies, which are a buffer
COUNTS = [
    (CIFAR, 55_733_891),
    (dataclasses.replace(CIFAR, num_classes=10), 55_735_299),
    (dataclasses.replace(CIFAR, **NCSN), 56_397_827 + 128),
    (dataclasses.replace(CIFAR, **NCSN, num_classes=10), 56_400_643 + 128),
    (WIDE, 61_805_571),
    (dataclasses.replace(WIDE, **NCSN), 62_761_091 + 128),
    (DhariwalUNetConfig(), 295_899_267),
    (DhariwalUNetConfig(out_channels=6), 295_904_454),
]


@pytest.mark.parametrize(("config", "expected"), COUNTS)
def test_published_parameter_counts(config: Any, expected: int) -> None:
    assert count(param_shapes(config)) == expected
    assert from_json(to_json(config)) == config


def inputs(config: Any, batch: int = 2) -> tuple[jax.Array, tuple[jax.Array, ...], dict[str, jax.Array]]:
    x = jax.random.normal(jax.random.key(7), (batch, config.size, config.size, config.channels))
    times = tuple(jnp.linspace(-1.0, 1.0, batch) + i for i in range(config.times))
    cond = {"label": jnp.arange(batch, dtype=jnp.int32) % 3, "augment": jnp.ones((batch, config.augment))}
    return x, times, cond if config.augment else {"label": cond["label"]}


@functools.cache
def noisy(config: Any) -> Any:
    """Parameters with nothing left at zero."""
    params = Network(config).init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), params)


@functools.cache
def forward(config: Any) -> Any:
    return jax.jit(lambda p, x, times, cond, controls: Network(config)(p, x, times, cond, controls=controls)[0])


def test_initialisation() -> None:
    params = Network(ADM).init(jax.random.key(0))
    x, times, cond = inputs(ADM)
    np.testing.assert_array_equal(forward(ADM)(params, x, times, cond, None), np.zeros_like(x))
    label = params["map"]["label"]["kernel"]
    assert abs(float(label.std()) - 1.0) < 0.2
    kernel = params["enc"]["8x8_block0"]["conv0"]["kernel"]
    bound = math.sqrt(1 / 3) * math.sqrt(3 / (9 * 32))
    assert 0.95 * bound < float(jnp.abs(kernel).max()) <= bound
    bias = params["enc"]["8x8_block0"]["conv0"]["bias"]
    assert 0.0 < float(jnp.abs(bias).max()) <= bound
    song = Network(SONG).init(jax.random.key(0))["enc"]["4x4_block0"]
    bound = math.sqrt(6 / (9 * 8 + 9 * 16))
    assert 0.95 * bound < float(jnp.abs(song["conv0"]["kernel"]).max()) <= bound
    assert float(jnp.abs(song["conv1"]["kernel"]).max()) < 1e-5
    assert not song["conv0"]["bias"].any()
    assert float(jnp.abs(song["qkv"]["kernel"]).max()) <= math.sqrt(0.2 * 6 / (16 + 48))


def test_dropout_belongs_to_the_sample_and_to_training() -> None:
    config = dataclasses.replace(SONG, dropout=0.5)
    x, times, cond = inputs(config, 3)
    params = noisy(config)
    still = forward(config)(params, x, times, cond, None)
    np.testing.assert_array_equal(forward(config)(params, x, times, cond, None), still)
    keys = jax.random.split(jax.random.key(3), 3)
    one = forward(config)(params, x, times, {**cond, "dropout": keys}, None)
    assert (np.abs(one - still).max((1, 2, 3)) > 1e-3).all()
    other = jnp.stack([keys[0], keys[2], keys[2]])
    two = forward(config)(params, x, times, {**cond, "dropout": other}, None)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(two[1] - one[1]).max()) > 1e-3


def test_bfloat16_stays_near() -> None:
    x, times, cond = inputs(SONG)
    full = forward(SONG)(noisy(SONG), x, times, cond, None)
    half = dataclasses.replace(SONG, dtype="bfloat16")
    near = forward(half)(noisy(SONG), x, times, cond, None)
    assert near.dtype == jnp.float32
    assert float(jnp.abs(near - full).max()) < 0.1 * float(jnp.abs(full).max())


def test_skip_factors_of_one_change_nothing() -> None:
    x, times, cond = inputs(ADM)
    params = noisy(ADM)
    plain = forward(ADM)(params, x, times, cond, None)
    scaled = [forward(ADM)(params, x, times, cond, {"skips": jnp.full(4, s)}) for s in (1.0, 0.0)]
    np.testing.assert_allclose(scaled[0], plain, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(scaled[1] - plain).max()) > 1e-2


def test_resampling_of_constants_and_its_transpose() -> None:
    ones = jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(fir_up(fir_down(ones, (1, 1)), (1, 1)), ones, rtol=1e-6)
    np.testing.assert_allclose(fir_down(ones, (1, 3, 3, 1))[0, 1:-1, 1:-1], 1.0, rtol=1e-6)
    x, y = jax.random.normal(jax.random.key(0), (1, 8, 8, 1)), jax.random.normal(jax.random.key(1), (1, 4, 4, 1))
    inner = (fir_down(x, (1, 3, 3, 1)) * y).sum()
    np.testing.assert_allclose(inner, (x * fir_up(y, (1, 3, 3, 1))).sum() / 4, rtol=1e-4)


@pytest.mark.parametrize("config", [SONG, ADM])
def test_images_need_not_be_square(config: Any) -> None:
    x, times, cond = inputs(config)
    wide = jnp.concatenate([x, x[:, :, :4]], axis=2)
    out, _ = jax.eval_shape(Network(config), param_shapes(config), wide, times, cond)
    assert out.shape == wide.shape == (*x.shape[:2], 12, 3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(GenError, match="halved 2 times"):
        SongUNetConfig(30)
    with pytest.raises(GenError, match="odd"):
        SongUNetConfig(width=7)
    with pytest.raises(GenError, match="even number of taps"):
        Network(dataclasses.replace(SONG, taps=(1, 2, 1))).init(jax.random.key(0))
    x, times, cond = inputs(SONG)
    net, params = Network(SONG), param_shapes(SONG)
    with pytest.raises(GenError, match=r"input is \(8, 7, \d\); expected sides divisible by 2, and"):
        net(params, x[:, :, :7], times, cond)
    with pytest.raises(GenError, match="and 3 channels"):
        net(params, x[..., :1], times, cond)
    with pytest.raises(GenError, match=r"did you mean 'enc\.8x8_block0'"):
        net(params, x, times, cond, taps=("enc.8x8_block",))
    with pytest.raises(GenError, match="did you mean 'skips'"):
        net(params, x, times, cond, controls={"skip": jnp.ones(4)})
    with pytest.raises(GenError, match=r"expected \(4,\)"):
        net(params, x, times, cond, controls={"skips": jnp.ones(3)})
    with pytest.raises(GenError, match="this U-Net is unconditional"):
        Network(CIFAR).apply(param_shapes(CIFAR), cond, method="null")
