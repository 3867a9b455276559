import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gen.errors import GenError
from gen.features.dinov2 import DINOv2Extractor, dinov2
from gen.features.mae import mae
from gen.features.vit import ViTConfig
from gen.features.weights import load_weights, network_of, store_weights
from gen.nn.network import Network, count, param_shapes
from gen.pretrained import mae as mae_files
from gen.pretrained.dinov2 import HUB, IMPORTER
from gen.pretrained.encoders import encoder_importer
from gen.pretrained.features import convert_network

NETWORK = ViTConfig(size=28, width=64, depth=1, heads=1, hidden=32)


def test_a_converted_file_is_the_extractor(tmp_path) -> None:
    params = Network(NETWORK).init(jax.random.key(0))
    source, out = tmp_path / "official.safetensors", tmp_path / "ours.safetensors"
    save_file(IMPORTER.save(NETWORK, params), source)
    assert convert_network("dinov2", source, out).startswith("dinov2: width 64, depth 1, identity ")
    jax.tree.map(np.testing.assert_array_equal, load_weights(out, ""), jax.device_get(params))
    extractor = DINOv2Extractor(size=42, weights=str(out))
    assert extractor.network == NETWORK
    images = jax.random.uniform(jax.random.key(1), (2, 20, 30, 3)) * 255
    features = extractor(extractor.load(), images)["features"]
    assert features.shape == (2, 64)
    assert not np.allclose(features[0], features[1])
    other = tmp_path / "other.safetensors"
    store_weights(other, params, origin="test", network=dataclasses.replace(NETWORK, hidden=64))
    with pytest.raises(GenError, match="does not hold the dinov2 network"):
        DINOv2Extractor(weights=str(other)).load()
    store_weights(other, params, origin="test")
    with pytest.raises(GenError, match="does not say which ViTConfig"):
        DINOv2Extractor(weights=str(other)).load()


def test_names_of_a_training_run_in_chunks_without_layer_scale(tmp_path) -> None:
    network = dataclasses.replace(NETWORK, depth=3, scaled=False)
    params = Network(network).init(jax.random.key(0))
    source, out = tmp_path / "official.safetensors", tmp_path / "ours.safetensors"
    chunks = {"blocks.0.": "blocks.0.0.", "blocks.1.": "blocks.0.1.", "blocks.2.": "blocks.1.2."}
    weights = IMPORTER.save(network, params)
    save_file({chunks.get(name[:9], name[:9]) + name[9:]: array for name, array in weights.items()}, source)
    assert convert_network("dinov2", source, out).startswith("dinov2: width 64, depth 3, identity ")
    jax.tree.map(np.testing.assert_array_equal, load_weights(out, ""), jax.device_get(params))
    assert DINOv2Extractor(weights=str(out)).network == network


PUBLISHED = {  # counted from the official classes
    "S": 22_056_576,
    "B": 86_580_480,
    "L": 304_368_640,
    "g": 1_136_480_768,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    plain = dinov2(name)
    assert count(param_shapes(plain)) == PUBLISHED[name]
    assert count(param_shapes(dinov2(name, registers=4))) == PUBLISHED[name] + 4 * plain.width


def test_mae_is_dinov2_without_scales_and_mask_token() -> None:
    """ViT-L: 303.3 M in all, of which the table is for 14 x 14 patches of 16 pixels."""
    network = mae("L")
    extra = 24 * 2 * 1024 + 1024 + (37**2 - 14**2) * 1024 + (14**2 - 16**2) * 3 * 1024
    assert count(param_shapes(network)) == PUBLISHED["L"] - extra == 303_301_632
    with pytest.raises(GenError, match="unknown MAE size 'XL'"):
        mae("XL")


def test_other_namings_convert(tmp_path) -> None:
    """The transformers library's DINOv2 with registers, and an MAE whose file holds its decoder too."""
    hub = dataclasses.replace(NETWORK, registers=2, antialias=True, offset=0.0)
    small = mae("B", size=28, patch=14, width=64, depth=2, heads=1, hidden=32)
    decoder = {"decoder_embed.weight": np.zeros((3, 64), np.float32), "mask_token": np.zeros((1, 1, 3), np.float32)}
    cases = (("dinov2", hub, HUB, {}), ("mae", small, mae_files.IMPORTER, decoder))
    for name, network, importer, others in cases:
        params = Network(network).init(jax.random.key(1))
        source, out = tmp_path / f"{name}-official.safetensors", tmp_path / f"{name}.safetensors"
        weights = importer.save(network, params)
        assert encoder_importer(weights | others) is importer
        save_file(weights | others, source)
        convert_network(name, source, out)
        jax.tree.map(np.testing.assert_array_equal, load_weights(out, ""), jax.device_get(params))
        assert network_of(out, ViTConfig, "") == network
    official = IMPORTER.save(NETWORK, Network(NETWORK).init(jax.random.key(0)))
    assert encoder_importer(official) is IMPORTER
    with pytest.raises(GenError, match="this is a DINOv2, not an MAE"):
        mae_files.IMPORTER.infer(official)
