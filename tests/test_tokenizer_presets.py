"""The experiments of tokenizers: built abstractly at full size, trained as toys."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import ndimage

import gen
from gen.config import from_json, to_json
from gen.data.sources import digits
from gen.errors import GenError
from gen.experiments import build, presets
from gen.features.vit import ViTConfig
from gen.features.weights import cache_path, store_weights
from gen.metrics.image import psnr
from gen.nn.network import Network, count
from gen.tokenizers.quantizers.base import usage
from gen.training.budget import abstract_states
from gen.training.engine import train
from gen.training.run import RunConfig
from tests.test_edm_presets import image_zip
from tests.training.conformance import same

FILES = ("vavae", "rae", "detok", "vitok", "flowtok", "binary_latents", "vqgan")
MINE = {
    name: p
    for name, p in presets().items()
    if p.module.rpartition(".")[2] in FILES and "tokenizer" not in p.required + p.optional
}
SMOKE = [name for name in MINE if name.endswith("-smoke")]
BIG = [name for name in MINE if name not in SMOKE]
FAST = ("rae-one-gpu", "detok-bb", "vitok-s-b-16", "flowtok-tokenizer")  # the rest trace for half a minute together
COUNTS = {
    "vavae-f16d32": 69_836_067,
    "vavae-f16d32-long": 69_836_067,
    "vavae-ldm-f16d32": 69_836_067,
    "instella-tokenizer": 427_754_560,
    "llamagen-vq16": 71_883_403,
    "llamagen-vq8": 70_109_835,
    "var-vqvae": 108_948_355 + 10 * 4096,  # and the running hits of the codes at each scale
}
ENCODERS = ("dinov2", "mae", "dinov2-with-registers-base")
ENCODER = ViTConfig(size=16, patch=4, width=8, depth=1, heads=1, hidden=8)


@pytest.fixture(autouse=True)
def _no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in BIG])
def test_full_size_presets(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without LPIPS weights they say what they go without; a frozen encoder they must have."""
    data = {"data": image_zip(tmp_path / "images.zip", 32)}
    if MINE[name].module.endswith(("vavae", "rae")) and "ldm" not in name:
        with pytest.raises(GenError, match=r"no weights at .* run gen convert (dinov2|mae)"):
            build(name, data)
        params = Network(ENCODER).init(jax.random.key(0))
        for file in ENCODERS:
            store_weights(cache_path(file), params, origin="test", network=ENCODER)
    recipe = build(name, data)
    assert "without the term lpips-vgg" in capsys.readouterr().out
    config = recipe.config
    assert from_json(to_json(config)) == config
    assert config.name == name
    for state in abstract_states(config.stages, recipe.frozen):
        assert count(state.params["tokenizer"]) == COUNTS.get(name, count(state.params["tokenizer"]))


def short(config: RunConfig) -> RunConfig:
    """The run with stages of four steps of eight, all of them with a discriminator where there is one."""
    stages = []
    for stage in config.stages:
        given = {f.name for f in dataclasses.fields(stage.task)}
        task = dataclasses.replace(stage.task, **{"gan_start": 2} if "gan_start" in given else {})
        stages.append(dataclasses.replace(stage, task=task, steps=4, batch=8))
    return dataclasses.replace(config, stages=tuple(stages), engine=dataclasses.replace(config.engine, quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_presets_train_resume_and_reconstruct(name: str, real: bool, tmp_path: Path) -> None:
    """On digits, and on an EDM zip of colour images."""
    recipe = build(name, {"data": image_zip(tmp_path / "images.zip", 32)} if real else {})
    config = short(recipe.config)
    whole = train(config, tmp_path / "whole", frozen=recipe.frozen)
    train(config, tmp_path / "run", frozen=recipe.frozen, stop_after=3)
    assert same(train(config, tmp_path / "run", frozen=recipe.frozen), whole)
    loaded = gen.load(tmp_path / "run")
    images = np.zeros((2, *loaded.tokenizer.spec.image), np.uint8)
    assert loaded.decode(loaded.encode(images)).shape == images.shape


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_presets_beat_a_blur(name: str, tmp_path: Path) -> None:
    """Held-out digits come back better than under a Gaussian of 0.7 pixels, which gives 16.2 dB, from codes in use."""
    recipe = build(name, {})
    engine = dataclasses.replace(recipe.config.engine, quiet=True)
    train(dataclasses.replace(recipe.config, engine=engine), tmp_path / "run", frozen=recipe.frozen)
    images: Any = digits("test").arrays["image"]
    loaded = gen.load(tmp_path / "run")
    ids, spec = loaded.encode(images), loaded.tokenizer.spec
    decoded = loaded.decode(ids)
    use = 1.0 if spec.kind == "continuous" else float(usage(ids, spec.vocabulary)["usage"])
    blurred = ndimage.gaussian_filter(images.astype(np.float64), (0, 0.7, 0.7, 0)).round().astype(np.uint8)
    found, baseline = (float(np.mean(psnr(np.asarray(x), images))) for x in (decoded, blurred))
    print(f"{name}: {found:.2f} dB, blur {baseline:.2f} dB, usage {use:.2f}")
    assert use > 0.5
    assert found > baseline + 1.0
