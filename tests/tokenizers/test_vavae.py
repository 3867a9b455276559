"""VA-VAE's method: where its gradients go, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.sources import Digits
from gen.errors import GenError
from gen.nn.network import Network
from gen.tokenizers.titok import TiTokConfig
from gen.tokenizers.train import Rows
from gen.tokenizers.vavae import VAVAETask
from tests.conformance import examples

TASK: VAVAETask = dataclasses.replace(examples.task("vavae-task"), gan_start=4)


@pytest.mark.slow  # parity compares these gradients too
def test_the_term_pulls_the_encoder_alone() -> None:
    frozen = examples.frozen("vavae-task")
    params = TASK.start(jax.random.key(0), frozen, None)["tokenizer"]
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1), minval=-1.0)
    rows = Rows(images, jax.random.split(jax.random.key(2), 4))
    plain = dataclasses.replace(TASK, alignment=dataclasses.replace(TASK.alignment, weight=0.0))

    @jax.jit
    def gradients(params: dict) -> tuple:
        found = [jax.grad(lambda p, t=task: t.loss(p, rows, frozen)[0])(params) for task in (TASK, plain)]
        return (*found, TASK.loss(params, rows, frozen)[1].metrics)

    aligned, without, metrics = gradients(params)
    assert float(metrics["vf"]) > 0.0
    assert float(metrics["vf_weight"]) > 0.0
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), aligned, without)
    assert moved["encoder"]["conv_out"]["kernel"] > 1e-6
    assert max(jax.tree.leaves(moved["decoder"])) < 1e-6


@pytest.mark.slow
def test_the_projection_learns_and_is_not_exported() -> None:
    """It moves in every step of the tokenizer, before there is a discriminator as well."""
    frozen = examples.frozen("vavae-task")
    state = TASK.init(jax.random.key(0), frozen, None)
    (batch,) = [next(Digits("train").batches(batch=4, seed=0, start=0))]
    schedule = TASK.inputs(0, 8)
    assert TASK.select(0) == "tokenizer"
    moved, metrics = jax.jit(TASK.update)(state, frozen, batch, schedule, jax.random.key(1))
    assert {"tokenizer/vf", "tokenizer/vf_weight", "tokenizer/skipped"} <= set(metrics)
    before, after = (s.params["tokenizer"]["projection"]["kernel"] for s in (state, moved))
    assert np.abs(after - before).max() > 1e-5
    for a, b in zip(*(jax.tree.leaves(s.params["discriminator"]) for s in (moved, state)), strict=True):
        np.testing.assert_array_equal(a, b)
    exported = TASK.export(moved)
    assert set(exported) == {"tokenizer"}
    fresh = jax.eval_shape(Network(TASK.tokenizer).init, jax.random.key(0))
    assert jax.tree.structure(exported["tokenizer"]) == jax.tree.structure(fresh)


def test_refusals() -> None:
    with pytest.raises(GenError, match="needs the frozen role 'encoder'"):
        TASK.start(jax.random.key(0), {}, None)
    with pytest.raises(GenError, match="aligns square maps of continuous latents"):
        dataclasses.replace(TASK, tokenizer=TiTokConfig((8, 8, 1), 4, 4))
    with pytest.raises(GenError, match="all are at least 0"):
        dataclasses.replace(TASK.alignment, weight=-1.0)
    frozen = examples.frozen("vavae-task")
    params = jax.eval_shape(lambda: TASK.start(jax.random.key(0), frozen, None))["tokenizer"]
    lost = dataclasses.replace(TASK, alignment=dataclasses.replace(TASK.alignment, layer="encoder/last"))
    rows = Rows(jnp.zeros((2, 8, 8, 1)), jax.random.split(jax.random.key(0), 2))
    with pytest.raises(GenError, match="no parameter 'encoder/last' to compare gradients at"):
        jax.eval_shape(lambda p: lost.loss(p, rows, frozen), params)
