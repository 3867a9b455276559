"""The EDM2 experiment: built abstractly at full size, and trained as a toy."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import gen
from gen.config import from_json, to_json
from gen.data.caches import seal
from gen.experiments import build, presets
from gen.training.budget import abstract_states
from gen.training.ema import combine, posthoc_coefficients
from gen.training.engine import train
from gen.training.run import load_run
from gen.training.sharding import bytes_per_device
from tests.test_edm_presets import image_zip
from tests.training.conformance import same

COUNTS = {
    "edm2-xs-512": 124_713_765,
    "edm2-s-512": 280_213_477,
    "edm2-xxl-512": 1_523_165_925,
    "edm2-s-64": 280_213_477 - 9 * 192 * 2,  # one channel less in and out
}


@pytest.fixture
def cache(tmp_path: Path) -> str:
    folder = tmp_path / "cache"
    folder.mkdir()
    np.save(folder / "latent.npy", np.random.default_rng(0).normal(size=(2, 64, 64, 4)).astype(np.float32))
    np.save(folder / "label.npy", np.arange(2, dtype=np.int32))
    return seal(folder, tokenizer="none", data="none").path


@pytest.mark.parametrize("name", COUNTS)
def test_full_size_presets(name: str, cache: str, tmp_path: Path) -> None:
    assert presets()[name].required == ("data",)
    latent = name.endswith("512")
    data = cache if latent else image_zip(tmp_path / "images.zip", 64, 1)
    recipe = build(name, {"data": data})
    config = recipe.config
    assert from_json(to_json(config)) == config
    (state,) = abstract_states(config.stages, recipe.frozen)
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert total == COUNTS[name]
    assert bytes_per_device(state.params, {"data": 8, "fsdp": 8, "tensor": 1}) < 1.1 * 4 * total / 8
    assert set(recipe.artifacts) == ({"normalizer"} if latent else set())
    assert config.generator().nfe == 63
    (stage,) = config.stages
    # the rate of the official schedule after 1 Gi images
    rates = {"edm2-xs-512": 0.0120, "edm2-s-512": 0.0100, "edm2-xxl-512": 0.0065, "edm2-s-64": 0.0100}
    expected = rates[name] / np.sqrt(2**30 / 2048 / (70_000 if latent else 35_000))
    np.testing.assert_allclose(stage.task.optim.rate(2**30 // 2048, stage.steps), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_smoke_preset_trains_resumes_and_samples(real: bool, tmp_path: Path) -> None:
    recipe = build("edm2-smoke", {"data": image_zip(tmp_path / "images.zip", 32)} if real else {})
    (stage,) = recipe.config.stages
    config = dataclasses.replace(
        recipe.config,
        stages=(dataclasses.replace(stage, steps=4, batch=8),),
        sampler=recipe.config.sampler.changed(steps=2),
        engine=dataclasses.replace(recipe.config.engine, quiet=True, keep_every=2, checkpoint_every=2),
    )
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", stop_after=2)
    assert same(train(config, tmp_path / "run"), whole)
    assert gen.load(tmp_path / "run").sample(range(2)).shape == ((2, 32, 32, 3) if real else (2, 8, 8, 1))
    # any other width of the average, from the kept checkpoints
    stds = [decay.std for decay in stage.task.emas]
    states = [load_run(tmp_path / "whole", step)[2] for step in (2, 4)]
    snapshots = [s.ema[name] for s in states for name in ("net", "net@1")]
    times = np.repeat([2.0, 4.0], 2)
    weights = posthoc_coefficients(times, stds * 2, [4.0], [0.10])[:, 0]
    combined = combine(jax.device_get(snapshots), weights)
    kernel = combined["out_conv"]["kernel"]
    np.testing.assert_allclose(kernel, whole.ema["net@1"]["out_conv"]["kernel"], rtol=1e-3, atol=1e-5)
