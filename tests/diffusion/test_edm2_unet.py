import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.sources import Digits
from gen.diffusion.backbones.edm2_unet import EDM2Config, edm2, mp_cat, mp_silu, mp_sum, pixel_norm
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import Uncertain, VelocityMatching
from gen.diffusion.process import EDM, Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.nn.network import Network, Params, count, param_shapes
from gen.training.ema import PowerFunction
from gen.training.optim import OptimConfig
from tests.training.conformance import check_task

TINY = EDM2Config(8, 1, 10, (8, 16), 1, (4,), 8, dropout=0.5, uncertainty=4)
SINGLE = dataclasses.replace(TINY, widths=(8,), attention=())  # one level: compiles sooner
DENOISER = Denoiser(SINGLE, EDM(), EDMPrecondition(), Uncertain())
COUNTS = {  # trainable numbers and the fixed Fourier tables: 2 (width + 128)
    "XXS": 31_309_413,
    "XS": 124_713_765,
    "S": 280_213_477,
    "M": 497_808_549,
    "L": 777_498_981,
    "XL": 1_119_284_773,
    "XXL": 1_523_165_925,
}
PUBLISHED = {"XXS": 31.3, "XS": 124.7, "S": 280.2, "M": 497.8, "L": 777.5, "XL": 1119.3, "XXL": 1523.2}


def drawn(config: EDM2Config = TINY) -> Params:
    return jax.jit(Network(config).init)(jax.random.key(0))


def lively(config: EDM2Config = TINY) -> Params:
    """Parameters whose gains are not zero."""
    params = drawn(config)
    return jax.tree.map(lambda p: p + 0.3 if p.ndim == 0 else p, params)


@functools.cache
def program(config: EDM2Config, taps: tuple[str, ...] = (), stop: bool = False) -> Any:
    return jax.jit(lambda p, x, times, cond: Network(config)(p, x, times, cond, taps=taps, stop=stop))


def call(params: Params, config: EDM2Config = TINY, keys: jax.Array | None = None, **options: Any) -> Any:
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    cond = {"label": jnp.array([0, 3, 10])} | ({} if keys is None else {"dropout": keys})
    return program(config, **options)(params, x, (jnp.linspace(-1.0, 1.0, 3),) * config.times, cond)


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    total = count(param_shapes(edm2(name)))
    assert total == COUNTS[name]
    assert round(total / 1e6, 1) == PUBLISHED[name]


def test_magnitudes_are_preserved() -> None:
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 64, 64, 16))
    for y in jax.jit(lambda a, b: (mp_silu(a), mp_sum(a, b, 0.3), mp_cat(a, b[..., :5], 0.4), pixel_norm(3.0 * a)))(
        a, b
    ):
        np.testing.assert_allclose(jnp.square(y).mean(), 1.0, rtol=0.02)


def test_output_is_zero_at_first_and_uncertainty_is_returned() -> None:
    out, features = call(drawn())
    assert out.shape == (3, 8, 8, 1)
    assert not out.any()
    assert features["logvar"].shape == (3,)
    assert (
        "logvar"
        not in call(lively(dataclasses.replace(TINY, uncertainty=0)), dataclasses.replace(TINY, uncertainty=0))[1]
    )


def test_scale_of_stored_weights_does_not_matter_and_projection_removes_it() -> None:
    params = lively()
    expected, _ = call(params)
    kernels = jax.tree_util.tree_map_with_path(lambda path, p: 3.0 * p if path[-1].key == "kernel" else p, params)
    np.testing.assert_allclose(call(kernels)[0], expected, atol=2e-3)
    projected = Network(TINY).project(kernels)
    for path, leaf in jax.tree_util.tree_leaves_with_path(projected):
        if path[-1].key == "kernel":
            rms = np.sqrt(np.square(np.asarray(leaf)).mean(tuple(range(leaf.ndim - 1))))
            np.testing.assert_allclose(rms, 1.0, rtol=1e-3)
    np.testing.assert_array_equal(projected["emb_fourier"]["freqs"], params["emb_fourier"]["freqs"])
    np.testing.assert_array_equal(projected["out_gain"], params["out_gain"])


def test_dropout_is_per_sample_and_only_where_keys_are_given() -> None:
    params = lively()
    keys = jax.random.split(jax.random.key(0), 3)
    plain, first, again = call(params)[0], call(params, keys=keys)[0], call(params, keys=keys)[0]
    other = call(params, keys=keys.at[0].set(jax.random.key(9)))[0]
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(plain, first)
    assert not np.allclose(other[0], first[0])
    np.testing.assert_array_equal(other[1:], first[1:])


