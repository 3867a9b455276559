"""The LlamaGen and RAR experiments: built abstractly at full size, trained as toys on digits."""

from pathlib import Path

import jax
import numpy as np
import pytest

import gen
from gen.cli.overrides import override
from gen.config import from_json, to_json
from gen.data.random import RANDOM
from gen.data.sources import digits
from gen.errors import GenError
from gen.experiments import build, presets
from gen.kinds import KINDS
from gen.nn.network import Network, count
from gen.runs import Loaded
from gen.tokenizers.encode import encode_images
from gen.training.budget import abstract_states
from gen.training.engine import train
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.autoregressive.caches import token_cache
from tests.autoregressive.learned import agreement, patch_tokenizer
from tests.conformance import examples
from tests.conformance.tokenizers import Codebook

MINE = {name: p for name, p in presets().items() if p.module.rpartition(".")[2] in ("llamagen", "rar")}
SMOKE = [name for name in MINE if name.endswith("-smoke")]
COUNTS = {
    "llamagen-l": 342_910_976,
    "llamagen-xl-384": 774_699_520,
    "llamagen-t2i-xl": 774_699_520 - 1001 * 1280 + 1280 * (2048 + 1280) + 120 * 2048,
    "llamagen-b": 110_888_448,
    "rar-b": 260_923_648,
    "rar-xl": 955_425_024,
    "rar-one-gpu": 260_923_648,
}


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "conformance", examples.KINDS_HERE)


def test_full_size_presets() -> None:
    assert sorted(COUNTS) == sorted(set(MINE) - set(SMOKE))
    for name, parameters in COUNTS.items():
        config = build(name, {"data": RANDOM}).config
        assert (from_json(to_json(config)), config.name) == (config, name)
        (state,) = abstract_states(config.stages, {})
        assert count(state.params) == parameters, name


def codebook(folder: Path) -> Loaded:
    """A tokenizer that is not trained: its codes are random patches."""
    tokenizer = Codebook(16)
    params = jax.device_get(Network(tokenizer).init(jax.random.key(0)))
    run = RunConfig("t", models={"tokenizer": Model(tokenizer)})
    return Loaded(folder / "tokenizer", run, {"tokenizer": params}, "raw", 0)


def trained(name: str, tokenizer: Loaded, folder: Path, *overrides: tuple[str, str]) -> Loaded:
    """The preset's run on the digits' tokens."""
    params = tokenizer.params["tokenizer"]
    cache = encode_images(tokenizer.tokenizer, params, digits("train"), folder / "c", label="")
    recipe = build(name, {"data": cache.path, "tokenizer": tokenizer})
    config = override(recipe.config, [("engine.quiet", "true"), *overrides])
    train(config, folder / "run", frozen=recipe.frozen, artifacts=recipe.artifacts)
    return gen.load(folder / "run")


def test_a_smoke_preset_trains_and_samples(tmp_path: Path) -> None:
    loaded = trained("llamagen-smoke", codebook(tmp_path), tmp_path, ("stages.0.steps", "20"))
    images = loaded.sample(range(4))
    assert (images.shape, images.dtype) == ((4, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(loaded.sample([2, 3, 0, 1]), images[[2, 3, 0, 1]])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_smoke_presets_learn_digits(name: str, tmp_path: Path) -> None:
    """Digits -> tokens of patches -> digits of the class that is asked for."""
    loaded = trained(name, gen.load(patch_tokenizer(tmp_path / "patches")), tmp_path)
    assert agreement(loaded.sample(range(100), [i % 10 for i in range(100)])) > 0.6


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    data, tokenizer = token_cache(tmp_path / "c", (2, 2)), codebook(tmp_path)
    with pytest.raises(GenError, match="was encoded by another tokenizer"):
        build("llamagen-smoke", {"data": data, "tokenizer": tokenizer})
    other = token_cache(tmp_path / "d", (4, 4))
    with pytest.raises(GenError, match=r"tokens \(2, 2\) of an image, and the model \(4, 4\)"):
        build("rar-smoke", {"data": other, "tokenizer": tokenizer})
    with pytest.raises(GenError, match="a vocabulary of 16, and the model one of 16384"):
        build("llamagen-b", {"data": token_cache(tmp_path / "e", (16, 16))})
    with pytest.raises(GenError, match="is no cache of tokens; encode the images first"):
        build("llamagen-b", {"data": str(tmp_path)})
    rows = {"text": np.zeros((8, 120, 2048), np.float16)}
    with pytest.raises(GenError, match="has no text_mask"):
        build("llamagen-t2i-xl", {"data": token_cache(tmp_path / "f", (16, 16), 16384, **rows)})
