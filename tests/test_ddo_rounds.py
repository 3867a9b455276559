"""Direct discriminative optimisation: its loss, its data, and rounds of self-play as a plan."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.maskgit import MaskGITConfig
from gen.autoregressive.sampler import TokenSampler
from gen.data.alongside import Alongside
from gen.data.sources import Digits
from gen.errors import GenError
from gen.experiments import ddo
from gen.finetune.ddo import DDOTask, TokenDDOTask, ddo_losses, quantised
from gen.nn.network import Network
from gen.runs import Loaded
from gen.sampling.guidance import ClassifierFree
from gen.training.optim import OptimConfig
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.conformance.examples import CLASSES, WRITER
from tests.distill.test_dmd2 import DENOISER, batch, teacher
from tests.test_matching_presets import SAMPLER, TEACHER, loaded

TASK = DDOTask(teacher=DENOISER, alpha=4.0, beta=0.1, optim=OptimConfig(lr=1e-2))


def rows() -> dict[str, jax.Array]:
    real = batch()
    return real | {"fake_latent": real["latent"][::-1] + 1.0, "fake_label": real["label"]}


def test_the_loss_begins_at_its_known_value_and_learns_to_tell_apart() -> None:
    frozen = {"teacher": teacher()}
    state = TASK.init(jax.random.key(0), frozen, None)
    run, history = jax.jit(TASK.programs["net"]), []
    for step in range(30):
        state, metrics = run(state, frozen, rows(), TASK.inputs(step, 30), jax.random.key(step))
        history.append({name: float(value) for name, value in metrics.items()})
    np.testing.assert_allclose(history[0]["loss"], 5.0 * np.log(2.0), rtol=1e-5)
    assert history[-1]["ratio_real"] > history[-1]["ratio_fake"]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, frozen["teacher"], teacher())


def test_losses_are_a_discriminators() -> None:
    real, fake = ddo_losses(jnp.asarray([0.0, 90.0]), jnp.asarray([0.0, -90.0]), 2.0, 1.0)
    np.testing.assert_allclose(real, [np.log(2.0), 0.0], atol=1e-6)
    np.testing.assert_allclose(fake, [2.0 * np.log(2.0), 0.0], atol=1e-6)


def test_generated_images_lie_on_the_levels_of_stored_ones() -> None:
    levels = np.arange(256) / 127.5 - 1.0
    found = quantised(jnp.asarray([-1.3, -0.999, 0.1234, 2.0]))
    assert np.abs(np.asarray(found)[:, None] - levels).min(1).max() < 1e-6


def test_both_data_sets_stand_in_a_batch() -> None:
    data = Alongside(Digits("train"), Digits("test"))
    found = next(data.batches(batch=4, seed=0, start=0))
    assert set(found) == {"image", "label", "fake_image", "fake_label"}
    assert data.identity() != Alongside(Digits("test"), Digits("train")).identity()


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GenError, match="hold nothing that the reference made"):
        TASK.check({name: np.asarray(value) for name, value in batch().items()})
    with pytest.raises(GenError, match="positive numbers"):
        dataclasses.replace(TASK, beta=0.0)
    with pytest.raises(GenError, match="its reference"):
        TASK.init(jax.random.key(0), {}, None)
    with pytest.raises(GenError, match="does not say what it was trained on"):
        ddo.ddo(loaded(TEACHER, SAMPLER), str(tmp_path))


WRITTEN = TokenDDOTask(teacher=WRITER, alpha=4.0, beta=0.1, optim=OptimConfig(lr=1e-2))


def test_tokens_are_tuned_by_their_exact_likelihood() -> None:
    """At the reference the loss is (1 + alpha) ln 2 over alpha; then real tokens become likelier than written ones."""
    frozen = {"teacher": Network(WRITER).init(jax.random.key(0))}
    ids = jax.random.randint(jax.random.key(1), (2, 6, *WRITER.shape), 0, WRITER.vocabulary)
    label = jnp.arange(6, dtype=jnp.int32) % CLASSES
    rows = {"tokens": ids[0], "label": label, "fake_tokens": ids[1], "fake_label": label}
    state, run, history = WRITTEN.init(jax.random.key(0), frozen, None), jax.jit(WRITTEN.programs["net"]), []
    for step in range(20):
        state, metrics = run(state, frozen, rows, WRITTEN.inputs(step, 20), jax.random.key(step))
        history.append({name: float(value) for name, value in metrics.items()})
    np.testing.assert_allclose(history[0]["loss"], 5.0 * np.log(2.0) / 4.0, rtol=1e-5)
    assert history[-1]["ratio_real"] > 0.0 > history[-1]["ratio_fake"]
    sequences = WRITER.sequence(ids[0])
    exact = -WRITER.surprise(WRITER.logits(frozen["teacher"], sequences, {"label": label}), sequences).sum(-1)
    found = WRITTEN.log_likelihood(frozen["teacher"], sequences, {"label": label}, None)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_models_without_an_exact_likelihood_are_refused() -> None:
    with pytest.raises(GenError, match="has no exact likelihood"):
        TokenDDOTask(teacher=MaskGITConfig())


def test_rounds_of_tokens_are_written_without_guidance() -> None:
    config = RunConfig("writer", sampler=TokenSampler(ConstantScale(2.0)), models={"net": Model(WRITER)})
    writer = Loaded(Path("writer"), config, {"net": Network(WRITER).init(jax.random.key(0))}, "ema", 1)
    plan = ddo.rounds("runs/ddo", writer, count=1, recipe=ddo.ddo_tokens)
    assert plan.given["round-0"].config.sampler.guidance == ConstantScale()
    make = plan.steps[0].make(writer.generator)
    found = make(
        {"net": writer.params["net"]}, jax.random.split(jax.random.key(0), 2), {"label": jnp.zeros(2, jnp.int32)}
    )
    assert found["tokens"].shape == (2, *WRITER.shape)
    with pytest.raises(GenError, match="does not say what it was trained on"):
        ddo.ddo_tokens(writer, "records")
    with pytest.raises(GenError, match="tune it with the preset 'ddo'"):
        ddo.ddo_tokens(loaded(TEACHER, SAMPLER), "records")


def test_rounds_are_a_plan() -> None:
    """Each round's samples are made by the round before, without guidance."""
    plan = ddo.rounds("runs/ddo", loaded(TEACHER, SAMPLER), count=2)
    assert [step.name for step in plan.steps] == ["samples-0", "round-1", "samples-1", "round-2"]
    assert [dict(step.takes) for step in plan.steps[2:]] == [
        {"teacher": "round-1"},
        {"teacher": "round-1", "fakes": "samples-1"},
    ]
    assert plan.given["round-0"].config.sampler.guidance == ClassifierFree()
