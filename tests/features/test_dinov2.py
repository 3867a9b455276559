import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gen.errors import GenError
from gen.features.dinov2 import DINOv2Config, DINOv2Extractor
from gen.features.weights import load_weights, store_weights
from gen.nn.network import Network
from gen.pretrained.dinov2 import IMPORTER
from gen.pretrained.features import convert_network

NETWORK = DINOv2Config(size=28, width=64, depth=1, heads=1, hidden=32)


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
    with pytest.raises(GenError, match="does not say which DINOv2Config"):
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
