import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.features.lpips import lpips
from gen.features.weights import cache_path, store_weights
from gen.metrics import image
from gen.metrics.frechet import frechet_distance
from gen.metrics.sources import from_arrays
from gen.nn.conditions import Condition
from gen.tokenizers.base import Gaussian, Quantized, TokenizerSpec
from gen.tokenizers.reconstruct import evaluate_reconstruction, reconstructions
from tests.metrics.toy import Toy, features

SIZE = (16, 18, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (21, *SIZE), dtype=np.uint8)
LABELS = np.arange(21) % 3


@dataclasses.dataclass(frozen=True)
class Halving:
    """Not a good tokenizer: gives everything back at half its contrast."""

    size: tuple[int, int, int] = SIZE

    @property
    def spec(self):
        return TokenizerSpec("continuous", self.size, self.size)

    def encode(self, params, images, *, cond=None, keys=None):
        return Gaussian(images * params["scale"], jnp.zeros_like(images))

    def decode(self, params, latents, *, cond=None, keys=None, options=None):
        return latents


@dataclasses.dataclass(frozen=True)
class Exact(Halving):
    """Gives everything back as it was."""

    def decode(self, params, latents, *, cond=None, keys=None, options=None):
        return latents * 2


@dataclasses.dataclass(frozen=True)
class Drawing(Exact):
    """Gives everything back, and draws for each image, as FlexTok's decoder does."""

    def decode(self, params, latents, *, cond=None, keys=None, options=None):
        assert len(keys) == len(latents)
        return latents * 2


PARAMS = {"scale": np.float32(0.5)}
HALF = np.floor(127.5 * (0.5 * (IMAGES / 127.5 - 1)) + 128)


def _scored(images=IMAGES, extractor=None, tokenizer=Halving(), keep=False, **changes):
    source = from_arrays(images, LABELS[: len(images)], quantiser="round")
    made = reconstructions(tokenizer, PARAMS, source, identity="half", **changes)
    return evaluate_reconstruction(made, source, extractor, name="noise", tokenizer=tokenizer, keep=keep, batch=8)


