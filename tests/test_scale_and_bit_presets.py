"""The experiments with token maps and with bits: planned at full size; the toys train on digits, resume and sample."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import xlogy

import gen
from gen import cli
from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.cli.estimates import planned
from gen.cli.overrides import override
from gen.config import from_json, to_json
from gen.data.sources import Digits, digits
from gen.errors import GenError
from gen.experiments import Recipe, build, find
from gen.files import read_json
from gen.nn.network import count, param_shapes
from gen.runs import Loaded
from gen.tokenizers.encode import encode_images
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.var_vqvae import VARVQVAEConfig
from gen.training.engine import train
from gen.training.logging import read_metrics
from gen.training.run import RunConfig
from gen.training.task import Stage
from tests.autoregressive.learned import agreement
from tests.training.conformance import same

COUNTS = {
    "var-d16": 310_283_520,
    "var-d20": 600_917_136,
    "var-d24": 1_033_399_360,
    "var-d30": 2_010_020_356,
    "var-d36-512": 2_353_893_904,
    "var-one-gpu": 133_186_960,
    "instella-diffusion": 1_292_517_440,
    "instella-ar": 877_176_896,
    "instella-one-gpu": None,
    "binary-diffusion-churches": None,
    "binary-diffusion-imagenet": None,
    "flextok-ar": None,
}
MAPS = VARVQVAEConfig((8, 8, 1), Residual(32, 4, (1, 2, 4)), 8, (1, 2), blocks=1, inner=4, groups=4)
# the toy, the tokenizer's toy, and the published system whose names it has
TOYS = [
    ("var-smoke", "", "var"),
    ("binary-diffusion-smoke", "binary-ae-smoke", "binary-diffusion"),
    ("instella-diffusion-smoke", "instella-smoke", None),
    ("instella-ar-smoke", "instella-smoke", None),
    ("flextok-ar-smoke", "flextok-smoke", None),
]


FAST = ("instella-ar", "binary-diffusion-imagenet")  # the rest trace for half a minute together


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS])
def test_full_size_presets(name: str) -> None:
    """Planned on random data, without a tokenizer's run."""
    config = planned(name, {"data": None}).config
    assert from_json(to_json(config)) == config
    assert config.name == name
    found = count(param_shapes(config.stages[0].task.model))
    assert found == (COUNTS[name] or found)
    assert config.generator().nfe >= 10


def short(config: RunConfig, steps: int) -> RunConfig:
    """The run with a stage of so many steps of eight rows."""
    (stage,) = config.stages
    stage = dataclasses.replace(stage, steps=steps, batch=8)
    return dataclasses.replace(config, stages=(stage,), engine=dataclasses.replace(config.engine, quiet=True))


def encoded(tokenizer: str, folder: Path) -> tuple[Loaded, str]:
    """A barely trained tokenizer of digits, a preset's or `MAPS`, and a cache of its tokens."""
    stage = Stage("tokenizer", TokenizerTask(MAPS), 2, 8, Digits("train"))
    recipe = build(tokenizer, {}) if tokenizer else Recipe(RunConfig("maps", (stage,)))
    train(short(recipe.config, 2), folder / "tokenizer", frozen=recipe.frozen)
    loaded = gen.load(folder / "tokenizer")
    cache = encode_images(loaded.tokenizer, loaded.params["tokenizer"], digits("test"), folder / "cache", batch=128)
    return loaded, cache.path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokenizer", "system"), TOYS)
