"""``gen evaluate --backend cleanfid``, and image measures against scikit-image."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage import data, metrics

from gen.cli.evaluate import evaluate
from gen.errors import GenError
from gen.features.digits import DigitsExtractor
from gen.features.inception import RESIZES, Inception
from gen.metrics import cleanfid
from gen.metrics.image import ORIGINAL, SKIMAGE, psnr, ssim


def test_second_opinion(installed, folders, tmp_path, capsys):
    fake, real = map(str, folders)
    out = tmp_path / "scores.json"
    network = "inception:legacy_pytorch"
    evaluate(fake, reference=real, extractor=network, measures=("kid",), backend="cleanfid", batch=8, out=out)
    found = json.loads(out.read_text())
    values = found["values"]
    assert values["cleanfid_frechet_distance"] == pytest.approx(values["frechet_distance"], rel=1e-4)
    assert values["cleanfid_kid"] == pytest.approx(values["kid"], rel=1e-4)
    assert found["versions"]["clean-fid"]
    assert "cleanfid_frechet_distance" in capsys.readouterr().out


@pytest.mark.parametrize("mode", RESIZES)
def test_pictures_of_many_sizes(mode, installed, tmp_path):
    """Each is resized by itself, here and there."""
    from gen.cli.images import open_images

    network, cat = Inception(mode), data.chelsea()
    for i, (height, width) in enumerate(((60, 80), (90, 50), (60, 80))):
        Image.fromarray(cat[i * 40 : i * 40 + height, :width]).save(tmp_path / f"{i}.png")
    params = network.load()
    source = open_images(str(tmp_path), cleanfid.Unresized())
    theirs = cleanfid.features(cleanfid.pictures(source, 3), network, params)
    images = open_images(str(tmp_path), network).read(np.arange(3))["levels"]
    ours = np.asarray(network(params, jnp.asarray(images))["features"])
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_refuses():
    for network in (DigitsExtractor(), Inception("torchvision"), Inception(fast=True)):
        with pytest.raises(GenError, match="clean-fid has no network"):
            cleanfid.require(network)


def test_image_measures():
    a = data.chelsea()[100:200, 100:230]
    b = np.clip(a + np.random.default_rng(0).normal(0, 15, a.shape), 0, 255).astype(np.uint8)
    pair = jnp.asarray(a, jnp.float32)[None], jnp.asarray(b, jnp.float32)[None]
    assert float(psnr(*pair)[0]) == pytest.approx(metrics.peak_signal_noise_ratio(a, b), rel=1e-5)
    common = {"channel_axis": 2, "data_range": 255}
    assert float(ssim(*pair, window=SKIMAGE)[0]) == pytest.approx(
        metrics.structural_similarity(a, b, **common), abs=1e-5
    )
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    theirs = metrics.structural_similarity(a, b, **common, **wang)
    assert float(ssim(*pair, window=ORIGINAL)[0]) == pytest.approx(theirs, abs=1e-5)
