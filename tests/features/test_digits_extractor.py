from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.data.sources import digits
from gen.errors import GenError
from gen.features import digits as module
from gen.features.digits import DigitsExtractor, init_digits


@pytest.fixture(scope="module")
def found():
    extractor = DigitsExtractor()
    call, params = jax.jit(extractor), extractor.load()
    return {
        split: jax.device_get(call(params, jnp.asarray(digits(split).arrays["image"], jnp.float32)))
        for split in ("train", "test")
    }


def test_reads_held_out_digits(found) -> None:
    read = found["test"]["logits"].argmax(-1) == digits("test").arrays["label"]
    assert read.mean() >= 0.98


def test_features_are_standard_on_the_training_split(found) -> None:
    features = found["train"]["features"].astype(np.float64)
    assert features.shape == (1438, 64)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(axis=0), 1, atol=1e-5)


def test_one_image_at_a_time_agrees(found) -> None:
    extractor = DigitsExtractor()
    one = extractor(extractor.load(), jnp.asarray(digits("test").arrays["image"][5:6], jnp.float32))
    np.testing.assert_allclose(one["features"][0], found["test"]["features"][5], atol=1e-4)
    np.testing.assert_allclose(one["logits"][0], found["test"]["logits"][5], atol=1e-4)


def test_features_tell_digits_from_pixel_statistics(found) -> None:
    """Images with each class's pixel means and covariances must look far from digits: else the distance is blind."""
    train, rng = digits("train").arrays, np.random.default_rng(0)
    rows, labels = train["image"].reshape(len(train["image"]), -1).astype(np.float64), train["label"]
    drawn = [
        rng.multivariate_normal(rows[labels == k].mean(0), np.cov(rows[labels == k].T), size=144) for k in range(10)
    ]
    images = np.clip(np.rint(np.concatenate(drawn)), 0, 255).reshape(-1, 8, 8, 1)
    extractor = DigitsExtractor()
    features = extractor(extractor.load(), jnp.asarray(images, jnp.float32))["features"]
    gaussian = np.square(features.mean(0)).sum()
    held_out = np.square(found["test"]["features"].mean(0)).sum()
    assert gaussian > 4 * held_out


def test_altered_or_missing_weights_are_refused(tmp_path, monkeypatch) -> None:
    extractor = DigitsExtractor()
    data = bytearray(resources.files("gen.features").joinpath("digits.safetensors").read_bytes())
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    with pytest.raises(GenError, match="cannot read the digits extractor's weights: No such file"):
        extractor.load()
    data[-1] ^= 1
    (tmp_path / "digits.safetensors").write_bytes(data)
    with pytest.raises(GenError, match=r"are not those of this version; expected sha256 [0-9a-f]{16}"):
        extractor.load()


def test_config_shapes_and_names() -> None:
    extractor = DigitsExtractor()
    assert from_json(to_json(extractor)) == extractor
    assert len(extractor.fingerprint()) == 64
    with pytest.raises(GenError, match=r"takes images of shape \(B, 8, 8, 1\), got \(2, 16, 16, 3\)"):
        extractor(extractor.load(), jnp.zeros((2, 16, 16, 3)))
    fresh, shipped = init_digits(jax.random.key(0)), extractor.load()
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in shipped.items()}
