"""Evaluations with the Inception networks, end to end through the command line; the weights are random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen import arrays
from gen.cli import main
from gen.features.inception import Inception
from gen.metrics.protocol import Result
from tests.features.test_inception import official

pytestmark = pytest.mark.slow


def test_from_published_file_to_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arrays.write(tmp_path / "net.safetensors", official())
    assert main(["convert", "inception", str(tmp_path / "net.safetensors")]) == 0
    rng = np.random.default_rng(0)
    for name, channels in (("real", 3), ("fake", 1)):
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 256, (14, 20, 24, channels), dtype=np.uint8))
    network = ["--extractor", "inception:legacy_tensorflow", "--batch", "8"]
    reference = str(tmp_path / "ref.npz")
    assert main(["reference", str(tmp_path / "real.npz"), *network, "--out", reference]) == 0
    scores = tmp_path / "scores.json"
    command = ["evaluate", str(tmp_path / "fake.npz"), "--reference", reference, "--out", str(scores)]
    assert main([*command, *network, "--measures", "kid"]) == 0
    result = Result.load(scores)
    assert set(result.values) == {
        *("frechet_distance", "spatial_frechet_distance", "inception_score", "kid"),
        *("precision", "recall", "density", "coverage"),
    }
    assert {"inception_score", "kid", "precision"} <= set(result.within)
    assert result.values["inception_score"] >= 1
    assert result.protocol.resize == "legacy_tensorflow"
    assert main([*command, "--extractor", "inception:clean", "--batch", "8"]) == 2
    assert "resize 'legacy_tensorflow'" in capsys.readouterr().err
    again = tmp_path / "again.json"
    command = ["evaluate", str(tmp_path / "real.npz"), "--reference", reference, "--out", str(again)]
    assert main([*command, *network]) == 0
    assert Result.load(again).values["frechet_distance"] == pytest.approx(0, abs=1e-4)


def test_accuracy_by_the_network_of_torchvision(tmp_path, monkeypatch, capsys):
    """Labels are chosen by the network's own order of classes: the first, the fifth and the sixth."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arrays.write(tmp_path / "net.safetensors", official(classes=1000))
    assert main(["convert", "inception", str(tmp_path / "net.safetensors")]) == 0
    network = Inception("torchvision")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 40, 44, 3), dtype=np.uint8)
    order = np.argsort(-np.asarray(jax.jit(network)(network.load(), jnp.asarray(pictures))["logits"]), axis=1)
    labels = order[np.arange(8), [0, 0, 4, 4, 4, 5, 5, 5]]
    labels[-1] = 999  # so that the set has all of ImageNet's classes
    assert 999 not in order[-1, :5]
    np.savez(tmp_path / "fake.npz", pictures, labels)
    command = ["evaluate", str(tmp_path / "fake.npz"), "--reference", str(tmp_path / "fake.npz"), "--batch", "8"]
    scores = tmp_path / "scores.json"
    assert main([*command, "--extractor", "inception:torchvision", "--out", str(scores)]) == 0
    result = Result.load(scores)
    assert (result.values["accuracy"], result.values["top5_accuracy"]) == (0.25, 0.625)
    assert result.within["accuracy"] == pytest.approx(np.sqrt(0.25 * 0.75 / 8), rel=0.1)
    assert (result.protocol.extractor, result.protocol.resize) == ("inception-torchvision", "torchvision")
    assert result.protocol.extractor_fingerprint == network.fingerprint()
