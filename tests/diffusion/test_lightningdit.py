"""LightningDiT and SiT: published sizes and their exact parameter counts, switches, projectors, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.lightningdit import (
    SIZES,
    LightningDiTConfig,
    lightningdit,
)
from gen.diffusion.backbones.sit import parameterization, sit
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.nn.rotary import axial_rotation, rotate_pairs

# at patch 1 on 16 x 16 x 32 and patch 2 on 32 x 32 x 4, 1000 classes and null, without the fixed tables (computed from
# the official constructors); L/1 was not published
COUNTS = {
    "B": (130_359_584, 130_334_992),
    "L": (None, 457_858_032),
    "XL": (674_961_824, 674_924_944),
    "1p0B": (1_029_007_904, 1_028_958_736),
    "1p6B": (1_631_308_368, 1_631_251_008),
}
TINY = LightningDiTConfig((4, 6), 3, 2, 16, 2, 2, num_classes=5, remat="none")
PLAIN = {"rmsnorm": False, "swiglu": False, "rope": False}


@pytest.mark.parametrize("family", SIZES)
def test_published_parameter_counts(family):
    for patch, expected in zip((1, 2), COUNTS[family], strict=True):
        if expected is not None:
            config = lightningdit(f"{family}/{patch}")
            assert count(param_shapes(config)) == expected
            normed = param_shapes(dataclasses.replace(config, qk_norm=True))
            assert count(normed) == expected + 2 * config.head_dim * config.depth


def test_sit_has_dits_sizes_without_the_variance():
    assert count(param_shapes(sit("XL/2", learned_variance=True))) == 674_834_720  # the released file
    assert count(param_shapes(sit("XL/2"))) == 674_834_720 - 1153 * 16
    assert sit("S/4").learned_variance is False


def test_all_switches_off_is_dit():
    plain = dataclasses.replace(TINY, **PLAIN)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(DiTConfig)}
    net, reference = Network(plain), Network(DiTConfig(**fields))
    params = noisy(plain)
    args = inputs(plain)
    np.testing.assert_array_equal(net(params, *args)[0], reference(params, *args)[0])


@functools.cache
def noisy(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.4 * rng.normal(size=s.shape), s.dtype), param_shapes(config))


def inputs(config):
    x = jax.random.normal(jax.random.key(7), (2, *config.size, config.channels))
    return x, (jnp.array([0.2, 0.9]),), {"label": jnp.array([1, 5])}


@pytest.mark.parametrize(
    "changes", [{"rmsnorm": False}, {"swiglu": False}, {"rope": False}, {"qk_norm": True}, {"shift": False}]
)
def test_every_switch_changes_the_output(changes):
    config = dataclasses.replace(TINY, **changes)
    assert from_json(to_json(config)) == config
    out = Network(config)(Network(config).init(jax.random.key(0)), *inputs(config))[0]
    np.testing.assert_array_equal(out, np.zeros_like(out))  # gates and last layer start at zero
    a, b = (Network(c)(noisy(c), *inputs(c))[0] for c in (config, TINY))
    assert a.shape == b.shape == (2, 4, 6, 3)
    assert np.isfinite(a).all()
    assert not np.allclose(a, b, atol=1e-3)


def test_rotation_keeps_lengths_and_knows_only_distances():
    cos, sin = axial_rotation((3, 5), 8)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    q, k = (rotate_pairs(jnp.broadcast_to(v, (1, 15, 1, 8)), cos, sin)[0, :, 0] for v in (q, k))
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), np.full(15, jnp.linalg.norm(q[0])), rtol=1e-5)
    scores = np.asarray(q @ k.T).reshape(3, 5, 3, 5)
    np.testing.assert_allclose(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], rtol=1e-4, atol=1e-5)
    assert not np.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0], atol=1e-3)


def test_official_clock_and_sign():
    """Our velocity is the negative of the official one, at one minus the official time."""
    parameters = parameterization(sit("S/8"))
    x = jnp.ones((1, 2, 2, 1))
    _, (clock,) = parameters.inputs(Linear(), x, jnp.array([0.25]))
    assert float(clock[0]) == 0.75
    assert float(parameters.prediction(Linear(), x, x, jnp.array([0.25]), {}).velocity[0, 0, 0, 0]) == -1.0
    with pytest.raises(GenError, match="unknown prediction"):
        parameterization(sit("S/8"), "velocty")


def test_projectors_leave_the_backbone_as_it_is():
    config = AlignedConfig(TINY, "block_0", (7, 9), 12)
    assert from_json(to_json(config)) == config
    assert config.num_classes == 5
    params = noisy(config)
    x, times, cond = inputs(TINY)
    out, features = Network(config)(params, x, times, cond, taps=("aligned_1", "block_1"))
    assert features["aligned_1"].shape == (2, 6, 9)
    assert sorted(features) == ["aligned_1", "block_1"]
    np.testing.assert_array_equal(out, Network(TINY)(params["network"], x, times, cond)[0])
    np.testing.assert_array_equal(Network(config).apply(params, cond, method="null")["label"], [5, 5])
    with pytest.raises(GenError, match="no feature 'block_7'"):
        Network(AlignedConfig(TINY))(noisy(AlignedConfig(TINY)), x, times, cond, taps=("aligned_0",))
    with pytest.raises(GenError, match="no encoder to align with"):
        AlignedConfig(TINY, widths=())


def test_refusals():
    with pytest.raises(GenError, match="unknown LightningDiT size 'XL/4'"):
        lightningdit("XL/4")
    with pytest.raises(GenError, match="unknown DiT size"):
        sit("XXL/2")
    with pytest.raises(GenError, match="head size 6 is not a multiple of 4"):
        LightningDiTConfig((4, 4), 3, 2, 12, 1, 2)
