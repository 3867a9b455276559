"""Caches of encoded images: mirror images, makers, and jobs that are killed or shared."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.caches import Cache, TokenCache, seal, seal_tokens
from gen.data.sources import ArraySource
from gen.errors import GenError
from gen.tokenizers.encode import encode_images, expect_maker
from tests.processes import devices, ended, free_port
from tests.tokenizers import encode_jobs as jobs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    jobs.encode(str(out), names=("tokens",))
    return out


@pytest.fixture(scope="module")
def held(made: Path) -> dict[str, np.ndarray]:
    return rows(made / "tokens")


def rows(folder: Path) -> dict[str, np.ndarray]:
    return {file.stem: np.load(file) for file in folder.glob("*.npy")}


def test_both_versions_are_stored(held: dict[str, np.ndarray]) -> None:
    images = jobs.images().gather(np.arange(jobs.COUNT))["image"]
    encode, own = jax.jit(jobs.TOKENS.encode), jobs.params(jobs.TOKENS)
    for name, pixels in (("tokens", images), ("tokens_flip", images[:, :, ::-1])):
        np.testing.assert_array_equal(held[name], encode(own, jnp.asarray(pixels) / 127.5 - 1).ids)
    assert len(np.unique(held["tokens"])) > 4
    assert (held["tokens"] != held["tokens_flip"]).any(axis=1).mean() > 0.5


def test_training_takes_half_of_the_rows_mirrored(tmp_path: Path) -> None:
    """Others in every epoch, the same in one stream whatever the processes; a row keeps its label."""
    ids = np.arange(100, dtype=np.int32)
    for name, values in {"tokens": ids[:, None], "tokens_flip": ids[:, None] + 100, "label": ids}.items():
        np.save(tmp_path / f"{name}.npy", values)
    cache = seal_tokens(tmp_path, vocabulary=200, tokenizer="t", data="d")
    np.testing.assert_array_equal(cache.source().gather(ids)["tokens"], ids[:, None])
    assert set(cache.source()[0]) == {"tokens", "label"}
    stream = cache.batches(batch=50, seed=1, start=0)
    batches = [next(stream) for _ in range(8)]
    for batch in batches:
        np.testing.assert_array_equal(batch["tokens"][:, 0] % 100, batch["label"])
    epochs = [np.sort(np.concatenate([b["tokens"][:, 0] for b in batches[i : i + 2]])) for i in range(0, 8, 2)]
    mirrored = [set(epoch[epoch >= 100]) for epoch in epochs]
    assert all(35 <= len(found) <= 65 for found in mirrored)
    assert len(set(map(frozenset, mirrored))) == 4
    parts = [cache.batches(batch=50, seed=1, start=3, process=i, processes=2) for i in range(2)]
    joined = np.concatenate([next(part)["tokens"] for part in parts])
    np.testing.assert_array_equal(joined, batches[3]["tokens"])


def test_a_mirror_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
    np.save(tmp_path / "latent.npy", latents)
    np.save(tmp_path / "latent_flip.npy", latents[:, :2])
    with pytest.raises(GenError, match=r"latent_flip\.npy is not of the type and shape of latent\.npy"):
        seal(tmp_path, tokenizer="t", data="d")
    latents[3] = np.nan
    np.save(tmp_path / "latent_flip.npy", latents)
    with pytest.raises(GenError, match="latent 3 is NaN or infinite"):
        seal(tmp_path, tokenizer="t", data="d")


def test_damaged_caches_are_refused_by_file_and_row(tmp_path: Path) -> None:
    for name in ("tokens", "tokens_flip"):
        np.save(tmp_path / f"{name}.npy", np.arange(40, dtype=np.int32).reshape(20, 2) % 7)
    cache = seal_tokens(tmp_path, vocabulary=7, tokenizer="t", data="d")
    source, file = cache.source(), tmp_path / "tokens_flip.npy"
    whole = file.read_bytes()
    stored = np.load(file, mmap_mode="r+")
    stored[5, 1] = 7
    stored.flush()
    assert len(source.gather(np.arange(20))["tokens"]) == 20
    with pytest.raises(GenError, match=rf"the tokens of row 5 of {tmp_path} is NaN, infinite or out of range"):
        source.mirrored(np.arange(20), np.ones(20, bool))
    file.write_bytes(whole[:-50])
    with pytest.raises(GenError, match=r"tokens_flip\.npy claims int32 \(20, 2\) but holds 110 bytes"):
        cache.source()


def test_another_tokenizer_is_refused(made: Path) -> None:
    cache, own = TokenCache(str(made / "tokens")), jobs.params(jobs.TOKENS)
    expect_maker(cache, jobs.TOKENS, own)
    other = jax.tree.map(lambda leaf: leaf + 1, own)
    with pytest.raises(GenError, match=r"tokens was encoded by another tokenizer or with other weights .*; give the"):
        expect_maker(cache, jobs.TOKENS, other)
    with pytest.raises(GenError, match="was not made by this job"):
        encode_images(jobs.TOKENS, other, jobs.images(), made / "tokens", label="")
    with pytest.raises(GenError, match="was not made by this job"):  # nor without mirror images
        encode_images(jobs.TOKENS, own, jobs.images(), made / "tokens", label="")


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image = np.zeros((4, 8, 8, 3), np.uint8)
    own = jobs.params(jobs.LATENTS)
    for given, message in (
        (image, r"images uint8 \(8, 8, 3\) for a tokenizer that takes uint8 \(8, 8, 1\)"),
        (image[:, :, 2:, :1], r"images uint8 \(8, 6, 1\) for"),
        (np.full((4, 8, 8, 1), np.nan, np.float32), r"images float32 \(8, 8, 1\) for"),
    ):
        with pytest.raises(GenError, match=message):
            encode_images(jobs.LATENTS, own, ArraySource(image=given), tmp_path / "cache", label="")
    own["latent_tokens"] = own["latent_tokens"] * np.nan
    with pytest.raises(GenError, match="record 0 of arrays in memory has a NaN or infinite 'latent'"):
        encode_images(jobs.LATENTS, own, jobs.images(), tmp_path / "cache", label="")


def launch(name: str, *args: object, count: int = 1) -> subprocess.Popen[str]:
    env = os.environ | devices(count)
    command = [sys.executable, "-m", "tests.tokenizers.encode_jobs", name, *map(str, args)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen[str], code: int = 0) -> None:
    found = ended(*processes)
    assert [status for status, _ in found] == [code] * len(processes), found


def check(folder: Path, whole: Path) -> None:
    """Caches and reconstructions: ids, labels and usage equal, a pixel off by one level where it was halfway."""
    for name in ("latents", "tokens"):
        with np.load(folder / f"{name}.npz") as found, np.load(whole / f"{name}.npz") as expected:
            assert found.files == expected.files
            assert (len(found["images"]), len(np.unique(found["images"])) > 4) == (jobs.COUNT, True)
            off = np.abs(found["images"].astype(int) - expected["images"])
            assert (off.max() <= 1, (off > 0).mean() < 1e-3) == (True, True)
            np.testing.assert_array_equal(found["labels"], expected["labels"])
            for score in set(found.files) - {"images", "labels"}:
                np.testing.assert_allclose(found[score], expected[score], rtol=1e-4, err_msg=score)
    for name in ("latents", "tokens"):
        found, arrays = rows(folder / name), rows(whole / name)
        assert found.keys() == arrays.keys()
        for key, values in arrays.items():
            if values.dtype.kind == "f":
                np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(found[key], values)


@pytest.mark.slow
def test_killed_encoding_goes_on_and_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    finish(launch("encode", tmp_path / "whole"))
    finish(launch("killed", tmp_path / "cut", 60), code=-9)
    assert not (tmp_path / "cut" / "latents").exists()
    assert (tmp_path / "cut" / "latents.partial").is_dir()
    finish(launch("encode", tmp_path / "cut"))
    for name in ("latents", "tokens"):
        whole, cut = (rows(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        for key, values in whole.items():
            np.testing.assert_array_equal(values, cut[key])
    assert Cache(str(tmp_path / "cut" / "latents")).identity() == Cache(str(tmp_path / "whole" / "latents")).identity()


@pytest.mark.slow
def test_eight_devices_and_two_processes_encode_and_reconstruct_the_same(tmp_path: Path) -> None:
    finish(launch("encode_and_reconstruct", tmp_path / "one"))
    finish(launch("devices", tmp_path / "eight", count=8))
    check(tmp_path / "eight", tmp_path / "one")
    port = free_port()
    finish(*(launch("two_processes", tmp_path / "two", port, i, count=2) for i in range(2)))
    check(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_codebook_statistics_are_those_of_the_global_batch(tmp_path: Path) -> None:
    """Equal on one device and on eight."""
    for count in (1, 8):
        finish(launch("codebooks", tmp_path / f"{count}.npz", count=count))
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "8.npz") as eight:
        assert one.files == eight.files
        for name in one.files:
            np.testing.assert_allclose(one[name], eight[name], rtol=1e-5, atol=1e-6, err_msg=name)
