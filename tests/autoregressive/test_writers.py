"""Models that write token by token: published sizes, orders, samples that the cache does not change."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.base import cross_entropy
from gen.autoregressive.decoding import ConstantScale, LinearScale, PowerCosineScale, drawn, filtered, mix
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.gpt import SIZES, GPTConfig, gpt
from gen.autoregressive.rar import RARConfig, rar
from gen.autoregressive.sampler import TokenSampler, both
from gen.autoregressive.train import TokenTask
from gen.errors import GenError
from gen.nn.network import Params, count, param_shapes
from gen.training.task import Model
from tests.conformance.tokenizers import Codebook

GPTS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
    "XXXL": 3_893_027_840,
    "1B": 1_199_616_000,
    "7B": 6_614_589_440,
}
RARS = {"B": 260_923_648, "L": 461_668_352, "XL": 955_425_024, "XXL": 1_498_520_704}
SMALL = {"shape": (3, 3), "vocabulary": 11, "width": 16, "depth": 2, "heads": 4, "hidden": 16, "num_classes": 3}
TOYS = {
    "gpt": GPTConfig(**SMALL, kv_heads=2),
    "caption": GPTConfig(**SMALL | {"num_classes": 0}, text=(4, 6), scan=False),
    "rar": RARConfig(**SMALL),
}
SAMPLER = TokenSampler(PowerCosineScale(3.0, 1.5), temperature=0.9, top_k=8, top_p=0.95)


def noisy(model: Any) -> Params:
    """Weights whose logits say something: last layers start at zero."""
    shapes = param_shapes(model)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.asarray(0.3 * rng.normal(size=a.shape), jnp.float32) for a in leaves])


def conditions(model: Any, count: int) -> dict[str, jax.Array]:
    if "label" in model.conditions:
        return {"label": jnp.arange(count, dtype=jnp.int32) % 3}
    text = np.random.default_rng(1).normal(size=(count, 4, 6)).astype(np.float32)
    return {"text": jnp.asarray(text), "text_mask": jnp.arange(4) >= jnp.arange(count)[:, None] % 3}


def test_published_sizes() -> None:
    assert {name: count(param_shapes(gpt(name))) for name in SIZES} == GPTS
    assert {name: count(param_shapes(rar(name))) for name in RARS} == RARS
    with pytest.raises(GenError, match="did you mean 'XL'"):
        gpt("XLL")


@pytest.mark.parametrize("name", ["gpt", "rar", pytest.param("caption", marks=pytest.mark.slow)])
def test_cached_sampling_is_full_recomputation(name: str) -> None:
    """Token for token; and a sample depends on its key and condition alone."""
    model, keys = TOYS[name], jax.random.split(jax.random.key(3), 4)
    params, cond = noisy(model), conditions(TOYS[name], 4)

    def recomputed(params: Params, tokens: jax.Array) -> jax.Array:
        own, null = jnp.split(model.logits(params, jnp.concatenate([tokens, tokens]), both(model, params, cond)), 2)
        scales = jnp.asarray(SAMPLER.guidance.scales(model.length), jnp.float32)[:, None]
        kept = filtered(mix(own, null, scales), temperature=0.9, k=8, p=0.95)
        return jnp.stack([drawn(keys, kept[:, i], i) for i in range(model.length)], axis=1)

    generator = TokenGenerator(model, SAMPLER)
    run = jax.jit(generator.tokens)
    tokens = run({"net": params}, keys, cond)
    assert (tokens.shape, tokens.dtype) == ((4, 3, 3), jnp.int32)
    assert len(np.unique(tokens)) > 4
    np.testing.assert_array_equal(jax.jit(recomputed)(params, model.sequence(tokens)), model.sequence(tokens))
    turned = run({"net": params}, keys[::-1], {k: v[::-1] for k, v in cond.items()})
    np.testing.assert_array_equal(turned[::-1], tokens)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from gen.nn.attention import new_cache
from gen.training.sharding import MeshConfig, make_mesh, place, shardings
from gen.autoregressive.generator import TokenGenerator
from tests.autoregressive.test_writers import SAMPLER, TOYS, conditions, noisy
for name, model in TOYS.items():
    cond, keys, generator = conditions(model, 8), jax.random.split(jax.random.key(3), 8), TokenGenerator(model, SAMPLER)
    one = jax.jit(generator.tokens)({"net": noisy(model)}, keys, cond)
    for config in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2, shard_from=1)):
        mesh = make_mesh(config)
        tree = {"net": noisy(model)}; params = place(tree, shardings(tree, mesh, config.shard_from))
        with jax.set_mesh(mesh):
            found = jax.jit(generator.tokens)(params, keys, cond)
        np.testing.assert_array_equal(found, one, err_msg=f"{name} {config}")
with jax.set_mesh(mesh):  # of two devices along "tensor": each keeps half of the heads, and a quarter of the batch
    kept = jax.jit(lambda: new_cache(2, 8, 5, 4, 3, jnp.float32))()
assert {shard.data.shape for array in kept.values() for shard in array.addressable_shards} == {(2, 2, 2, 5, 3)}
print("same", jax.device_count())
"""


