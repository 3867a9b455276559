"""The worked pages of CONTRIBUTING.md are followed: their code runs, and what it adds behaves as the page says."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import config, kinds
from gen.data.sources import Digits, digits
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.experiments import presets
from gen.features.digits import DigitsExtractor
from gen.metrics.evaluate import Settings, evaluate
from gen.metrics.measures import MEASURES
from gen.metrics.reference import make_reference
from gen.metrics.sources import from_arrays
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.tokenizers.train import TokenizerTask
from gen.training.checks import dry_run
from gen.training.engine import train
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
OWN = "docs/own-experiment.md"  # the file that the pages on experiments and backbones send to
PAGES = {m[1]: m[0] for m in re.finditer(r"^## How to add an? (\w+)$.*?(?=^## |\Z)", TEXT, re.M | re.S)}


@pytest.fixture
def page(monkeypatch, request):
    """The code of one page as a module, its KINDS row in force for the test."""
    for family in kinds.KINDS:
        monkeypatch.setitem(kinds.KINDS, family, dict(kinds.KINDS[family]))
    monkeypatch.setitem(MEASURES, "confidence", None)  # taken out again after the test
    module = types.ModuleType(f"contributing_{request.param}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.KINDS = kinds.KINDS
    exec(compile(code_of(request.param), f"CONTRIBUTING.md, {request.param}", "exec"), module.__dict__)
    return module


def code_of(name):
    """The code of a page, or of the page that it sends to."""
    text = PAGES[name] if "```python" in PAGES[name] else (ROOT / OWN).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def test_six_short_pages():
    assert set(PAGES) == {"experiment", "solver", "backbone", "tokenizer", "distiller", "metric"}
    assert sum(len(text.splitlines()) for text in PAGES.values()) <= 210
    for name, text in PAGES.items():
        assert "```python" in text or f"({OWN})" in text, name
        assert len(code_of(name).splitlines()) <= 66, name


def test_every_room_is_named():
    rooms = {path.name for path in Path(config.__file__).parent.iterdir() if (path / "__init__.py").exists()}
    assert not [room for room in rooms if f"`gen/{room}/`" not in TEXT]


@pytest.mark.parametrize("page", ["experiment"], indirect=True)
def test_experiment(page, tmp_path):
    (tmp_path / "my_flow.py").write_text(code_of("experiment"))
    (preset,) = presets(tmp_path).values()
    assert (preset.name, preset.required) == ("my-flow", ())
    recipe = page.PRESETS[preset.name]()
    assert config.from_json(config.to_json(recipe.config)) == recipe.config
    assert recipe.config.name == preset.name
    assert "net 164,672 parameters" in dry_run(recipe.config)[0]


@pytest.mark.parametrize("page", ["solver"], indirect=True)
def test_solver(page):
    from tests.sampling.test_solvers import test_order_of_convergence

    solver = config.from_json({"kind": "adams-bashforth"})
    test_order_of_convergence(solver, Linear())


@pytest.mark.parametrize("page", ["backbone"], indirect=True)
def test_backbone(page):
    denoiser = Denoiser(config.from_json({"kind": "wide"}), Linear())
    params = {"net": denoiser.net.init(jax.random.key(0))}
    images = DiffusionGenerator(denoiser, Sampler(steps=2))(params, jax.random.split(jax.random.key(1), 3), {})
    assert images.shape == (3, 8, 8, 1)
    assert np.isfinite(images).all()
    assert denoiser.features(params["net"], images, jnp.float32(0.5), {}, ("hidden",))["hidden"].shape == (3, 256)


@pytest.mark.parametrize("page", ["tokenizer"], indirect=True)
def test_tokenizer(page, tmp_path):
    task = TokenizerTask(config.from_json({"kind": "linear-pair"}))
    stage = Stage("tokenizer", task, steps=3, batch=16, data=Digits())
    state = train(RunConfig("try", (stage,), engine=EngineConfig(quiet=True)), tmp_path)
    assert int(state.step) == 3
    images = jnp.zeros((2, 8, 8, 1))
    params = task.export(state)["tokenizer"]
    assert task.tokenizer.decode(params, task.tokenizer.encode(params, images).mode()).shape == images.shape


@pytest.mark.parametrize("page", ["distiller"], indirect=True)
def test_distiller(page):
    denoiser = Denoiser(DiTConfig((4,), 8, 1, 16, 1, 2, num_classes=10), Linear())
    task = page.CopyTask(teacher=denoiser)
    # a fresh DiT answers 0 everywhere: move the teacher away from that
    frozen = {"teacher": jax.tree.map(lambda a: a + 0.1, denoiser.net.init(jax.random.key(1)))}
    state = task.init(jax.random.key(0), frozen, None)
    state = dataclasses.replace(state, params=jax.tree.map(lambda a: a + 0.1, state.params))  # it starts as its teacher
    batch = {"latent": jnp.ones((8, 4, 8)), "label": jnp.arange(8)}
    new, metrics = jax.jit(task.programs[task.select(0)])(state, frozen, batch, task.inputs(0, 1), jax.random.key(2))
    assert np.isfinite(metrics["loss"])
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.params, new.params)), strict=True))


@pytest.mark.parametrize("page", ["metric"], indirect=True)
def test_metric(page):
    statistic = page.Confidence()
    logits = jax.random.normal(jax.random.key(0), (6, 10))
    weight, index = jnp.array([1.0] * 5 + [0.0]), jnp.arange(6)
    whole = statistic.update(statistic.init({"logits": logits}, 6), {"logits": logits}, weight, index)
    parts = [
        statistic.update(statistic.init({}, 6), {"logits": logits[i : i + 3]}, weight[i : i + 3], index[i : i + 3])
        for i in (0, 3)
    ]
    expected = np.asarray(jax.nn.softmax(logits[:5])).max(-1).mean()
    assert statistic.finalise(whole)["confidence"] == pytest.approx(expected, rel=1e-6)
    assert statistic.finalise(statistic.merge(*parts))["confidence"] == pytest.approx(expected, rel=1e-6)
    arrays, extractor = digits("test").arrays, DigitsExtractor()
    source = from_arrays(arrays["image"][:64], arrays["label"][:64])
    reference = make_reference("digits", source, extractor, batch=64)
    found = evaluate(source, reference, extractor, Settings(extra=("confidence",)), batch=64)
    assert 0.9 < found.values["confidence"] <= 1
    with pytest.raises(GenError, match="confidence needs"):
        evaluate(from_arrays(arrays["image"][:64]), reference, extractor, Settings(extra=("confidence",)), batch=64)
