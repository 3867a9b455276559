"""``gen evaluate`` with the feature networks and measures beside Inception's, from files as users have them."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.cli import main
from gen.data.sources import digits
from gen.features.bpe import Vocabulary
from gen.features.clip import CLIPConfig, CLIPExtractor, CLIPTowerConfig
from gen.features.dinov2 import DINOv2Extractor
from gen.features.vit import ViTConfig
from gen.features.weights import cache_path, store_weights
from gen.metrics.frechet import frechet_of_features
from gen.metrics.kernels import cmmd
from gen.metrics.protocol import Result
from gen.nn.network import Network

TOWER = CLIPTowerConfig(64, 1, 1, 32)
CLIP = CLIPConfig(TOWER, TOWER, size=24, patch=8, vocabulary=516, length=8, projection=6)
DINOV2 = ViTConfig(size=28, width=64, depth=1, heads=1, hidden=32)
PICTURES = {name: np.random.default_rng(i).integers(0, 256, (20, 12, 10, 3), np.uint8) for i, name in enumerate("ab")}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, config in (("dinov2", DINOV2), ("clip-vit-l-14-336", CLIP), ("clip-vit-b-32", CLIP)):
        store_weights(cache_path(name), Network(config).init(jax.random.key(0)), origin="test", network=config)
    for name, images in PICTURES.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    return tmp_path


def _evaluate(folder, *args):
    command = ["evaluate", folder / "a.npz", "--reference", folder / "b.npz", "--out", folder / "s.json", *args]
    assert main([str(a) for a in command]) == 0
    return Result.load(folder / "s.json")


def _features(extractor):
    call = jax.jit(lambda x: extractor(extractor.load(), x)["features"])
    return [np.asarray(call(jnp.asarray(PICTURES[name], jnp.float32)), np.float64) for name in "ab"]


def test_fd_dinov2_from_images(files) -> None:
    result = _evaluate(files, "--extractor", "dinov2")
    expected = frechet_of_features(*_features(DINOv2Extractor()))
    assert result.values["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert (result.protocol.extractor, result.protocol.resize) == ("dinov2", "pil-bicubic 224")


def test_cmmd_and_clip_score_from_images_and_captions(files, capsys) -> None:
    result = _evaluate(files, "--extractor", "clip:cmmd", "--measures", "cmmd", "vendi")
    fake, real = _features(CLIPExtractor())
    assert result.values["cmmd"] == pytest.approx(cmmd(real, fake), rel=1e-3)

    captions, published = files / "captions.txt", files / "bpe.txt.gz"
    captions.write_text("\n".join(f"a cat no {i}" for i in range(20)) + "\n")
    args = ("--extractor", "clip:vit-b-32", "--captions", captions)
    command = ["evaluate", files / "a.npz", "--reference", files / "b.npz", *args]
    assert main([str(a) for a in command]) == 2
    assert "gen convert clip-vocabulary FILE" in capsys.readouterr().err
    published.write_bytes(gzip.compress(b'"version"\nc a\nca t</w>\n'))
    assert main(["convert", "clip-vocabulary", str(published)]) == 0
    result = _evaluate(files, *args)
    extractor = CLIPExtractor("vit-b-32")
    texts = extractor.texts(Vocabulary.read(published).tokens([f"a cat no {i}" for i in range(20)], 8))
    images = _features(extractor)[0]
    cosines = (images / np.linalg.norm(images, axis=1, keepdims=True) * texts).sum(1)
    assert result.values["clip_score"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-3, abs=1e-3)
    assert "captions" in result.protocol.beside
    np.save(files / "ids.npy", np.tile([514, 64, 515, 0], (20, 1)))
    assert "clip_score" in _evaluate(files, *args[:3], files / "ids.npy").values
    np.save(files / "ids.npy", np.tile([514, 64, 999, 0], (20, 1)))
    assert main([str(a) for a in [*command[:-1], files / "ids.npy"]]) == 2
    assert "tokens from 0 to 999; this CLIP has 516" in capsys.readouterr().err


def test_copies_of_training_images(tmp_path, capsys) -> None:
    train = digits("train").arrays["image"]
    np.savez(tmp_path / "a.npz", arr_0=np.concatenate([train[:10], 255 - train[:30]]))
    command = ["evaluate", tmp_path / "a.npz", "--out", tmp_path / "s.json"]
    beside = ["--training", "digits:train", "--heldout", "digits:test"]
    assert main([str(a) for a in [*command, *beside]]) == 0
    result = Result.load(tmp_path / "s.json")
    assert result.values["copies_in_pixels"] == pytest.approx(0.25)
    assert result.within["copies_in_pixels"] == pytest.approx(np.sqrt(0.25 * 0.75 / 40))
    assert "Closest training images" in (tmp_path / "s.html").read_text()
    assert main([str(a) for a in [*command, "--captions", tmp_path / "no.txt"]]) == 2
    assert "reads no captions; give --extractor clip:vit-b-32" in capsys.readouterr().err
    assert main([str(a) for a in [*command, "--measures", "cas"]]) == 2
    assert "give --heldout DATA with classes" in capsys.readouterr().err