@pytest.mark.slow
def test_eight_devices_write_what_one_does() -> None:
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", DEVICES], env=os.environ | devices, capture_output=True, text=True, timeout=600
    )
    assert ran.stdout.strip() == "same 8", ran.stderr[-3000:]


def test_orders() -> None:
    model, tokens = TOYS["rar"], jnp.zeros((6, 9), jnp.int32)
    for ratio in (0.0, 1.0):
        order = np.asarray(model.draw(jax.random.key(0), tokens, {"random_ratio": ratio})["order"])
        np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(9), (6, 1)))
        assert (order == np.arange(9)).all() == (ratio == 0.0)
        assert len(np.unique(order, axis=0)) == (1 if ratio == 0.0 else 6)
    ratios = [rar("B").schedules(step, 1)["random_ratio"] for step in (0, 125_000, 156_250, 187_500, 250_000)]
    np.testing.assert_allclose(ratios, [1.0, 1.0, 0.5, 0.0, 0.0])


def test_schedules_of_guidance() -> None:
    np.testing.assert_allclose(ConstantScale(3.0, until=2).scales(4), [3, 3, 1, 1])
    np.testing.assert_allclose(LinearScale(2.5).scales(4), [1.0, 1.5, 2.0, 2.5])
    np.testing.assert_allclose(PowerCosineScale(4.0).scales(3), 4.0)
    assert not LinearScale().guides
    with pytest.raises(GenError, match="power -1"):
        PowerCosineScale(2.0, -1.0)


def test_dropout_and_dropped_conditions() -> None:
    model, tokens = TOYS["gpt"], jnp.arange(18, dtype=jnp.int32).reshape(2, 9) % 11
    params, cond = noisy(model), conditions(model, 2)
    draws = dict(model.draw(jax.random.key(0), tokens, {}))
    assert draws.keys() == {"dropped", "dropout"}
    dry = {"dropped": jnp.array([True, False])}
    losses, _ = jax.jit(model.loss)(params, tokens, cond, dry)
    plain = cross_entropy(model.logits(params, tokens, cond), tokens).mean(-1)
    null = cross_entropy(model.logits(params, tokens, model.null(params, cond)), tokens).mean(-1)
    np.testing.assert_allclose(losses, [null[0], plain[1]], rtol=1e-5)
    wet, _ = jax.jit(model.loss)(params, tokens, cond, dry | {"dropout": draws["dropout"]})
    assert (np.abs(wet - losses) > 1e-3).all()


def test_bad_input() -> None:
    model = dataclasses.replace(TOYS["gpt"], shape=(2, 2), vocabulary=8)
    assert TokenGenerator(model, SAMPLER, Codebook()).shape == (8, 8, 1)
    wrong = [
        (dataclasses.replace(model, vocabulary=9), "a vocabulary of 8, and the model one of 9"),
        (dataclasses.replace(model, shape=(4, 1)), r"tokens \(2, 2\) of an image, and the model \(4, 1\)"),
    ]
    for other, message in wrong:
        with pytest.raises(GenError, match=message):
            SAMPLER.generator({"net": Model(other)}, Codebook())
    with pytest.raises(GenError, match="writes token by token"):
        SAMPLER.changed(steps=4)
    assert SAMPLER.changed(guidance=2.0).guidance == PowerCosineScale(2.0, 1.5)
    with pytest.raises(GenError, match="temperature -1"):
        TokenSampler(temperature=-1.0)
    for settings, message in (({"heads": 3}, "heads of a multiple of 4"), ({"kv_heads": 3}, "divisor of the heads")):
        with pytest.raises(GenError, match=message):
            GPTConfig(**SMALL | settings)
    with pytest.raises(GenError, match="a class or a caption"):
        GPTConfig(**SMALL, text=(4, 6))


def test_data_that_do_not_fit() -> None:
    row = {"tokens": np.zeros((1, 3, 3), np.int32), "label": np.zeros(1, np.int32)}
    task = TokenTask(TOYS["gpt"])
    task.check(row)
    wrong = {
        "encode the images with a tokenizer": {"image": np.zeros((1, 3, 3, 1), np.uint8)},
        "has bits, and this is a model of tokens": {"bits": np.zeros((1, 3, 3), np.uint8)},
        r"tokens \(9,\) of an image, and the model \(3, 3\)": row | {"tokens": np.zeros((1, 9), np.int32)},
        "a vocabulary of 12, and the model one of 11": row | {"tokens": np.full((1, 3, 3), 11, np.int32)},
        "no labels": {"tokens": row["tokens"]},
    }
    for message, data in wrong.items():
        with pytest.raises(GenError, match=message):
            task.check(data)
    text = {"tokens": row["tokens"], "text": np.zeros((1, 4, 6), np.float32)}
    with pytest.raises(GenError, match="'text_mask' is missing"):
        TokenTask(TOYS["caption"]).check(text)