def test_scores_of_pairs():
    found = _scored(keep=True)
    values, within = found.result.values, found.result.within
    np.testing.assert_allclose(found.images, HALF, atol=1)
    np.testing.assert_array_equal(found.labels, LABELS)
    a, b = jnp.asarray(found.images), jnp.asarray(IMAGES)
    each = np.asarray(image.psnr(a, b))
    assert values["psnr"] == pytest.approx(each.mean(), rel=1e-5)
    assert within["psnr"] == pytest.approx(each.std(ddof=1) / np.sqrt(21), rel=1e-3)
    assert values["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 / np.asarray(image.mse(a, b)).mean()), rel=1e-5)
    for name, window in (("original", image.ORIGINAL), ("skimage", image.SKIMAGE)):
        assert values[f"ssim_{name}"] == pytest.approx(float(image.ssim(a, b, window=window).mean()), rel=1e-4)
    assert "ms_ssim" not in values  # smaller than 176 pixels
    protocol = found.result.protocol
    assert (protocol.extractor, protocol.reference, protocol.count) == ("none", "noise", 21)
    with pytest.raises(GenError, match="unknown quantiser 'floor'"):
        _scored(quantiser="floor")


@pytest.mark.parametrize("tokenizer", [Exact(), Drawing()])
def test_an_exact_copy_counts_as_100_db(tokenizer):
    values = _scored(tokenizer=tokenizer).result.values
    assert values["psnr"] == 100
    assert values["ssim_torchmetrics"] == pytest.approx(1)


def test_with_a_feature_network_the_set_is_compared_too():
    small = np.random.default_rng(1).integers(0, 256, (21, 6, 5, 3), dtype=np.uint8)
    result = _scored(small, Toy(), Halving((6, 5, 3)), quantiser="truncate").result
    real, fake = features(small), features(np.floor(127.5 * (0.5 * (small / 127.5 - 1)) + 127.5))
    assert result.protocol.quantiser == "truncate"
    expected = frechet_distance(real.mean(0), np.cov(real.T), fake.mean(0), np.cov(fake.T))
    assert result.values["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert "psnr" in result.values
    assert not any(name.startswith("ssim") for name in result.values)  # no window fits
    assert result.protocol.beside.startswith("originals ")


def test_lpips_of_kept_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(GenError, match=r"no weights at .*lpips-vgg.*gen convert lpips"):
        _scored(lpips=("vgg",))
    with pytest.raises(GenError, match="no trunk 'vg'; did you mean 'vgg'"):
        _scored(lpips=("vg",))
    rng = np.random.default_rng(2)
    slices = {
        f"slice{i}": {
            "0": {
                "kernel": rng.normal(size=(3, 3, 3 if i == 1 else 4, 4)).astype(np.float32),
                "bias": np.zeros(4, np.float32),
            }
        }
        for i in range(1, 6)
    }
    params = {"net": slices} | {f"lin{i}": np.abs(rng.normal(size=4)).astype(np.float32) for i in range(5)}
    store_weights(cache_path("lpips-vgg"), params, origin="test")
    found = _scored(lpips=("vgg",), keep=True)
    a, b = (jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (found.images, IMAGES))
    with jax.default_matmul_precision("highest"):
        expected = float(lpips(params, a, b).mean())
    assert found.result.values["lpips_vgg"] == pytest.approx(expected, rel=1e-4)
    assert "lpips_vgg" in found.result.protocol.beside


@dataclasses.dataclass(frozen=True)
class Levels(Halving):
    """A token for the brightness of each image, 0 to 9, which is all that comes back; told by a text what to add."""

    @property
    def spec(self):
        text = {"text": Condition((2,))}
        return TokenizerSpec("tokens", (1,), self.size, vocabulary=10, width=1, conditions=text)

    def encode(self, params, images, *, cond=None, keys=None):
        ids = jnp.floor(5 * (images[:, 0, 0, :1] + 1)).astype(jnp.int32).clip(0, 9)
        return Quantized(ids, ids[..., None] / 5.0 - 0.9)

    def decode(self, params, codes, *, cond=None, keys=None, options=None):
        return jnp.broadcast_to(codes[:, :, None] + cond["text"].sum(-1)[:, None, None, None], (len(codes), *self.size))


def test_codebook_usage_conditions_and_pictures():
    brightness = np.repeat(np.array([10, 10, 60, 250]), 5)
    images = np.broadcast_to(brightness[:, None, None, None], (20, *SIZE)).astype(np.uint8)
    text = np.zeros((20, 2), np.float32)
    text[3] = 0.1
    found = _scored(images, tokenizer=Levels(), cond={"text": text}, lpips=())
    values = found.result.values
    assert values["codebook_usage"] == pytest.approx(0.3)
    assert values["codebook_entropy"] == pytest.approx(1.5)
    assert values["codebook_perplexity"] == pytest.approx(2**1.5)
    np.testing.assert_array_equal(found.before, images[:16])
    shades = found.after[:, 0, 0, 0].astype(int)
    assert len(set(shades[[0, 1, 2, 4]])) == 1
    assert shades[3] - shades[0] == pytest.approx(0.2 * 127.5, abs=1)
    with pytest.raises(GenError, match="conditioned on 'text'"):
        _scored(images, tokenizer=Levels())


def test_images_that_do_not_fit_are_refused():
    for given, message in (
        (IMAGES[:, 1:], r"images are uint8 \(15, 18, 3\); this tokenizer takes uint8 \(16, 18, 3\)"),
        (np.full((21, *SIZE), np.nan, np.float32), "images are float32"),
    ):
        with pytest.raises(GenError, match=message):
            _scored(given, quantiser="round")
