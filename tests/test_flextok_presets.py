"""The FlexTok experiments: built abstractly at full size; the toy trains and its tokens are scored by their number."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gen.cli import main
from gen.config import from_json, to_json
from gen.errors import GenError
from gen.experiments import build, presets
from gen.files import read_json
from gen.nn.network import Network, count
from gen.runs import Loaded
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.training.budget import abstract_states
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.conformance.examples import TOKENIZER

MINE = [name for name, p in presets().items() if p.module.endswith(".flextok") and "-d1" in name]
VAE = KLVAEConfig((256, 256, 3), 4, (1, 1, 1, 1), 1, 16, 16, groups=2)


def autoencoder(tmp_path: Path, config: object, scale: float | None = None) -> Loaded:
    params = {"tokenizer": jax.tree.map(np.asarray, Network(config).init(jax.random.key(0)))}
    if scale is not None:
        params["normalizer"] = {"shift": np.zeros(16), "scale": np.full(16, scale)}
    return Loaded(tmp_path, RunConfig("vae", models={"tokenizer": Model(config)}), params, "raw", 0)


@pytest.mark.parametrize("name", [n if n == MINE[-1] else pytest.param(n, marks=pytest.mark.slow) for n in MINE])
def test_full_size_presets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = build(name, {"data": "images.zip", "tokenizer": autoencoder(tmp_path, VAE, 4.0)})
    config = recipe.config
    assert from_json(to_json(config)) == config
    assert (config.name, set(config.frozen), config.stages[0].task.tokenizer.scaling) == (name, {"first"}, 0.25)
    (state,) = abstract_states(config.stages, recipe.frozen)
    learns = config.stages[0].task.parts[0].learns(state.params["tokenizer"])
    assert not any(path.startswith("first/") for path in learns)
    sizes = {"flextok-d12-d12": 257_486_662, "flextok-d18-d18": 865_397_446, "flextok-d18-d28": 2_456_402_374}
    trained = {part: tree for part, tree in state.params["tokenizer"].items() if part != "first"}
    assert count(trained) == sizes[name]


def test_another_first_stage(tmp_path: Path) -> None:
    with pytest.raises(GenError, match="latents of a KL autoencoder, not of Patches"):
        build(MINE[0], {"data": "images.zip", "tokenizer": autoencoder(tmp_path, TOKENIZER)})


@pytest.mark.slow
def test_the_toy_is_scored_by_number_of_tokens(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert main(["train", "flextok-smoke", "--outdir", run, "--steps", "60"]) == 0
    assert main(["reconstruct", run, "--curve"]) == 0
    scores = read_json(tmp_path / "run" / "reconstruction-by-tokens.json")
    assert list(scores) == ["1", "2", "4", "8", "16"]
    assert (tmp_path / "run" / "reconstruction-by-tokens.html").exists()
