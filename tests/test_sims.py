"""SIMS: the copy's recipe, guidance away from it, moved weights, and the plan with its shares of classes."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gen.errors import GenError
from gen.experiments import sims
from gen.experiments.demo import SAMPLER, TEACHER
from gen.features.digits import DigitsExtractor
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays
from gen.nn.network import Network
from gen.sampling.guidance import Autoguidance
from gen.steps import MakeRecords
from tests.test_matching_presets import loaded


def model(key: int) -> object:
    return loaded(TEACHER, SAMPLER, jax.jit(Network(TEACHER.network).init)(jax.random.key(key)))


def test_a_copy_guides_and_weights_move() -> None:
    base, copy = model(0), model(1)
    found = sims.guided(base, copy, 1.5)
    assert found.generator.sampler.guidance == Autoguidance(1.5)
    assert set(found.generator.networks) == {"net", "guide"}
    assert found.params["guide"] is copy.params["net"]
    a, b = (m.params["net"]["patch"]["kernel"] for m in (base, copy))
    moved = sims.moved(base, copy, 0.5).params["net"]["patch"]["kernel"]
    np.testing.assert_allclose(moved, a + 0.5 * (a - b), rtol=1e-5, atol=1e-7)


def test_the_plan_and_its_copy(tmp_path: Path) -> None:
    base = model(0)
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    extractor = DigitsExtractor()
    reference = make_reference("noise", from_arrays(images), extractor, batch=12)
    plan = sims.plan(tmp_path / "out", base, reference, extractor, samples=64, shares=(0.5, 0.5) + (0.0,) * 8)
    assert [step.name for step in plan.steps] == ["samples", "auxiliary", "scores"]
    (tmp_path / "records.json").touch()
    recipe = sims.sims(base, str(tmp_path))
    assert recipe.config.frozen == {"start": base.origin}
    assert recipe.config.stages[0].task.denoiser == TEACHER
    state = recipe.config.stages[0].task.init(jax.random.key(3), recipe.frozen, None)
    jax.tree.map(np.testing.assert_array_equal, state.params["net"], dict(base.params["net"]))
    with pytest.raises(GenError, match="among no scales"):
        sims.compared(base, base, reference=reference, extractor=extractor, scales=())


def test_shares_of_classes() -> None:
    step = MakeRecords("samples", "model", 1000, shares=(3.0, 1.0) + (0.0,) * 8)
    counts = np.bincount(step._labels(TEACHER.network.conditions)["label"], minlength=10)
    assert counts[0] == pytest.approx(750, abs=2)
    assert counts[1] == pytest.approx(250, abs=2)
    with pytest.raises(GenError, match="2 shares for 10 classes"):
        MakeRecords("samples", "model", 10, shares=(1.0, 1.0))._labels(TEACHER.network.conditions)
