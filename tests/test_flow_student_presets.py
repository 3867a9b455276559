"""Presets of reflow, SlimFlow, progressive and guided distillation, MeanFlow and shortcut models."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gen
from gen.config import from_json, to_json
from gen.data.random import Random
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import EDMLoss
from gen.diffusion.process import EDM, Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.experiments import build, presets
from gen.experiments.edm import ADM64, CIFAR
from gen.experiments.guided_distillation import progressive_distillation
from gen.experiments.rectified_flow import plan
from gen.experiments.slimflow import slimmer
from gen.nn.conditions import make_conditions
from gen.nn.network import count, param_shapes
from gen.runs import Loaded, planned
from gen.sampling.generator import Sampler
from gen.sampling.guidance import ClassifierFree
from gen.sampling.records import Solved, make_records
from gen.sampling.solvers import Heun
from gen.tokenizers.losses import LPIPS
from gen.training.budget import abstract_states
from gen.training.engine import train
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage
from tests.test_teacher_presets import cached

FILES = ("rectified_flow", "slimflow", "guided_distillation", "meanflow")
MINE = {name: p for name, p in presets().items() if p.module.rpartition(".")[2] in FILES}
PAIRS = ("reflow", "rfpp", "slimflow", "reflow-smoke", "slimflow-smoke")
COUNTS = {
    "slimflow-cifar10": 15_707_235,  # the paper's 15.7M
    "slimflow-cifar10-gpu": 15_707_235,
    "rfpp-cifar10": 55_733_891,
    "rfpp-cifar10-gpu": 55_733_891,
    "rfpp-imagenet64": 295_899_267,
    "progressive-cifar10": 55_733_891,
    "progressive-cifar10-gpu": 55_733_891,
}
BIG = (*COUNTS, "guided-imagenet64", "meanflow-xl2", "meanflow-b4", "shortcut-b2")
QUICK = ("meanflow-b4",)  # the rest trace large networks for some seconds each
TINY = Denoiser(
    DiTConfig((4, 4), 1, 2, 16, 1, 2, num_classes=3, remat="none", scan=False), Linear(), Predict("velocity")
)
DATA = Random({"latent": (4, 4, 1), "label": ()})


def run_config(denoiser: Denoiser, data: Any, steps: int = 1) -> RunConfig:
    sampler = Sampler(Heun(), steps=2, guidance=ClassifierFree(1.5 if denoiser.network.conditions else 1.0))
    stage = Stage("teacher", DenoiserTask(denoiser, dropout=0.0), steps, 8, data)
    return RunConfig("teacher", (stage,), sampler=sampler, engine=EngineConfig(quiet=True))


def big_teacher(name: str) -> Loaded:
    """EDM's teacher of a paper preset, abstractly."""
    network = ADM64 if "imagenet64" in name else CIFAR
    return planned(run_config(Denoiser(network, EDM(), EDMPrecondition(), EDMLoss()), Random({})), {}, {})


@pytest.fixture
def _lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LPIPS, "identity", lambda self: "lpips")
    monkeypatch.setattr(LPIPS, "load", lambda self: {"net": np.zeros(1, np.float32)})


@pytest.mark.usefixtures("_lpips")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BIG]
)
def test_full_size_presets(name: str, tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"data": str(tmp_path)}
    if "teacher" in MINE[name].required:
        inputs["teacher"] = big_teacher(name)
    else:
        inputs["data"] = str(cached(tmp_path / "cache"))
    recipe = build(name, inputs)
    assert from_json(to_json(recipe.config)) == recipe.config
    assert recipe.config.name == name
    model = recipe.config.exported()["net"].config
    total = count(param_shapes(model.network))
    if name in COUNTS:
        assert total == COUNTS[name]
    (first, *_) = abstract_states(recipe.config.stages[:1], recipe.frozen)
    assert count(first.params) == total
    assert recipe.config.generator().nfe == (2 if "rfpp" in name else 1)


def test_every_preset_is_here() -> None:
    tried = {"reflow", "rfpp", "slimflow", "meanflow", "shortcut", "progressive-distillation", "guided-distillation"}
    assert set(MINE) == tried | set(BIG) | {name for name in MINE if name.endswith("-smoke")}


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("name", ["reflow", "meanflow", "shortcut", "progressive-distillation", "guided-distillation"])
def test_students_have_their_teachers_shape_and_the_calls_asked_for(name: str, calls: int, tmp_path: Path) -> None:
    teacher = planned(run_config(TINY, DATA), {}, {})
    given = {"data": str(tmp_path)} if name in PAIRS else {}
    recipe = build(name, {"teacher": teacher, "calls": calls, **given})
    generator = recipe.config.generator()
    assert (generator.nfe, generator.shape) == (calls, (4, 4, 1))
    assert recipe.config.frozen == {"teacher": teacher.origin}


def test_what_cannot_be_halved_or_slimmed_is_refused() -> None:
    teacher = planned(run_config(TINY, DATA), {}, {})
    with pytest.raises(GenError, match="8 steps are not halved to 3"):
        progressive_distillation(teacher, calls=3)
    assert count(param_shapes(slimmer(teacher.denoiser).network)) < count(param_shapes(TINY.network))
    with pytest.raises(GenError, match="0 rounds of reflow"):
        plan("runs/x", teacher, rounds=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("teacher")
    train(run_config(TINY, DATA, 4), folder)
    return gen.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MINE if name.endswith("-smoke")])
def test_smoke(name: str, teacher: Loaded, tmp_path: Path) -> None:
    given = {}
    if name in PAIRS:
        pairs = tmp_path / "pairs"
        make = Solved(teacher.generator)
        cond = make_conditions(make.generator.conditions, range(64))
        make_records(make, teacher.params, pairs, count=64, maker=teacher.origin, cond=cond, label="")
        given["data"] = str(pairs)
    recipe = build(name, {"teacher": teacher, **given})
    train(recipe.config, tmp_path / "run", frozen=recipe.frozen, artifacts=recipe.artifacts)
    run = gen.load(tmp_path / "run")
    latents = run.generator(
        run.params, jax.random.split(jax.random.key(0), 3), make_conditions(run.generator.conditions, range(3))
    )
    assert np.isfinite(np.asarray(latents)).all()


@pytest.mark.slow
def test_rounds_of_reflow(teacher: Loaded, tmp_path: Path) -> None:
    """Each flow learns from the pairs of the one before; what is done is not done again; the page shows all."""
    settings: dict[str, Any] = {"rounds": 2, "pairs": 64, "updates": 4, "batch": 16, "real": 32}
    made = plan(tmp_path / "reflow", teacher, **settings).run()
    first, second = made["flow-1"], made["flow-2"]
    assert first.config.frozen["teacher"] == teacher.origin
    assert second.config.frozen["teacher"] == first.origin
    assert made["pairs-2"].maker == first.origin
    assert made["flow-real"].config.frozen == {"teacher": teacher.origin, "start": second.origin}
    rows = made["real-pairs"].source().gather(np.arange(32))
    assert rows["noise"].shape == rows["latent"].shape == (32, 4, 4, 1)
    before = (tmp_path / "reflow" / "flow-2" / "config.json").stat().st_mtime_ns
    plan(tmp_path / "reflow", teacher, **settings).run()
    assert (tmp_path / "reflow" / "flow-2" / "config.json").stat().st_mtime_ns == before
    assert "Straightness" in (tmp_path / "reflow" / "report.html").read_text()
