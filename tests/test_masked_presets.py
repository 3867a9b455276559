"""The MaskGIT, MaskGen and MAR experiments: built abstractly at full size, trained as toys on digits."""

from pathlib import Path
from typing import Any

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
from tests.conformance import examples
from tests.conformance.tokenizers import Codebook
from tests.training.conformance import same

MINE = {name: p for name, p in presets().items() if p.module.rpartition(".")[2] in ("maskgit", "maskgen", "mar")}
COUNTS = {
    "maskgit-l32": 177_202_432,
    "maskgit-b64": 177_227_008,
    "maskgit-s128": 294_990_848,
    "maskgit-one-gpu": 92_172_544,
    "maskgen-vq-l": 604_311_552 - 1001 * 1024,
    "maskgen-vq-xl": 1_176_611_840 - 1001 * 1280,
    "maskgen-kl-l": 641_329_184,
    "maskgen-kl-xl": 1_237_301_792,
    "maskgen-one-gpu": 171_327_744,
    "mar-b": 207_924_768,
    "mar-l": 478_326_304,
    "mar-h": 942_403_104,
    "mar-one-gpu": 62_948_640,
}
QUICK = ("maskgen-vq-l", "mar-b")  # the rest take seconds each


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "conformance", examples.KINDS_HERE)


def test_every_preset_is_here() -> None:
    assert sorted(COUNTS) == sorted(name for name in MINE if not name.endswith("-smoke"))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS])
def test_full_size_presets(name: str) -> None:
    recipe = build(name, {"data": RANDOM})
    config = recipe.config
    assert (from_json(to_json(config)), config.name) == (config, name)
    assert set(config.frozen) >= set(recipe.frozen)
    (state,) = abstract_states(config.stages, {})
    assert count(state.params) == COUNTS[name]


def tokenizer(folder: Path) -> Loaded:
    """Its codes are random patches."""
    config = Codebook(16)
    params = jax.device_get(Network(config).init(jax.random.key(0)))
    run = RunConfig("t", models={"tokenizer": Model(config)})
    return Loaded(folder / "tokenizer", run, {"tokenizer": params}, "raw", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskgit-smoke", "mar-smoke"])
def test_smoke_presets_train_resume_and_sample(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if name == "maskgit-smoke":
        made = tokenizer(tmp_path)
        cache = encode_images(made.tokenizer, made.params["tokenizer"], digits("train"), tmp_path / "c", label="")
        given = {"data": cache.path, "tokenizer": made}
    recipe = build(name, given)
    config = override(recipe.config, [("stages.0.steps", "40"), ("engine.quiet", "true")])
    arrays = {"frozen": recipe.frozen, "artifacts": recipe.artifacts}
    whole = train(config, tmp_path / "whole", **arrays)
    train(config, tmp_path / "run", stop_after=20, **arrays)
    assert same(train(config, tmp_path / "run", **arrays).params, whole.params)
    loaded = gen.load(tmp_path / "run")
    images = loaded.sample(range(4))
    assert (images.shape, images.dtype) == ((4, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(loaded.sample([2]), images[2:3])


def test_other_data_are_refused(tmp_path: Path) -> None:
    data = token_cache(tmp_path / "c", (2, 2))
    with pytest.raises(GenError, match="was encoded by another tokenizer"):
        build("maskgit-smoke", {"data": data, "tokenizer": tokenizer(tmp_path)})
    with pytest.raises(GenError, match=r"tokens \(2, 2\) of an image, and the model \(32,\)"):
        build("maskgit-l32", {"data": data})
    with pytest.raises(GenError, match="no 'prompt' among label, tokens"):
        build("maskgen-vq-smoke", {"data": data})
    rows = {"prompt": np.zeros((8, 4, 6), np.float16), "pooled": np.zeros((8, 6), np.float16)}
    captioned = token_cache(tmp_path / "d", (2, 2), **rows)
    with pytest.raises(GenError, match=r"empty\.npz is missing: the features of the empty caption"):
        build("maskgen-vq-smoke", {"data": captioned})
    np.savez(Path(captioned) / "empty.npz", prompt=np.zeros((4, 6)), pooled=np.zeros(5))
    with pytest.raises(GenError, match=r"expected \{'prompt': \(4, 6\), 'pooled': \(6,\)\}"):
        build("maskgen-vq-smoke", {"data": captioned})
    with pytest.raises(GenError, match="is a cache of tokens; expected one of latents"):
        build("mar-b", {"data": data})