def test_taps_and_stop() -> None:
    params = lively()
    names = ("enc_8x8_conv", "enc_4x4_block0", "dec_4x4_in0", "dec_8x8_block1")
    _, features = call(params, taps=names)
    assert [features[n].shape[1:] for n in names] == [(8, 8, 8), (4, 4, 16), (4, 4, 16), (8, 8, 8)]
    stopped, only = call(params, taps=names[1:2], stop=True)
    assert set(only) == {"enc_4x4_block0"}
    np.testing.assert_array_equal(stopped, features["enc_4x4_block0"])


def test_bfloat16_stays_close() -> None:
    params = lively()
    exact, _ = call(params)
    rough, _ = call(params, dataclasses.replace(TINY, dtype="bfloat16"))
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_conformance(tmp_path: Path) -> None:
    """Trained as any task, with forced weight normalisation, dropout and learned uncertainty."""
    optim = OptimConfig(0.01, betas=(0.9, 0.99), schedule="inverse-sqrt", knee=5)
    task = DenoiserTask(denoiser=DENOISER, optim=optim, emas=(PowerFunction(0.05), PowerFunction(0.1)), dropout=0.0)
    check_task(task, Digits("train"), {}, tmp_path, steps=4)


def test_a_step_starts_from_normalised_weights() -> None:
    task = DenoiserTask(denoiser=DENOISER, optim=OptimConfig(0.0), emas=(PowerFunction(0.1),), dropout=0.0)
    state = jax.jit(lambda key: task.init(key, {}, None))(jax.random.key(0))
    state = dataclasses.replace(state, params={"net": jax.tree.map(lambda p: 2.0 * p, state.params["net"])})
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2, np.int32)}
    new, metrics = jax.jit(task.update)(state, {}, batch, task.inputs(0, 1), jax.random.key(0))
    expected = Network(SINGLE).project(state.params["net"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new.params["net"], expected)
    assert {"weighted", "logvar", "denoised_mse"} <= set(metrics)


def test_refusals() -> None:
    with pytest.raises(GenError, match="unknown EDM2 size 'XXXL'; did you mean 'XXL'"):
        edm2("XXXL")
    with pytest.raises(GenError, match="size 6 cannot be halved 3 times"):
        edm2("XS", size=6)
    with pytest.raises(GenError, match="width 200 is not divisible by its 3 attention heads"):
        EDM2Config(widths=(100, 200))
    assert next(row.heads for row in EDM2Config(widths=(100, 130)).decoder_plan()) == 2  # 65 channels each
    with pytest.raises(GenError, match=r"dropout is 1\.5"):
        edm2("XS", dropout=1.5)
    params = param_shapes(TINY)
    with pytest.raises(GenError, match=r"EDM2 input is \(4, 5, 1\); expected sides divisible by 2, and 1 c"):
        jax.eval_shape(Network(TINY), params, jnp.zeros((1, 4, 5, 1)), (jnp.zeros(1),), {"label": jnp.zeros(1, int)})
    call_with = (jnp.zeros((1, 8, 8, 1)), (jnp.zeros(1),), {"label": jnp.zeros(1, int)})
    with pytest.raises(GenError, match="no feature 'enc_8x8_block1'; did you mean"):
        jax.eval_shape(lambda p: Network(TINY)(p, *call_with, taps=("enc_8x8_block1",)), params)
    with pytest.raises(GenError, match="knows no control 'gate'"):
        jax.eval_shape(lambda p: Network(TINY)(p, *call_with, controls={"gate": jnp.zeros(1)}), params)
    two = dataclasses.replace(TINY, times=2)
    with pytest.raises(GenError, match="given 1 times; expected 2"):
        jax.eval_shape(Network(two), param_shapes(two), *call_with)
    unconditional = dataclasses.replace(TINY, num_classes=0)
    with pytest.raises(GenError, match="is unconditional"):
        jax.eval_shape(lambda p: Network(unconditional).apply(p, {}, method="null"), param_shapes(unconditional))
    plain = Denoiser(dataclasses.replace(TINY, uncertainty=0), EDM(), EDMPrecondition(), Uncertain())
    task = DenoiserTask(denoiser=plain, dropout=0.0)
    batch = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.zeros(2, np.int32)}
    state = jax.eval_shape(lambda: task.init(jax.random.key(0), {}, None))
    with pytest.raises(GenError, match="learns no uncertainty"):
        jax.eval_shape(lambda s: task.update(s, {}, batch, task.inputs(0, 1), jax.random.key(0)), state)
    assert Uncertain(VelocityMatching()).draw(jax.random.key(0), Linear(), jnp.zeros((2, 3))).t.shape == (2,)
