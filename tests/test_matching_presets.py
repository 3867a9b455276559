"""Presets of distribution matching, adversarial distillation and several students, for teachers of any kind."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gen.data.images import Images
from gen.data.partitioned import Partitioned
from gen.data.sources import Digits
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.backbones.lamamba import LaMambaConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.experiments import dmd2, f_distill, kd, ladd, multi_student
from gen.experiments._heads import bottleneck_head, every_block
from gen.experiments.demo import SAMPLER, TEACHER
from gen.experiments.edm import ADM64
from gen.nn.adversarial import ConvHead, Heads, TokenLogits
from gen.nn.network import Network, count, param_shapes
from gen.pretrained.dmd2 import generator
from gen.runs import Loaded
from gen.sampling.records import Records
from gen.sampling.router import Routed
from gen.training.budget import abstract_states
from gen.training.checks import check_run
from gen.training.engine import train
from gen.training.run import RunConfig
from gen.training.task import Model

PRESETS = {
    name: preset for module in (dmd2, f_distill, kd, ladd, multi_student) for name, preset in module.PRESETS.items()
}


def loaded(denoiser: Denoiser, sampler: Any, params: Any = None) -> Loaded:
    """A teacher of shapes alone, as published weights are loaded."""
    config = RunConfig("t", models={"net": Model(denoiser)}, sampler=sampler)
    return Loaded(Path("runs/t"), config, {"net": params or param_shapes(denoiser.network)}, "raw", 0)


ADM = dataclasses.replace(ADM64, num_classes=1000)


def adm() -> Loaded:
    found = generator(ADM)
    return loaded(found.denoiser, found.sampler)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if "imagenet64" in name])
def test_papers_presets_have_the_papers_networks(name: str) -> None:
    config = PRESETS[name](adm(), "images").config
    last = config.stages[-1].task
    task = getattr(last, "task", last)
    assert task.times == pytest.approx((80.0,))
    assert task.head == ConvHead(768)  # the published head
    assert task.taps == ("enc.8x8_block2",)
    small = name.endswith("small")
    assert count(param_shapes(task.denoiser.network)) == (166_635_363 if small else 295_899_267)
    data = config.stages[-1].data
    assert (data.data if isinstance(data, Partitioned) else data) == Images("images", 64)
    assert isinstance(config.sampler, Routed) == name.startswith("multi-student")


@pytest.mark.parametrize("name", ["dmd2", "dmd", "f-distill", "ladd", "kd", "multi-student"])
def test_methods_take_everything_from_their_teacher(name: str, tmp_path: Path) -> None:
    """How what comes out will be sampled is traced, too."""
    (tmp_path / "records.json").touch()
    teacher = loaded(TEACHER, SAMPLER)
    recipe = PRESETS[name](teacher, str(tmp_path))
    assert isinstance(getattr(recipe.config.stages[-1].data, "data", recipe.config.stages[-1].data), Records)
    check_run(recipe.config)
    task = recipe.config.stages[-1].task
    task = getattr(task, "task", task)
    assert task.teacher == TEACHER
    assert getattr(task, "guidance", SAMPLER.guidance) == SAMPLER.guidance


def test_a_student_of_another_network_learns_scores_first(tmp_path: Path) -> None:
    (tmp_path / "records.json").touch()
    teacher = loaded(TEACHER, SAMPLER)
    small = dataclasses.replace(TEACHER.network, width=32, depth=1)
    names = [stage.name for stage in PRESETS["dmd2"](teacher, str(tmp_path)).config.stages]
    assert names == ["regression", "matching"]  # the data are pairs
    for name, more, first in (("dmd2", {"calls": 2}, "matching"), ("multi-student", {}, "regression")):
        config = PRESETS[name](teacher, str(tmp_path), student=small, **more).config
        assert [stage.name for stage in config.stages[:2]] == ["scores", first]
        *_, state = abstract_states(config.stages, {"teacher": teacher.params["net"]})
        student = state.params["students"]["student"] if name == "multi-student" else state.params["student"]
        assert count(student) == count(param_shapes(small)) * (2 if name == "multi-student" else 1)
    assert config.sampler == Routed()
    assert PRESETS["dmd2"](teacher, str(tmp_path), calls=4).config.stages[-1].task.times == (1.0, 0.75, 0.5, 0.25)


def test_heads_fit_what_they_look_at() -> None:
    assert bottleneck_head(TEACHER) == {"taps": ("block_1",), "head": TokenLogits(64)}
    assert every_block(TEACHER)["head"] == Heads((TokenLogits(64),) * 3)
    unet = Denoiser(SongUNetConfig(32, width=16, mult=(1, 2), blocks=1, num_classes=3), Linear())
    found = bottleneck_head(unet)
    assert found == {"taps": ("enc.16x16_block0",), "head": ConvHead(32, 4, 2, 16)}
    features = jax.ShapeDtypeStruct((2, 16, 16, 32), np.float32)
    head = Network(found["head"])
    assert jax.eval_shape(head, param_shapes(found["head"]), features).shape == (2, 1)
    assert every_block(unet) == found
    lamamba = Denoiser(LaMambaConfig(size=(16, 16), channels=4, num_classes=3), Linear())
    assert bottleneck_head(lamamba)["taps"] == ("middle",)


def test_classes_are_divided_by_number_by_chance_or_by_likeness() -> None:
    teacher = loaded(TEACHER, SAMPLER)
    found = [multi_student.divided(teacher, Digits("train"), 2, way) for way in ("contiguous", "shuffled", "clustered")]
    assert len(set(found)) == 3
    assert all(sorted(np.bincount(partition)) == [5, 5] for partition in found)
    plain = dataclasses.replace(TEACHER, network=dataclasses.replace(TEACHER.network, num_classes=0))
    with pytest.raises(GenError, match="no classes to divide among students"):
        multi_student.divided(loaded(plain, SAMPLER), Digits("train"), 2)


SMOKE: list[Callable[..., Any]] = [
    dmd2.dmd2_smoke,
    f_distill.f_distill_smoke,
    ladd.ladd_smoke,
    multi_student.multi_student_smoke,
]


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMOKE, ids=lambda preset: preset.__name__)
def test_a_few_steps_train(preset: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = dataclasses.replace(TEACHER.network, size=(8, 8), channels=1, patch=2)
    teacher = loaded(dataclasses.replace(TEACHER, network=network), SAMPLER, Network(network).init(jax.random.key(0)))
    monkeypatch.setattr("gen.experiments._students.Images", lambda *args, **kwargs: Digits("train"))
    recipe = preset(teacher, "digits")
    state = train(recipe.config, tmp_path / "run", frozen=recipe.frozen, artifacts=recipe.artifacts)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
