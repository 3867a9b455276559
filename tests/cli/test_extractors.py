"""Which feature network an evaluation takes when none is named."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gen.cli import main
from gen.cli.extractors import find_extractor, open_extractor, stored_shape
from gen.errors import GenError
from gen.features.clip import CLIPExtractor
from gen.features.digits import DigitsExtractor
from gen.features.efficientnet_lite import EfficientNetLite
from gen.features.inception import Inception
from gen.features.weights import cache_path, store_weights
from gen.metrics.frechet import frechet_of_features
from gen.metrics.protocol import Protocol, Result
from gen.metrics.reference import Reference
from gen.pretrained import efficientnet_lite
from tests.cli.test_runs import fails

COLOUR = (32, 32, 3)
PICTURES = {name: np.random.default_rng(i).integers(0, 256, (6, 12, 10, 3), np.uint8) for i, name in enumerate("ab")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_first_that_fits_and_has_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_extractor(None, None, lambda: (8, 8, 1)) == DigitsExtractor()
    assert find_extractor(None, "digits:train", lambda: COLOUR) == EfficientNetLite()
    assert "efficientnet-lite0: verified as the published network" in capsys.readouterr().out
    store_weights(cache_path("inception"), {"x": np.zeros(1)}, origin="test")
    assert find_extractor(None, None, lambda: COLOUR) == Inception()
    assert capsys.readouterr().out == ""  # converted once
    assert find_extractor("clip:vit-b-32", None, lambda: COLOUR) == CLIPExtractor("vit-b-32")


def test_what_would_fit_is_named_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet_lite, "installed", lambda: None)
    with pytest.raises(GenError) as error:
        find_extractor(None, None, lambda: COLOUR)
    for text in ("images of 32 x 32 x 3", "inception: no weights at", "lite: no weights at", "gen-image[lite]"):
        assert text in str(error.value)
    assert "gen convert inception FILE" in str(error.value)
    assert "digits" not in str(error.value)


@pytest.mark.parametrize(
    "network", [Inception("legacy_tensorflow"), CLIPExtractor("vit-b-32"), DigitsExtractor()], ids=lambda n: n.name
)
def test_stored_statistics_name_their_network(network, tmp_path: Path) -> None:
    protocol = Protocol(network.name, "?", 4, resize=network.resize)
    held = Reference("x", np.zeros(2), np.eye(2), np.zeros((0, 2), np.float32), protocol, "id")
    held.save(tmp_path / "r.npz")
    assert find_extractor(None, str(tmp_path / "r.npz"), lambda: COLOUR) == network
    dataclasses.replace(held, protocol=dataclasses.replace(protocol, resize="another")).save(tmp_path / "r.npz")
    with pytest.raises(GenError, match="which gen list extractor does not have"):
        find_extractor(None, str(tmp_path / "r.npz"), lambda: COLOUR)


def test_names_and_modes() -> None:
    assert open_extractor("inception:legacy_pytorch") == Inception("legacy_pytorch")
    for name, message in (("incepton", "did you mean"), ("lite:fast", "has no modes"), ("clip:b", "unknown CLIP")):
        with pytest.raises(GenError, match=message):
            open_extractor(name)


def test_shapes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", PICTURES["a"])
    np.savez(tmp_path / "grey.npz", PICTURES["a"][..., :1])
    assert stored_shape(str(tmp_path / "a.npz")) == (12, 10, 3)
    assert stored_shape(str(tmp_path / "grey.npz")) == (12, 10, 1)
    assert stored_shape("digits:test") == (8, 8, 1)


def test_colour_images_are_scored_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def outputs(self, params, images):  # the network itself is compared elsewhere, and takes long to compile
        assert params["head"]["kernel"].shape == (1, 1, 320, 1280)
        rows = images.reshape(len(images), -1)
        return {"features": rows[:, :4] / 255, "logits": jnp.zeros((len(images), 1000))}

    monkeypatch.setattr(EfficientNetLite, "features_and_logits", outputs)
    for name, images in PICTURES.items():
        np.savez(tmp_path / f"{name}.npz", images)
    a, b, out = (str(tmp_path / name) for name in ("a.npz", "b.npz", "s.json"))
    assert "give --reference" in fails(capsys, "evaluate", a)
    assert main(["evaluate", a, "--reference", b, "--out", out]) == 0
    result = Result.load(out)
    assert (result.protocol.extractor, result.protocol.resize) == ("efficientnet-lite0", "pil-bicubic 224")
    assert result.values["frechet_distance"] == pytest.approx(
        frechet_of_features(*(images.reshape(6, -1)[:, :4] / 255.0 for images in PICTURES.values())), rel=1e-4
    )
    page = (tmp_path / "s.html").read_text()
    assert "Fréchet distance (efficientnet-lite0 features)" in page
    assert "FID" not in page