def test_toys_train_resume_sample_and_convert(
    name: str, tokenizer: str, system: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, data = encoded(tokenizer, tmp_path)
    recipe = build(name, {"data": data, "tokenizer": loaded})
    config, given = short(recipe.config, 4), {"frozen": recipe.frozen, "artifacts": recipe.artifacts}
    whole = train(config, tmp_path / "whole", **given)
    train(config, tmp_path / "run", **given, stop_after=3)
    assert same(train(config, tmp_path / "run", **given), whole)
    run = gen.load(tmp_path / "run")
    images = run.sample([0, 1, 2])
    assert images.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(run.sample([2, 0]), images[[2, 0]])
    other = dataclasses.replace(loaded, params=jax.tree.map(lambda a: np.asarray(a) + 1, dict(loaded.params)))
    with pytest.raises(GenError, match="was encoded by another tokenizer"):
        build(name, {"data": data, "tokenizer": other})
    if system is not None:
        _check_files(run, images, system, tmp_path)


def _check_files(run: Loaded, images: np.ndarray, system: str, folder: Path) -> None:
    """gen convert writes the run under official names; read back with its tokenizer it makes the same images."""
    file, back = str(folder / "model.safetensors"), str(folder / "back")
    assert cli.main(["convert", str(run.path), "--system", system, "--out", file]) == 0
    assert cli.main(["convert", file, "--out", back, "--vae", str(folder / "tokenizer")]) == 0
    again = gen.load(back)
    assert again.generator == run.generator
    assert same(again.params["net"], run.params["net"])
    np.testing.assert_array_equal(again.sample([0, 1, 2]), images)


@pytest.mark.slow
def test_diffusion_over_bits_learns_digits(tmp_path: Path) -> None:
    """The toys at full length: far below the loss of independent bits, and digits of the class that is asked for."""
    quiet = [("engine.quiet", "true")]
    recipe = build("binary-ae-smoke", {})
    train(override(recipe.config, quiet), tmp_path / "tokenizer", frozen=recipe.frozen)
    loaded = gen.load(tmp_path / "tokenizer")
    params = loaded.params["tokenizer"]
    cache = encode_images(loaded.tokenizer, params, digits("train"), tmp_path / "cache", batch=128, label="")
    recipe = build("binary-diffusion-smoke", {"data": cache.path, "tokenizer": loaded})
    train(override(recipe.config, quiet), tmp_path / "run", artifacts=recipe.artifacts)
    source = cache.source()
    bits = source.gather(np.arange(len(source)))["bits"]
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.8 * independent(bits, recipe.config.stages[0].task.model)
    assert agreement(gen.load(tmp_path / "run").sample(range(100), [i % 10 for i in range(100)])) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var-smoke", "flextok-ar-smoke", "instella-ar-smoke"])
def test_writers_learn_digits(name: str, tmp_path: Path) -> None:
    """Far fewer bits than tokens by themselves, in digits not seen, and digits of the class that is asked for."""
    tokenizer = {toy: made_by for toy, made_by, _ in TOYS}[name] or "var-vqvae-smoke"
    run, out, quiet = str(tmp_path / "tokenizer"), str(tmp_path / "run"), ["--engine.quiet", "true"]
    data = {split: str(tmp_path / split) for split in ("train", "test")}
    cut = ["--steps", "1000"] if tokenizer == "flextok-smoke" else []  # of 2500, which take minutes
    assert cli.main(["train", tokenizer, "--outdir", run, *cut, *quiet]) == 0
    for split, cache in data.items():
        assert cli.main(["encode", run, "--data", f"digits:{split}", "--out", cache]) == 0
    assert cli.main(["train", name, "--data", data["train"], "--tokenizer", run, "--outdir", out, *quiet]) == 0
    assert cli.main(["evaluate", out, "--measures", "likelihood", "--heldout", data["test"]]) == 0
    values = read_json(Path(out) / "likelihood.json")["values"]
    assert values["bits_per_image"] < 0.85 * values["unigram_bits_per_image"]
    assert agreement(gen.load(out).sample(range(100), [i % 10 for i in range(100)])) > 0.6


def independent(bits: np.ndarray, model: BinaryDiffusion) -> float:
    """The loss of the best guess that knows each bit's share of ones, and of what noise left that bit alone."""
    assert model.levels is not None
    p, t = bits.mean(0)[..., None], np.arange(1, model.levels + 1) / model.levels
    same = model.process.chance(np.ones_like(t), t)  # P(x_t = x)
    joint = np.stack([[(1 - p) * same, (1 - p) * (1 - same)], [p * (1 - same), p * same]])  # of x and x_t
    return float(-xlogy(joint, joint / joint.sum(0)).sum((0, 1)).mean())


@pytest.mark.parametrize("name", ["var-d16", "var-smoke"])
def test_var_needs_its_tokenizer(name: str, tmp_path: Path) -> None:
    assert "data" in find(name).required
    with pytest.raises(GenError, match="tokenizer"):
        build(name, {"data": str(tmp_path)})
