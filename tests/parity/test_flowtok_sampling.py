"""FlowTok's sampling against official blocks: both ways to make its steps, and the guided calls at their own times."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.diffusion.backbones.dit import DiTConfig
from gen.nn.network import param_shapes
from gen.pretrained.flowtok import velocity_rules
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import load
from gen.sampling.guidance import ClassifierFree
from gen.tokenizers.flowtok import SIGMA_MIN, FlowTokConfig, TextProjectorConfig
from gen.tokenizers.flowtok_sampling import FlowTokSampler
from tests.parity.conftest import Fixture, fixtures


@pytest.mark.parametrize("fx", fixtures("flowtok-sampling*"), ids=str)
def test_sampling(fx: Fixture) -> None:
    given, io = fx.config, fx.io
    tokens, channels = given["num_latent_tokens"], given["channels"]
    network = DiTConfig(
        (tokens,),
        channels,
        1,
        given["hidden_size"],
        given["depth"],
        given["num_heads"],
        mlp_ratio=given["mlp_ratio"],
        num_classes=1,
    )
    text = TextProjectorConfig((tokens, given["clip_dim"]), channels, 1, 1, 8, 8)
    config = FlowTokConfig(text, network)
    rules = velocity_rules(network)
    names = {name for rule in rules for name in ([rule.official] if isinstance(rule.official, str) else rule.official)}
    stems = tuple(name.partition("{")[0] for name in names)
    params, _ = load(rules, {k: v for k, v in fx.weights.items() if k.startswith(stems)}, param_shapes(network))
    sampler = FlowTokSampler(given["steps"], ClassifierFree(given["guidance_scale"]))
    fx.close(1.0 - sampler.called(), "eval_times")
    for mode in ("dsigma", "dt"):
        fx.close(np.full(given["steps"], (1.0 - SIGMA_MIN) / given["steps"]), f"step_sizes_{mode}")

    @jax.jit
    def made(params: Any) -> jax.Array:
        return sampler(config, params, jnp.asarray(io["x_start"]))

    found = made(params)
    fx.close(found, "result_step_in_dsigma")
    fx.close(found, "result_step_in_dt")


@pytest.mark.parametrize("fx", fixtures("flowtok-training*"), ids=str)
def test_from_file_to_latents(fx: Fixture, tmp_path: Path) -> None:
    """File -> gen convert -> gen.load -> image latents of captions, and back into the file."""
    given, run = fx.config, str(tmp_path / "run")
    flags = ["--network.heads", str(given["num_heads"]), "--network.text_heads", str(given["textVAE"]["heads"])]
    assert cli.main(["convert", str(fx.path / "weights.safetensors"), "--out", run, *flags]) == 0
    loaded = gen.load(run)
    text = jnp.asarray(fx.io["text_embedding"])
    keys = jax.random.split(jax.random.key(0), len(text))
    sample = jax.jit(lambda keys, text: loaded.generator(loaded.params, keys, {"text": text}))
    made = np.asarray(sample(keys, text))
    assert made.shape == (len(text), *loaded.generator.shape)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(sample(keys[::-1], text[::-1]), made[::-1], rtol=1e-3, atol=1e-3)
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_allclose(back[name], array, atol=1e-6, err_msg=name)
