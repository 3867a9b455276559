"""`gen.features.inception` and the Inception Score against clean-fid, pytorch-fid, torch-fidelity and ADM's evaluator.

The random weights are drawn again by the recipe in the fixture's README.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.features.inception import Inception, fid_input, inception, logits
from gen.metrics.inception_score import InceptionScore, inception_score
from gen.pretrained.inception import fold
from tests.parity.conftest import fixtures

FORWARD = fixtures("inception-fid*")


@functools.cache
def _official(fx):
    """The recipe's weights under the names of the .pth file."""
    weights = {}
    for name, entry in fx.config["tensors"].items():
        draw = np.random.RandomState((fx.config["base_seed"] + zlib.crc32(name.encode())) % 2**32)
        shape = tuple(entry["shape"])
        if name.endswith("conv.weight"):
            value = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            value = 1 + 0.1 * draw.standard_normal(shape)
        elif name.endswith("running_var"):
            value = 0.5 + draw.random_sample(shape)
        elif name == "fc.weight":
            value = draw.standard_normal(shape) / np.sqrt(shape[1])
        elif name == "fc.bias":
            value = 0.5 * draw.standard_normal(shape)
        else:
            value = 0.1 * draw.standard_normal(shape)
        weights[name] = value.astype(np.float32)
    return weights


@functools.cache
def _params(fx):
    return fold(_official(fx))


