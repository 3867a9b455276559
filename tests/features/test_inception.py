import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import arrays
from gen.config import from_json, to_json
from gen.errors import GenError
from gen.features.extractor import accepts
from gen.features.inception import PUBLISHED, Inception, conv_shapes, inception
from gen.features.resize import METHODS, axis_weights, middle_square, resize, resize_uint8
from gen.features.weights import store_weights
from gen.pretrained import inception as importer
from gen.pretrained.features import convert_network


def official(layout="torch", classes=1008, seed=0):
    """A state dict of the network with cheap random numbers, under one of the published sets of names."""
    rng = np.random.default_rng(seed)
    weights = {}
    for layer, (channels, out, height, width) in conv_shapes().items():
        kernel = rng.standard_normal((out, channels, height, width), np.float32) / np.sqrt(channels * height * width)
        beta, mean, variance = (rng.random(out, np.float32) + shift for shift in (-0.5, -0.5, 0.5))
        if layout == "torch":
            path = layer.replace("/", ".")
            names = [f"{path}.{n}" for n in ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
            weights |= {f"{path}.bn.weight": np.ones(out, np.float32)}
        else:
            path, kernel = importer.graph_name(layer), kernel.transpose(2, 3, 1, 0)
            parts = ("conv2d_params", "batchnorm/beta", "batchnorm/moving_mean", "batchnorm/moving_variance")
            names = [f"{path}/{n}" for n in parts]
            weights |= {f"{path}/batchnorm/gamma": np.ones(out, np.float32)}
        weights |= dict(zip(names, (kernel, beta, mean, variance), strict=True))
    head, bias = rng.standard_normal((classes, 2048), np.float32), rng.random(classes, np.float32)
    if layout == "torch":
        return weights | {"fc.weight": head, "fc.bias": bias}
    return weights | {"softmax/weights": head.T, "softmax/biases": bias}


@pytest.fixture(scope="module")
def state():
    return official()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gen" / "weights"


def fingerprint(params):
    return arrays.digest(arrays.flatten(params))


def test_every_set_of_names_gives_the_same_network(state):
    params = importer.fold(state)
    assert fingerprint(params) == fingerprint(importer.fold(official("graph")))
    assert fingerprint(params) != fingerprint(importer.fold(official(seed=1)))
    wrapped = {f"base.{name}": array for name, array in state.items()}
    assert fingerprint(importer.fold(wrapped)) == fingerprint(params)


def test_convert_and_load(state, cache):
    source = cache.parent.parent / "net.safetensors"
    arrays.write(source, state | {"fc.bias": state["fc.bias"]})
    line = convert_network("inception", source)
    network = Inception()
    assert (cache / "inception.safetensors").is_file()
    assert network.fingerprint() in line
    assert "not one of the published files" in line
    params = network.load()
    assert network.fingerprint() == fingerprint(params) != PUBLISHED
    data = bytearray((cache / "inception.safetensors").read_bytes())
    data[-1] ^= 1
    (cache / "inception.safetensors").write_bytes(data)
    with pytest.raises(GenError, match="not those that were converted"):
        network.load()


def test_published_files_are_recognised(state, cache, monkeypatch):
    import hashlib

    source = cache.parent.parent / "net.safetensors"
    arrays.write(source, state)
    monkeypatch.setitem(importer.SHA256, hashlib.sha256(source.read_bytes()).hexdigest(), source.name)
    assert "verified" in convert_network("inception", source)
    assert Inception().fingerprint() == PUBLISHED


def test_torchvision_variant(cache):
    weights = official(classes=1000) | {"AuxLogits.fc.bias": np.zeros(1000, np.float32)}
    source = cache.parent.parent / "tv.safetensors"
    arrays.write(source, weights)
    convert_network("inception", source)
    network = Inception("torchvision")
    assert network.path.name == "inception-torchvision.safetensors"
    assert network.load()["fc"]["bias"].shape == (1000,)
    with pytest.raises(GenError, match="gen convert inception"):
        Inception().load()
    with pytest.raises(GenError, match="does not hold the inception network"):
        Inception(weights=str(network.path)).load()


@pytest.mark.parametrize(("height", "width"), [(60, 71), (400, 360)])
def test_the_middle_square_is_the_same_on_host_and_device(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    on_device = middle_square(jnp.asarray(image[None]), 342, 299, "pil-bilinear")
    on_host = Inception("torchvision").fit(image)
    assert on_host.shape == (342, 342, 3)
    np.testing.assert_array_equal(middle_square(jnp.asarray(on_host[None]), 342, 299, "pil-bilinear"), on_device)
    from PIL import Image

    short = min(height, width)
    size = (342 * width // short, 342 * height // short)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - 299) / 2) for side in resized.shape[:2])
    np.testing.assert_array_equal(on_device[0], resized[top : top + 299, left : left + 299])


def test_other_files_are_refused(state, tmp_path):
    with pytest.raises(GenError, match="no Inception network"):
        importer.fold({"patch.weight": np.zeros(3)})
    lacking = {name: array for name, array in state.items() if name != "Mixed_6c.branch1x1.bn.bias"}
    with pytest.raises(GenError, match=r"Mixed_6c.branch1x1.bn.bias is missing"):
        importer.fold(lacking)
    with pytest.raises(GenError, match=r"extra.weight is not known"):
        importer.fold(state | {"extra.weight": np.zeros((2, 2))})
    with pytest.raises(GenError, match=r"Conv2d_1a_3x3.conv.weight is \(1, 1\)"):
        importer.fold(state | {"Conv2d_1a_3x3.conv.weight": np.zeros((1, 1))})
    with pytest.raises(GenError, match="unknown feature network 'incepton'"):
        convert_network("incepton", tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(GenError, match="cannot be read as an npz"):
        convert_network("inception", tmp_path / "bad.npz")
    store_weights(tmp_path / "other.safetensors", {"a": np.zeros(2, np.float32)}, origin="x")
    with pytest.raises(GenError, match="does not hold the inception network"):
        Inception(weights=str(tmp_path / "other.safetensors")).load()
    (tmp_path / "text.safetensors").write_bytes(b"no weights here")
    with pytest.raises(GenError, match="not a whole safetensors file"):
        Inception(weights=str(tmp_path / "text.safetensors")).fingerprint()


def test_config():
    network = Inception("legacy_tensorflow", fast=True)
    assert from_json(to_json(network)) == network
    assert (network.resize, network.precision, Inception().precision) == (
        "legacy_tensorflow",
        "fast",
        "float32-highest",
    )
    taken = {shape: accepts(network, shape) for shape in ((64, 32, 3), (8, 8, 1), (8, 8, 2), (8, 8))}
    assert list(taken.values()) == [True, True, False, False]
    for arguments in ({"mode": "dirty"},):
        with pytest.raises(GenError, match="expected one of"):
            Inception(**arguments)


def test_small_maps_are_refused():
    with pytest.raises(GenError, match="at least 75"):
        jax.eval_shape(lambda x: inception({}, x), jnp.zeros((1, 74, 80, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_resize_keeps_constants_and_equal_sizes(method):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3)), jnp.uint8)
    for size in ((5, 20), (30, 6)):
        np.testing.assert_allclose(resize(jnp.full((1, 9, 14, 1), 77.0), size, method), 77, rtol=1e-6)
    np.testing.assert_array_equal(resize(images, (9, 14), method), images)
    np.testing.assert_array_equal(resize_uint8(images, (9, 14), method), images)


def test_resize_is_that_of_pillow():
    from PIL import Image

    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "box": Image.Resampling.BOX}
    image = np.random.default_rng(1).integers(0, 256, (37, 23), dtype=np.uint8)
    for size in ((12, 50), (60, 9), (11, 8), (80, 90)):
        for name, filter_ in (filters | {"lanczos": Image.Resampling.LANCZOS}).items():
            wide = Image.fromarray(image.astype(np.float32)).resize(size[::-1], filter_)
            actual = resize(image[None, :, :, None].astype(np.float32), size, f"pil-{name}")[0, :, :, 0]
            np.testing.assert_allclose(actual, np.asarray(wide), atol=1e-3)
            exact = np.asarray(Image.fromarray(image).resize(size[::-1], filter_)).astype(int)
            found = resize_uint8(image[None, :, :, None], size, f"pil-{name}")[0, :, :, 0]
            np.testing.assert_array_equal(found, exact)


def test_resize_refuses():
    with pytest.raises(GenError, match="unknown resize method"):
        axis_weights(3, 4, "pil-cubist")
    with pytest.raises(GenError, match="at least 1"):
        axis_weights(3, 0, "pil-box")
