import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from gen.errors import GenError
from gen.features.clip import CLIPConfig, CLIPExtractor, CLIPTowerConfig, model_name
from gen.features.weights import load_weights, store_weights
from gen.nn.network import Network
from gen.pretrained.clip import IMPORTER, OPENAI
from gen.pretrained.features import convert_network

TOWER = CLIPTowerConfig(64, 1, 1, 32)
NETWORK = CLIPConfig(TOWER, TOWER, size=24, patch=8, vocabulary=20, length=6, projection=5)
MEAN, DEVIATION = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def params():
    return jax.device_get(Network(NETWORK).init(jax.random.key(0)))


@pytest.fixture(scope="module")
def stored(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    store_weights(path, params, origin="test", network=NETWORK)
    return str(path)


@pytest.mark.parametrize("importer", [IMPORTER, OPENAI], ids=lambda i: i.name)
def test_both_published_layouts_convert(importer, params, tmp_path):
    source, out = tmp_path / "official.safetensors", tmp_path / "ours.safetensors"
    save_file(importer.save(NETWORK, params), source)
    assert convert_network("clip", source, out).startswith("clip-vit-w64-8-24: identity ")
    jax.tree.map(np.testing.assert_array_equal, load_weights(out, ""), params)
    assert CLIPExtractor(weights=str(out)).network == NETWORK


def test_cmmd_stretches_and_gives_unit_embeddings(stored, params):
    extractor = CLIPExtractor("cmmd", stored)
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.float32)
    found = extractor(extractor.load(), images)["features"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    pixels = ((images / 255 - MEAN) / DEVIATION).astype(np.float32)  # of the network's size: not resized
    direct = Network(NETWORK).apply(params, pixels, method="encode_image")["embedding"]
    np.testing.assert_allclose(found, direct / jnp.linalg.norm(direct, axis=1, keepdims=True), atol=1e-5)
    on_device = extractor.prepared(jnp.asarray(images[:, :10]))[0]
    on_host = extractor.prepared(jnp.asarray(extractor.fit(images[0, :10].astype(np.uint8))[None]))[0]
    np.testing.assert_allclose(on_device, on_host, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (13, 10)])
def test_clips_own_preprocessing_is_pillows(stored, height, width):
    extractor = CLIPExtractor("vit-b-32", stored)
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = min(height, width)
    size = (int(24 * width / short), int(24 * height / short))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float32)
    top, left = round((size[1] - 24) / 2), round((size[0] - 24) / 2)
    expected = (resized[top : top + 24, left : left + 24] / 255 - MEAN) / DEVIATION
    found = extractor.prepared(jnp.asarray(image[None], jnp.float32))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    fitted = extractor.prepared(jnp.asarray(extractor.fit(image)[None]))
    np.testing.assert_allclose(fitted[0], expected, atol=1e-5)


def test_texts(stored, params):
    extractor = CLIPExtractor("vit-b-32", stored)
    tokens = np.random.default_rng(2).integers(0, 19, (5, 6))
    tokens[:, 4] = 19  # the end
    found = extractor.texts(tokens, batch=2)
    direct = Network(NETWORK).apply(params, tokens, method="encode_text")["embedding"]
    np.testing.assert_allclose(found, direct / jnp.linalg.norm(direct, axis=1, keepdims=True), atol=1e-5)
    for wrong, message in ((tokens + 1, "tokens from"), (tokens[0], "expected"), (np.tile(tokens, 2), "reads 6")):
        with pytest.raises(GenError, match=message):
            extractor.texts(wrong)


def test_names_and_refusals(monkeypatch, tmp_path):
    assert model_name(CLIPConfig()) == "vit-l-14"
    assert model_name(CLIPConfig(size=336)) == "vit-l-14-336"
    assert model_name(CLIPConfig(CLIPTowerConfig(768, 12, 12, 3072), patch=32)) == "vit-b-32"
    with pytest.raises(GenError, match="unknown CLIP 'vit-b-33'; did you mean"):
        CLIPExtractor("vit-b-33")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(GenError, match=r"no weights at .*clip-vit-l-14-336.*; get the vit-l-14-336 model"):
        CLIPExtractor().load()
