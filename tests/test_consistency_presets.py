"""The experiments of consistency models: built abstractly at full size for a teacher of EDM's."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import FlowMap
from gen.diffusion.objectives import EDMLoss
from gen.diffusion.process import EDM, TrigFlow
from gen.errors import GenError
from gen.experiments import build, presets
from gen.experiments.ctm import last_layer
from gen.experiments.edm import ADM64, CIFAR
from gen.nn.network import count, param_shapes
from gen.runs import Loaded
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.distill.tiny import Tiny
from tests.test_edm_presets import image_zip

FILES = ("consistency", "scm", "ctm")
MINE = {name: p for name, p in presets().items() if p.module.rpartition(".")[2] in FILES}
FULL = [name for name, preset in MINE.items() if "data" in preset.required]
# parameters of the trained flow map: its teacher's, with a second time's layers where it has two
ADM, CIFAR10, NCSN, CTM = 295_899_267, 55_732_739, 56_395_651, 60_395_267
COUNTS = {"ct-cifar10": NCSN, "ict-cifar10": NCSN, "ctm-cifar10": CTM, "ctm-cifar10-gpu": CTM}
COUNTS |= {"ctm-imagenet64": 324_100_611}
QUICK = ("ict-cifar10",)  # a second or less; the shapes of a large network take ten times as long


def teacher(network: Any, path: Path) -> Loaded:
    """A run of EDM's that holds the shapes of its arrays alone."""
    network = dataclasses.replace(network, augment=0, dropout=0.0)
    model = Model(Denoiser(network, EDM(), EDMPrecondition(), EDMLoss()))
    return Loaded(path, RunConfig("edm", models={"net": model}), {"net": param_shapes(network)}, "ema", 0)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FULL])
def test_full_size_presets(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = "imagenet64" in name
    given: dict[str, Any] = {"data": image_zip(tmp_path / "images.zip", 64 if large else 32, 1)}
    if "teacher" in MINE[name].required:
        given["teacher"] = teacher(ADM64 if large else CIFAR, tmp_path)
    recipe = build(name, given)
    config = recipe.config
    assert from_json(to_json(config)) == config
    assert config.name == name
    flow_map = config.exported()["net"].config
    assert isinstance(flow_map, FlowMap)
    assert count(param_shapes(flow_map.network)) == COUNTS.get(name, ADM if large else CIFAR10)
    assert isinstance(flow_map.process, TrigFlow if name.startswith("sc") else EDM)
    calls = 1 if name.startswith(("cd", "ctm")) else 2
    assert config.generator().nfe == calls
    assert ("lpips" in capsys.readouterr().out) == name.startswith(("cd", "ct"))


@pytest.mark.slow
def test_the_layer_where_terms_are_weighed() -> None:
    assert last_layer(CIFAR) == "dec/32x32_aux_conv/kernel"
    assert last_layer(ADM64) == "dec/64x64_block3/conv1/kernel"


def test_a_network_without_a_known_last_layer() -> None:
    assert last_layer(DiTConfig((4,), width=16, depth=1, heads=2)) == "final/kernel"
    with pytest.raises(GenError, match="Tiny has no last layer"):
        last_layer(Tiny())
