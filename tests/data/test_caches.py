import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.data import caches
from gen.data.caches import Cache, seal, seal_bits, seal_tokens
from gen.data.labels import check_classes
from gen.errors import GenError

ROWS = 200


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    latent = (rng.normal(size=(ROWS, 4, 3)) * [0.5, 2.0, 30.0] + [100.0, 0.0, -3.0]).astype(np.float32)
    np.save(tmp_path / "latent.npy", latent)
    np.save(tmp_path / "label.npy", np.arange(ROWS, dtype=np.int32))
    return tmp_path


def test_latents_come_out_normalised_with_their_labels(folder, monkeypatch) -> None:
    monkeypatch.setattr(caches, "_ROWS", 64)  # several blocks
    cache = seal(folder, tokenizer="t", data="d")
    raw = np.load(folder / "latent.npy").astype(np.float64)
    normalizer = cache.normalizer()
    np.testing.assert_allclose(normalizer["shift"], raw.mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(normalizer["scale"], raw.std(axis=(0, 1)), rtol=1e-6)
    got = cache.source().gather(np.arange(ROWS))
    assert got["latent"].dtype == np.float32
    np.testing.assert_allclose(got["latent"].mean(axis=(0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(got["latent"].std(axis=(0, 1)), 1, atol=1e-4)
    np.testing.assert_allclose(got["latent"] * normalizer["scale"] + normalizer["shift"], raw, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(cache.source()[7]["latent"], got["latent"][7])
    for batch in itertools.islice(cache.batches(batch=16, seed=0, start=0), 3):
        np.testing.assert_array_equal(batch["latent"], got["latent"][batch["label"]])


def test_given_normaliser_and_other_arrays_pass_through(folder) -> None:
    noise = np.random.default_rng(1).normal(size=(ROWS, 4, 3)).astype(np.float32)
    np.save(folder / "noise.npy", noise)
    cache = seal(folder, tokenizer="t", data="d", shift=[0.0, 0.0, 0.0], scale=[1.0, 1.0, 1.0])
    got = cache.source().gather(np.array([5, 2]))
    np.testing.assert_array_equal(got["noise"], noise[[5, 2]])
    np.testing.assert_array_equal(got["latent"], np.load(folder / "latent.npy")[[5, 2]])


def test_identity_follows_the_content_and_not_the_place(folder, tmp_path_factory) -> None:
    cache = seal(folder, tokenizer="t", data="d")
    moved = tmp_path_factory.mktemp("moved") / "cache"
    shutil.copytree(folder, moved)
    assert Cache(str(moved)).identity() == cache.identity()
    identities = {cache.identity()}
    for options in ({"tokenizer": "u", "data": "d"}, {"tokenizer": "t", "data": "e"}):
        (folder / "cache.json").unlink()
        identities.add(seal(folder, **options).identity())
    (folder / "cache.json").unlink()
    np.save(folder / "label.npy", np.arange(ROWS, dtype=np.int32) + 1)
    identities.add(seal(folder, tokenizer="t", data="d").identity())
    assert len(identities) == 4


def test_sealing_again_changes_nothing_and_refuses_another_tokenizer(folder) -> None:
    cache = seal(folder, tokenizer="t", data="d")
    before = (folder / "cache.json").stat().st_mtime_ns
    assert seal(folder, tokenizer="t", data="d") == cache
    assert (folder / "cache.json").stat().st_mtime_ns == before
    with pytest.raises(GenError, match="is a cache of latents of another tokenizer or other data; choose another"):
        seal(folder, tokenizer="u", data="d")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_latents_are_refused_by_index(folder, monkeypatch, value) -> None:
    monkeypatch.setattr(caches, "_ROWS", 64)
    latent = np.load(folder / "latent.npy")
    latent[137, 2, 1] = value
    np.save(folder / "latent.npy", latent)
    with pytest.raises(GenError, match="latent 137 is NaN or infinite; expected finite latents"):
        seal(folder, tokenizer="t", data="d")
    assert not (folder / "cache.json").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 3e38])
def test_latents_damaged_after_they_were_sealed_are_refused_by_row(folder, value) -> None:
    cache = seal(folder, tokenizer="t", data="d", shift=[0.0] * 3, scale=[0.1] * 3)
    latent = np.load(folder / "latent.npy", mmap_mode="r+")
    latent[137, 2, 1] = value
    latent.flush()
    source = cache.source()
    message = r"the latent of row 137 of .* is NaN, infinite or out of range; it was not when it was"
    with pytest.raises(GenError, match=message):
        source[137]
    with pytest.raises(GenError, match=message):
        source.gather(np.array([3, 137, 5]))
    assert np.isfinite(source[136]["latent"]).all()


def test_what_is_no_cache_is_refused(folder, tmp_path) -> None:
    with pytest.raises(GenError, match=r"is no cache of latents; images have to be encoded .* gen encode TOKENIZER"):
        Cache(str(folder)).source()
    with pytest.raises(GenError, match=r"has no latent\.npy"):
        seal(tmp_path / "nothing", tokenizer="t", data="d")
    latent = np.load(folder / "latent.npy")
    latent[..., 1] = 4.0
    np.save(folder / "latent.npy", latent)
    with pytest.raises(GenError, match="channel 1 of the latents never varies"):
        seal(folder, tokenizer="t", data="d")


def test_rows_that_do_not_match_are_refused(folder) -> None:
    seal(folder, tokenizer="t", data="d")
    np.save(folder / "label.npy", np.arange(ROWS - 1, dtype=np.int32))
    expected = re.escape(f"holds <i4 ({ROWS - 1},); expected <i4 ({ROWS},) as cache.json says")
    with pytest.raises(GenError, match=expected):
        Cache(str(folder)).source()
    (folder / "label.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(GenError, match=r"label\.npy is no npy array"):
        Cache(str(folder)).source()
    (folder / "cache.json").write_text("{")
    with pytest.raises(GenError, match=r"cannot read .*cache\.json"):
        Cache(str(folder)).identity()
    (folder / "cache.json").unlink()
    np.save(folder / "label.npy", np.arange(3))
    with pytest.raises(GenError, match="must share their length"):
        seal(folder, tokenizer="t", data="d")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", "200"),
        ("arrays", {"../latent": ["<f4", [4, 3]], "latent": ["<f4", [4, 3]]}),
        ("arrays", {"latent": ["<f4"]}),
        ("arrays", {}),
        ("shift", [0.0, 0.0]),
        ("scale", [1.0, 1.0, "x"]),
        ("scale", [1.0, 1.0, float("nan")]),
        ("identity", None),
    ],
)
def test_an_altered_description_is_refused(folder, name, value) -> None:
    seal(folder, tokenizer="t", data="d")
    file = folder / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(GenError, match=r"cache\.json was altered, or is no cache's; make it again with gen encode"):
        Cache(str(folder)).source()


def test_labels_beyond_the_classes_of_the_model_are_refused(folder) -> None:
    source = seal(folder, tokenizer="t", data="d").source()
    check_classes("cache", source, ROWS, "--classes")
    with pytest.raises(GenError, match=r"row 10 .*has label 10; the model knows 10 classes, 0 to 9"):
        check_classes("cache", source, 10, "--classes")


def test_fewer_rows_than_the_batch_are_refused(folder) -> None:
    with pytest.raises(GenError, match="has 200 records, fewer than the batch of 201; lower the batch or add data"):
        seal(folder, tokenizer="t", data="d").batches(batch=ROWS + 1, seed=0, start=0)


def test_a_full_disk_leaves_no_cache(folder, monkeypatch) -> None:
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GenError, match=r"cannot write .*: No space left on device; free space"):
        seal(folder, tokenizer="t", data="d")
    assert not (folder / "cache.json").exists()


def test_config_and_file_are_plain_json(folder) -> None:
    cache = seal(folder, tokenizer="t", data="d")
    assert from_json(to_json(cache)) == cache
    found = json.loads((folder / "cache.json").read_text())
    assert found["count"] == ROWS
    assert found["arrays"] == {"label": ["<i4", []], "latent": ["<f4", [4, 3]]}


def rows(path, **arrays):
    for name, values in arrays.items():
        np.save(path / f"{name}.npy", values)
    return path


def test_tokens_and_bits_stay_as_they_are(tmp_path) -> None:
    rng = np.random.default_rng(0)
    tokens, bits = rng.integers(0, 64, (ROWS, 4, 4)), rng.integers(0, 2, (ROWS, 4, 4, 6)).astype(bool)
    (tmp_path / "t").mkdir()
    (tmp_path / "b").mkdir()
    of_tokens = seal_tokens(
        rows(tmp_path / "t", tokens=tokens.astype(np.uint16), label=np.arange(ROWS) % 2),
        vocabulary=64,
        tokenizer="t",
        data="d",
        class_names=["cat", "dog"],
    )
    of_bits = seal_bits(rows(tmp_path / "b", bits=bits), tokenizer="t", data="d")
    assert (of_tokens.kind, of_tokens.shape, of_tokens.vocabulary) == ("tokens", (4, 4), 64)
    assert (of_bits.kind, of_bits.shape, of_bits.width) == ("bits", (4, 4, 6), 6)
    assert of_tokens.source().class_names == ("cat", "dog")
    for cache, name, values, dtype in ((of_tokens, "tokens", tokens, np.int32), (of_bits, "bits", bits, np.uint8)):
        assert from_json(to_json(cache)) == cache
        got = cache.source().gather(np.arange(ROWS))[name]
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, values)
        np.testing.assert_array_equal(cache.source()[7][name], values[7])
        assert next(cache.batches(batch=4, seed=0, start=0))[name].shape == (4, *values.shape[1:])
        with pytest.raises(GenError, match=f"is a cache of {name}; expected one of latents"):
            Cache(str(cache.path)).source()
    identity = of_tokens.identity()
    (tmp_path / "t" / "cache.json").unlink()
    other = seal_tokens(tmp_path / "t", vocabulary=65, tokenizer="t", data="d")
    assert other.identity() != identity
    stored = np.load(tmp_path / "t" / "tokens.npy", mmap_mode="r+")
    stored[5, 0, 0] = 65
    stored.flush()
    with pytest.raises(GenError, match=r"the tokens of row 5 of .* is NaN, infinite or out of range"):
        other.source().gather(np.array([4, 5]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((3, 4), 8), r"row 0 of tokens\.npy has 8; expected 0 to 7"),
        (np.array([[0, 1], [2, -1]]), r"row 1 of tokens\.npy has -1; expected 0 to 7"),
        (np.zeros((3, 4), np.float32), r"tokens\.npy holds float32 \(3, 4\); expected integers"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path, values, message) -> None:
    with pytest.raises(GenError, match=message):
        seal_tokens(rows(tmp_path, tokens=values), vocabulary=8, tokenizer="t", data="d")
    with pytest.raises(GenError, match=r"row 0 of bits\.npy has 2; expected 0 to 1"):
        seal_bits(rows(tmp_path, bits=np.full((len(values), 4), 2)), tokenizer="t", data="d")
    assert not (tmp_path / "cache.json").exists()


def test_caches_from_before_there_were_kinds_are_of_latents(folder) -> None:
    seal(folder, tokenizer="t", data="d")
    head = json.loads((folder / "cache.json").read_text())
    del head["kind"], head["class_names"]
    (folder / "cache.json").write_text(json.dumps(head))
    assert Cache(str(folder)).identity() == head["identity"]
    assert len(Cache(str(folder)).source()) == ROWS


def test_images_in_place_of_a_cache_stay_where_they_are(tmp_path) -> None:
    """The advice is to encode them, not to delete them."""
    (tmp_path / "a.zip").write_bytes(b"")
    for place in (tmp_path, tmp_path / "a.zip"):
        with pytest.raises(GenError, match=f"gen encode TOKENIZER_RUN --data {place} --out CACHE") as error:
            Cache(str(place)).source()
        assert "delete" not in str(error.value)