def _near(fx, actual, expected, whole=1e-4):
    """The README's tolerance: relative error of the whole, and per element."""
    expected = fx.io[expected] if isinstance(expected, str) else expected
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= whole * np.linalg.norm(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_weights(fx):
    for name, entry in fx.config["tensors"].items():
        array = _official(fx)[name].astype(np.float64)
        assert array.sum() == pytest.approx(entry["sum"], rel=1e-6, abs=1e-6 * entry["abssum"])
        assert np.abs(array).sum() == pytest.approx(entry["abssum"], rel=1e-6)
        assert array.ravel()[0] == pytest.approx(entry["first"], rel=1e-6)


@pytest.mark.parametrize("fx", FORWARD, ids=str)
@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch", "legacy_tensorflow"])
def test_modes(fx, mode):
    images = jnp.asarray(fx.io["images_u8"], jnp.float32)
    crop = fid_input(images, mode)[:, 100:116, 200:216].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(crop, fx.io[f"{mode}_input_crop"], rtol=0, atol=1e-2)
    params = _params(fx)
    found = jax.jit(Inception(mode))(params, images)
    _near(fx, found["features"], f"{mode}_features")
    for name, array in (("logits_unbiased", found["unbiased_logits"]), ("spatial", found["spatial"])):
        if f"{mode}_{name}" in fx.io:
            _near(fx, array, f"{mode}_{name}")
    if f"{mode}_logits" in fx.io:
        _near(fx, logits(params, found["features"], bias=True), f"{mode}_logits")
    if f"{mode}_probs_unbiased" in fx.io:
        _near(fx, jax.nn.softmax(found["unbiased_logits"]), f"{mode}_probs_unbiased")
    if mode == "legacy_pytorch":
        _near(fx, found["features"], "pytorch_fid_features")


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_stages(fx):
    names = [name.removeprefix("stage_mean_") for name in fx.io if name.startswith("stage_mean_")]
    x = (fid_input(jnp.asarray(fx.io["images_u8"], jnp.float32), "clean") - 128) / 128
    features, found = jax.jit(lambda p, x: inception(p, x, taps=tuple(names)))(_params(fx), x)
    found = found | {"AvgPool": features[:, None, None]}
    assert len(names) > 15
    for name in names:
        shape = np.asarray(found[name].shape)[[0, 3, 1, 2]]
        np.testing.assert_array_equal(shape, fx.io[f"stage_shape_{name}"])
        _near(fx, found[name][0].mean((0, 1)), f"stage_mean_{name}")
    for name, stage in (("64", "MaxPool_1"), ("192", "MaxPool_2"), ("768", "Mixed_6e")):
        _near(fx, found[stage].mean((1, 2)), f"clean_pool_{name}")


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_odd_sizes(fx):
    x = (jnp.asarray(fx.io["direct_images_u8"], jnp.float32) - 128) / 128
    names = ("Mixed_5b", "Mixed_6d", "Mixed_6e", "Mixed_7b", "Mixed_7c")
    features, found = jax.jit(lambda p, x: inception(p, x, taps=names))(_params(fx), x)
    _near(fx, features, "direct_features")
    for name, stage in (
        ("direct_spatial_branch1x1_6d", "Mixed_6d"),
        ("direct_Mixed_5b_first8", "Mixed_5b"),
        ("direct_Mixed_6e_first16", "Mixed_6e"),
        ("direct_Mixed_7b", "Mixed_7b"),
        ("direct_Mixed_7c", "Mixed_7c"),
    ):
        expected = fx.io[name]
        _near(fx, found[stage].transpose(0, 3, 1, 2)[: len(expected), : expected.shape[1]], expected)


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_graph_names(fx):
    table = fx.config["torchscript_key_of"]
    weights = {table[name]: array for name, array in _official(fx).items() if table[name] is not None}
    params = fold(weights)
    found = jax.jit(Inception("legacy_tensorflow"))(params, jnp.asarray(fx.io["images_u8"], jnp.float32))
    _near(fx, found["features"], "ts_features")
    _near(fx, found["spatial"], "ts_spatial")
    _near(fx, jax.nn.softmax(found["unbiased_logits"]), "ts_probs_no_bias")
    _near(fx, jax.nn.softmax(logits(params, found["features"], bias=True)), "ts_probs")


def _split_name(fx):
    """How the arrays of the case with several splits begin: is10."""
    return next(name for name in fx.io if name.endswith("_mean_shuffled")).removesuffix("_mean_shuffled")


@pytest.mark.parametrize("fx", fixtures("inception-score*"), ids=str)
def test_inception_score(fx):
    rows, config = np.asarray(fx.io["logits"]), fx.config
    many = _split_name(fx)
    shuffled = InceptionScore(len(rows), config["splits"], shuffle=True, seed=config["shuffle_rng_seed"])
    cases = {
        "is10": inception_score(rows, InceptionScore(len(rows), splits=config["splits"])),
        "is10_shuffled": inception_score(rows, shuffled),
        "is1": inception_score(rows, InceptionScore(len(rows), splits=1)),
        "adm": inception_score(rows, InceptionScore(len(rows), chunk=config["adm_split_size"])),
        "first": inception_score(rows[:, : rows.shape[1] - 8], InceptionScore(len(rows), splits=config["splits"])),
    }
    fx.close(cases["is10"]["inception_score"], f"{many}_mean")
    fx.close(cases["is10"]["inception_score_spread"], f"{many}_std")
    fx.close(cases["is10_shuffled"]["inception_score"], f"{many}_mean_shuffled")
    fx.close(cases["is10_shuffled"]["inception_score_spread"], f"{many}_std_shuffled")
    fx.close(cases["is1"]["inception_score"], "is1_mean")
    fx.close(cases["adm"]["inception_score"], "adm_is")
    fx.close(cases["first"]["inception_score"], f"{many}_mean_first_{rows.shape[1] - 8}")


@pytest.mark.parametrize("fx", fixtures("inception-score*"), ids=str)
def test_inception_score_streams(fx):
    rows, many = jnp.asarray(fx.io["logits"]), _split_name(fx)
    statistic = InceptionScore(len(rows), fx.config["splits"], shuffle=True, seed=fx.config["shuffle_rng_seed"])
    parts = []
    for start in range(0, len(rows), 32):
        index = np.arange(start, start + 32)
        batch = {"unbiased_logits": rows[np.minimum(index, len(rows) - 1)]}
        weight = jnp.asarray(index < len(rows), jnp.float32)
        empty = statistic.init(batch, span=32)
        parts.append(jax.device_get(statistic.update(empty, batch, weight, jnp.asarray(index))))
    found = statistic.finalise(functools.reduce(statistic.merge, parts))
    fx.close(found["inception_score"], f"{many}_mean_shuffled", rtol=1e-5)
    fx.close(found["inception_score_spread"], f"{many}_std_shuffled", rtol=1e-4)
