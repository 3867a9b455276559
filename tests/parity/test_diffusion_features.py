"""Pooling and heads on diffusion features against the official ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from gen.finetune.probes import AttentionHead, LinearHead, flattened, pooled
from gen.nn.network import Network, param_shapes
from gen.pretrained.probes import attention_head_rules, linear_head_rules
from gen.pretrained.rules import load, save
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import nchw, nhwc


@pytest.mark.parametrize("fx", fixtures("diffusion-features-pool*"), ids=str)
def test_pooling(fx: Fixture) -> None:
    feature = jnp.asarray(nhwc(fx.io["feature"]))
    for side in fx.config["sizes"]:
        found = pooled(feature, side)
        fx.close(nchw(found), f"pool_{side}")
        fx.close(flattened(found), f"flat_{side}")


@pytest.mark.parametrize("fx", fixtures("diffusion-features-head*"), ids=str)
def test_heads(fx: Fixture) -> None:
    given = fx.config
    shapes = {b: (given["block_sizes"][b], given["block_sizes"][b], dim) for b, dim in given["block_dims"].items()}
    features = {
        f"{i}/{b}": jnp.asarray(nhwc(fx.io[f"feat_t{t}_b{b}"])) for i, t in enumerate(given["t_list"]) for b in shapes
    }
    head = AttentionHead(
        tuple(shapes.items()),
        len(given["t_list"]),
        given["num_classes"],
        side=given["pre_pool_size"],
        width=given["attention_dim"],
        heads=given["heads"],
        depth=given["depth"],
    )
    prefix = "linear_head."
    weights = {name: array for name, array in fx.weights.items() if not name.startswith(prefix)}
    rules = attention_head_rules(head)
    params, report = load(rules, weights, param_shapes(head))
    assert report.clean
    for name, array in save(rules, params).items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    fx.close(Network(head)(params, features), "logits")

    first = next(iter(features.values()))
    plain = LinearHead(first.shape[1:], given["num_classes"], side=given["linear_pre_pool_size"])
    weights = {name.removeprefix(prefix): array for name, array in fx.weights.items() if name.startswith(prefix)}
    params, report = load(linear_head_rules(plain), weights, param_shapes(plain))
    assert report.clean
    fx.close(Network(plain)(params, {"one": first}), "linear_head_logits")
