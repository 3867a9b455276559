import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from gen.cli import main
from gen.errors import GenError
from gen.features.inception import PUBLISHED
from gen.metrics.reference import Reference
from gen.pretrained.references import PUBLISHERS, read_published

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(40, 6))
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES.T)
DINO = SimpleNamespace(name="dinov2", fingerprint=lambda: "its weights", resize="pil-bicubic 224")


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("publisher", [name for name in PUBLISHERS if name not in ("edm2", "clean-fid")])
def test_plain_statistics(tmp_path, publisher):
    path = save(tmp_path / "some-32x32.npz", mu=MU, sigma=SIGMA)
    found = read_published(path, publisher, split="train")
    np.testing.assert_array_equal(found.mean, MU)
    np.testing.assert_array_equal(found.covariance, SIGMA)
    assert (found.name, found.features.shape, found.spatial) == ("some-32x32", (0, 6), None)
    protocol = found.protocol
    assert (protocol.extractor, protocol.extractor_fingerprint, protocol.split) == ("inception", PUBLISHED, "train")
    assert protocol.resize == ("legacy_pytorch" if publisher == "pytorch-fid" else "legacy_tensorflow")
    assert read_published(path, publisher).protocol.split == ("" if publisher == "pytorch-fid" else "train")
    with pytest.raises(GenError, match="say who published it"):
        read_published(path)
    with pytest.raises(GenError, match="holds statistics of Inception features"):
        read_published(path, publisher, network=DINO)


def test_adm(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    path = save(tmp_path / "VIRTUAL.npz", arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU[:2], sigma_s=SIGMA[:2, :2])
    found = read_published(path)
    assert (found.protocol.resize, found.protocol.split) == ("legacy_tensorflow", "train")
    np.testing.assert_array_equal(found.spatial[1], SIGMA[:2, :2])
    found.save(tmp_path / "ours.npz")
    np.testing.assert_array_equal(Reference.load(tmp_path / "ours.npz").spatial[0], MU[:2])


def test_clean_fid_with_features(tmp_path):
    path = save(tmp_path / "ffhq_legacy_pytorch_trainval_256.npz", mu=MU, sigma=SIGMA)
    assert read_published(path).features.shape == (0, 6)
    save(tmp_path / "ffhq_legacy_pytorch_trainval_256_kid.npz", feats=FEATURES)
    found = read_published(path)
    assert (found.protocol.resize, found.protocol.split) == ("legacy_pytorch", "trainval")
    np.testing.assert_allclose(found.features, FEATURES, rtol=1e-6)
    save(tmp_path / "ffhq_legacy_pytorch_trainval_256_kid.npz", feats=FEATURES[:, :3])
    with pytest.raises(GenError, match="features \\(40, 3\\)"):
        read_published(path)
    with pytest.raises(GenError, match="does not tell its mode"):
        read_published(save(tmp_path / "ffhq.npz", mu=MU, sigma=SIGMA), "clean-fid")


@pytest.mark.parametrize("protocol", [2, 4])
def test_edm2(tmp_path, protocol):
    content = {"num_images": 123, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU + 1, "sigma": SIGMA}}
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_published(tmp_path / "img64.pkl")
    assert found.protocol.count == 123
    np.testing.assert_array_equal(found.mean, MU)
    np.testing.assert_array_equal(found.covariance, SIGMA)
    assert found.protocol.split == "train"
    second = read_published(tmp_path / "img64.pkl", network=DINO)
    np.testing.assert_array_equal(second.mean, MU + 1)
    known = (second.protocol.extractor, second.protocol.extractor_fingerprint, second.protocol.resize)
    assert known == ("dinov2", "its weights", "pil-bicubic 224")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"other": 1}, protocol))
    with pytest.raises(GenError, match="no DINOv2 statistics"):
        read_published(tmp_path / "bad.pkl", network=DINO)
    with pytest.raises(GenError, match="no Inception statistics"):
        read_published(tmp_path / "bad.pkl")


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": Bad()}))
    with pytest.raises(GenError, match="nothing was run"):
        read_published(tmp_path / "bad.pkl")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for name, arrays, message in (
        ("empty.npz", {"x": MU}, "holds no statistics"),
        ("shape.npz", {"mu": MU, "sigma": SIGMA[:2]}, "expected finite"),
        ("nan.npz", {"mu": MU * np.nan, "sigma": SIGMA}, "expected finite"),
    ):
        with pytest.raises(GenError, match=message):
            read_published(save(tmp_path / name, **arrays), "edm")
    with pytest.raises(GenError, match="cannot be read as reference"):
        read_published(tmp_path / "broken.npz")
    with pytest.raises(GenError, match="no reference at"):
        read_published(tmp_path / "absent.npz")
    with pytest.raises(GenError, match="did you mean 'edm'"):
        read_published(save(tmp_path / "a.npz", mu=MU, sigma=SIGMA), "edn")


def test_command(tmp_path, capsys):
    source = save(tmp_path / "c.npz", mu=MU, sigma=SIGMA)
    arguments = ["reference", str(source), "--out", str(tmp_path / "out.npz")]
    assert main(arguments) == 2
    assert "say who published it" in capsys.readouterr().err
    assert main([*arguments, "--publisher", "edm", "--name", "cifar10"]) == 0
    assert Reference.load(tmp_path / "out.npz").name == "cifar10"
    test = ["reference", "digits:test", "--extractor", "digits-extractor", "--out", str(tmp_path / "digits.npz")]
    assert main(test) == 0
    loaded = Reference.load(tmp_path / "digits.npz")
    assert (loaded.name, loaded.protocol.split) == ("digits", "test")
    assert len(loaded.labels) == len(loaded.features) == loaded.protocol.count
    assert main([*test[:-1], str(tmp_path / "digits.txt")]) == 2
    assert main([*test[:3], "digits-extractor:clean", *test[4:]]) == 2
    assert "has no modes" in capsys.readouterr().err
