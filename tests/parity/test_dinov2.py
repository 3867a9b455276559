"""`gen.features.dinov2` against the official transformer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.network import Network
from gen.pretrained.dinov2 import IMPORTER, unchunked
from tests.parity.conftest import fixtures

FIXTURES = fixtures("dinov2-forward*")


@functools.cache
def _loaded(fx):
    weights = unchunked(fx.weights)
    found = IMPORTER.infer(weights, heads=fx.config["num_heads"])
    config = dataclasses.replace(
        found, antialias=fx.config["interpolate_antialias"], offset=fx.config["interpolate_offset"]
    )
    assert (config.size, config.depth) == (fx.config["img_size"], fx.config["depth"])
    assert config.registers == fx.config["num_register_tokens"]
    _, params, _ = IMPORTER.load(weights, config)
    return config, params


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_forward(fx):
    config, params = _loaded(fx)
    module = Network(config).module(params)
    for size in sorted({name.partition("/")[0] for name in fx.io if name.startswith("size")}):
        images = fx.io[f"{size}/image"].transpose(0, 2, 3, 1)
        grid = (images.shape[1] // config.patch, images.shape[2] // config.patch)
        fx.close(module.table(grid), f"{size}/pos_embed_used")
        fx.close(module.embed(images), f"{size}/tokens_in")
        found = jax.jit(lambda x, m=module: m(x, keep=(0,)))(images)
        fx.close(found["cls"], f"{size}/x_norm_clstoken")
        fx.close(found["patches"], f"{size}/x_norm_patchtokens")
        fx.close(found["prenorm"], f"{size}/x_prenorm")
        if config.registers:
            fx.close(found["registers"], f"{size}/x_norm_regtokens")
        first = found["block_0"]
        fx.close(first[:, 0], f"{size}/block0_normed_cls")
        patches = first[:, 1 + config.registers :].reshape(len(images), *grid, -1)
        fx.close(patches.transpose(0, 3, 1, 2), f"{size}/block0_normed_patch_map")
        if f"{size}/mask" in fx.io:
            masked = module(images, mask=fx.io[f"{size}/mask"] != 0)
            fx.close(masked["patches"], f"{size}/masked_x_norm_patchtokens")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_names(fx):
    config, params = _loaded(fx)
    saved, weights = IMPORTER.save(config, params), unchunked(fx.weights)
    assert saved.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(saved[name], array)
    with pytest.raises(GenError, match="sides that"):
        Network(config).module(params).embed(np.zeros((1, config.patch, config.patch + 1, 3), np.float32))
