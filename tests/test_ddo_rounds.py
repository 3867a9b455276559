"""Direct discriminative optimisation: its loss, its data, and rounds of self-play as a plan."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.alongside import Alongside
from gen.data.sources import Digits
from gen.errors import GenError
from gen.experiments import ddo
from gen.finetune.ddo import DDOTask, ddo_losses, quantised
from gen.sampling.guidance import ClassifierFree
from gen.training.optim import OptimConfig
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


def test_rounds_are_a_plan() -> None:
    """Each round's samples are made by the round before, without guidance."""
    plan = ddo.rounds("runs/ddo", loaded(TEACHER, SAMPLER), count=2)
    assert [step.name for step in plan.steps] == ["samples-0", "round-1", "samples-1", "round-2"]
    assert [dict(step.takes) for step in plan.steps[2:]] == [
        {"teacher": "round-1"},
        {"teacher": "round-1", "fakes": "samples-1"},
    ]
    assert plan.given["round-0"].config.sampler.guidance == ClassifierFree()
