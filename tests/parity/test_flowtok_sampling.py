"""FlowTok's sampling against official blocks: both ways to make its steps, and the guided calls at their own times."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.dit import DiTConfig
from gen.nn.network import param_shapes
from gen.pretrained.flowtok import velocity_rules
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
