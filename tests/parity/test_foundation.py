"""Frozen encoders as VA-VAE calls them, through timm, against timm's transformer."""

import jax
import numpy as np
import pytest

from gen.features.alignment import patch_features, seen
from gen.nn.network import Network
from gen.pretrained import dinov2, mae
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_sdvae import check_round_trip

IMPORTERS = {"dinov2": dinov2.IMPORTER, "mae": mae.IMPORTER}


@pytest.mark.parametrize("fx", fixtures("vavae-foundation*"), ids=str)
def test_features(fx: Fixture) -> None:
    importer, given = IMPORTERS[fx.config["type"]], fx.config
    config = importer.infer(fx.weights, heads=given["num_heads"])
    found = (config.size, config.patch, config.width, config.depth, config.hidden, config.scaled)
    width = given["embed_dim"]
    scaled = given.get("init_values") is not None
    assert found == (
        given["img_size"],
        given["patch_size"],
        width,
        given["depth"],
        given["mlp_ratio"] * width,
        scaled,
    )
    assert given["norm_eps"] == config.eps
    _, params, _ = importer.load(fx.weights, config)
    check_round_trip(importer, fx.weights, config, params)
    images = fx.io["image_uint8"].transpose(0, 2, 3, 1).astype(np.float32) / 127.5 - 1.0
    tokens = fx.io["aux_feature"].shape[-1]
    published = {"resampling": "torch-bilinear", "standardised": False}
    shown = seen(images, tokens * config.patch, **published)
    if "resized" in fx.io:
        fx.close(shown.transpose(0, 3, 1, 2)[:, :, ::16], "resized")
    else:
        np.testing.assert_array_equal(shown, images)
    module = Network(config).module(params)
    embedded = module.embed(shown)
    fx.close(embedded[:, :8], "tokens_in_first8")
    fx.close(embedded[:, -8:], "tokens_in_last8")
    fx.close(jax.jit(module)(shown)["cls"], "forward_features_cls")
    features = patch_features(config, params, images, tokens, **published)
    grid = features.reshape(len(images), tokens, tokens, width)
    fx.close(grid.transpose(0, 3, 1, 2), "aux_feature")
