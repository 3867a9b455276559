import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from gen.config import from_json, to_json
from gen.data.sources import ArraySource, Digits, digits
from gen.data.stores import load_arrays
from gen.errors import GenError


def test_digits_are_those_of_the_original() -> None:
    original, source = load_digits(), digits("all")
    image, label = source.arrays["image"], source.arrays["label"]
    assert image.shape == (1797, 8, 8, 1)
    assert image.dtype == np.uint8
    assert image.max() == 255
    assert label.dtype == np.int32
    np.testing.assert_array_equal(label, original.target)
    np.testing.assert_array_equal(np.rint(image[..., 0] * (16 / 255)), original.images)


def test_split_is_disjoint_complete_and_stratified() -> None:
    train, test, both = (digits(split) for split in ("train", "test", "all"))
    assert (len(train), len(test)) == (1438, 359)
    rows = np.concatenate([train.arrays["image"], test.arrays["image"]]).reshape(1797, -1)
    whole = both.arrays["image"].reshape(1797, -1)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)])
    counts = np.bincount(both.arrays["label"])
    np.testing.assert_allclose(np.bincount(test.arrays["label"]), counts / 5, atol=0.5)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(GenError, match="unknown split 'valid' of the digits; expected train, test or all"):
        digits("valid")  # type: ignore[arg-type]


def test_array_source_gathers_and_checks_lengths() -> None:
    source = ArraySource(a=np.arange(10), b=np.arange(20).reshape(10, 2))
    batch = source.gather(np.array([3, 0, 3]))
    np.testing.assert_array_equal(batch["b"], [[6, 7], [0, 1], [6, 7]])
    assert source[4]["a"] == 4
    batch["a"][:] = -1
    assert source.arrays["a"].min() == 0
    with pytest.raises(GenError, match="share their length, got a: 3, b: 4"):
        ArraySource(a=np.zeros(3), b=np.zeros(4))
    with pytest.raises(GenError, match="got none"):
        ArraySource()


def test_digits_config() -> None:
    config = Digits("test")
    assert from_json(to_json(config)) == config
    assert config.identity() != Digits("train").identity()
    batch = next(config.batches(batch=8, seed=0, start=0))
    assert batch["image"].shape == (8, 8, 8, 1)
    assert batch["label"].dtype == np.int32


def test_mapped_files_that_shrink_or_vanish_are_named(tmp_path: Path) -> None:
    """Reading the missing part of a mapped file would kill the process."""
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((64, 4096), np.float32))
    source = ArraySource(x=load_arrays(path)["image"], y=np.zeros(64))
    assert source.files == {str(path): path.stat().st_size}
    assert source.gather(np.array([63]))["x"].shape == (1, 4096)
    os.truncate(path, 4096)
    for read in (lambda: source[63], lambda: source.gather(np.array([63]))):
        with pytest.raises(GenError, match=r"a\.npy has 4096 bytes, 1048704 when it was opened; restore it"):
            read()
    path.unlink()
    with pytest.raises(GenError, match=r"cannot read .*a\.npy \(No such file"):
        source.gather(np.array([0]))
