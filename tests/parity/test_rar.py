"""RAR against the official code: logits under permuted orders, the loss, and sampling with and without the cache."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.base import cross_entropy
from gen.autoregressive.decoding import PowerCosineScale, filtered
from gen.autoregressive.rar import RARConfig
from gen.autoregressive.sampler import write
from gen.pretrained.rar import IMPORTER
from gen.pretrained.systems import locate
from tests.parity.conftest import Fixture, fixtures

RUNS = {"constant": (4.0, 1.0, 0.0), "powercosine": (6.9, 1.02, 1.5)}  # scale, temperature, power, of the README

every = pytest.mark.parametrize("fx", fixtures("rar-forward*"), ids=str)


def loaded(fx: Fixture) -> tuple[RARConfig, Any]:
    side = math.isqrt(fx.config["config"]["model"]["generator"]["image_seq_len"])
    config, params, _ = IMPORTER.load(fx.weights, IMPORTER.infer(fx.weights, shape=(side, side)))
    return config, params


@every
def test_names_and_configuration(fx: Fixture) -> None:
    assert locate(None, fx.weights).importer is IMPORTER
    model = fx.config["config"]["model"]
    given = model["generator"]
    config, params = loaded(fx)
    assert (config.width, config.depth, config.heads) == tuple(
        given[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    assert (config.hidden, config.num_classes) == (given["intermediate_size"], given["condition_num_classes"])
    assert config.vocabulary == model["vq_model"]["codebook_size"]
    saved = IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)


@every
def test_forward(fx: Fixture) -> None:
    config, params = loaded(fx)
    tokens, order = jnp.asarray(fx.io["tokens"]), jnp.asarray(fx.io["orders"])
    cond = {"label": jnp.asarray(fx.io["condition"])}

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, ...]:
        network = config.net
        draws = {"order": order, "dropped": jnp.zeros(len(tokens), bool)}
        found = (network.apply(params, tokens, c, order) for c in (cond, config.null(params, cond)))
        return (*found, config.loss(params, tokens, cond, draws)[0])

    logits, none, losses = run(params)
    fx.close(logits, fx.io["logits"][:, : config.length])  # the last row is unused
    fx.close(none, fx.io["logits_none"][:, : config.length])
    fx.close(losses.mean(), "ar_loss")
    fx.close(cross_entropy(logits, jnp.asarray(fx.io["labels"])).mean(), "ar_loss")


@every
def test_sampling(fx: Fixture) -> None:
    config, params = loaded(fx)
    cond, count = {"label": jnp.asarray(fx.io["condition"])}, len(fx.io["condition"])
    schedules = {name: PowerCosineScale(scale, power) for name, (scale, _, power) in RUNS.items()}

    @jax.jit
    def run(params: Any) -> dict[str, jax.Array]:
        made = {}
        for name, (_, temperature, _) in RUNS.items():
            uniform = jnp.asarray(fx.io[f"{name}_uniform"])

            def pick(logits: jax.Array, at: Any, uniform: Any = uniform, temperature: float = temperature) -> jax.Array:
                gathered = jnp.cumsum(jax.nn.softmax(filtered(logits, temperature=temperature), axis=-1), axis=-1)
                return (gathered > uniform[at][:, None, None]).argmax(-1).astype(jnp.int32)

            made[name] = write(config, params, cond, count, pick, schedules[name])
        return made

    for name, ids in run(params).items():
        fx.close(schedules[name].scales(config.length), f"{name}_guidance")
        fx.close(ids, f"{name}_ids")
        scales = jnp.asarray(schedules[name].scales(config.length), jnp.float32)[:, None]
        own, null = (config.logits(params, ids, c) for c in (cond, config.null(params, cond)))
        probs = jax.nn.softmax((null + scales * (own - null)) / RUNS[name][1], axis=-1)
        fx.close(probs.swapaxes(0, 1), f"{name}_probs")


@pytest.mark.parametrize("fx", [fx for fx in fixtures("titok-schedules*") if "rar_random_ratio" in fx.io], ids=str)
def test_annealing_of_the_orders(fx: Fixture) -> None:
    model = RARConfig(anneal=(fx.config["rar_start"], fx.config["rar_end"]))
    found = [model.schedules(int(step), 1)["random_ratio"] for step in fx.io["rar_step"]]
    fx.close(np.stack(found), "rar_random_ratio", rtol=1e-6, atol=0.0)
