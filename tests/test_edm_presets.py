"""The EDM experiments: built abstractly at full size, and trained as toys with augmentation and dropout."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import gen
from gen.config import from_json, to_json
from gen.experiments import build, presets
from gen.training.budget import abstract_states
from gen.training.engine import train
from gen.training.sharding import MeshConfig, bytes_per_device
from tests.training.conformance import same

MINE = {name: p for name, p in presets().items() if p.module.rpartition(".")[2] == "edm"}
BIG = [name for name, preset in MINE.items() if preset.required]
COUNTS = {
    "edm-cifar10": 55_733_891,
    "edm-cifar10-cond": 55_735_299,
    "edm-cifar10-gpu": 55_735_299,
    "edm-cifar10-ncsnpp": 56_397_827 + 128,  # with the fixed frequencies
    "edm-ffhq64": 61_805_571,
    "edm-afhqv2-64": 61_805_571,
    "edm-imagenet64": 295_899_267,
}


def image_zip(path: Path, size: int, count: int = 12) -> str:
    """Images in EDM's layout."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"00000/img{i:08d}.png" for i in range(count)]
        for name in names:
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(out, "PNG")
            archive.writestr(name, out.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[n, i % 10] for i, n in enumerate(names)]}))
    return str(path)


@pytest.mark.parametrize("name", BIG)
def test_full_size_presets(name: str, tmp_path: Path) -> None:
    data = image_zip(tmp_path / "images.zip", 64 if "64" in name else 32, 1)
    config = build(name, {"data": data}).config
    assert from_json(to_json(config)) == config
    assert config.name == name
    (state,) = abstract_states(config.stages, {})
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert total == COUNTS[name]
    sizes = {"data": 8, "fsdp": 8, "tensor": 1}
    assert bytes_per_device(state.params, sizes, MeshConfig().shard_from) < 1.15 * 4 * total / 8
    assert config.generator().nfe == {"edm-imagenet64": 511, "edm-ffhq64": 79, "edm-afhqv2-64": 79}.get(name, 35)


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True])
def test_smoke_preset_trains_resumes_and_samples(zipped: bool, tmp_path: Path) -> None:
    recipe = build("edm-smoke", {"data": image_zip(tmp_path / "images.zip", 32)} if zipped else {})
    (stage,) = recipe.config.stages
    network = dataclasses.replace(stage.task.denoiser.network, width=8, mult=(1, 2), attention=(), dropout=0.1)
    denoiser = dataclasses.replace(stage.task.denoiser, network=network)
    task = dataclasses.replace(stage.task, denoiser=denoiser)
    config = dataclasses.replace(
        recipe.config,
        stages=(dataclasses.replace(stage, task=task, steps=4, batch=8),),
        engine=dataclasses.replace(recipe.config.engine, quiet=True),
        sampler=recipe.config.sampler.changed(steps=2),
    )
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "run", stop_after=2)
    assert same(train(config, tmp_path / "run"), whole)
    size = 32 if zipped else 8
    assert gen.load(tmp_path / "run").sample(range(2)).shape == (2, size, size, 3 if zipped else 1)
