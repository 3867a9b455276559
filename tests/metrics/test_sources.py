import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gen.data import vanished
from gen.data.stores import open_store
from gen.errors import GenError
from gen.features.inception import RESIZES, Inception, fid_input
from gen.metrics.onepass import collect
from gen.metrics.sources import LABEL_RULES, QUANTISERS, balanced_labels, from_arrays, from_store, generated
from gen.metrics.statistics import Features
from tests.metrics.toy import PARAMS, Toy, draw, features, images


def test_quantisers():
    levels = np.arange(256)
    x = jnp.asarray(levels / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(QUANTISERS["round"](x), levels)
    between = jnp.asarray((levels[:-1] + 0.75) / 127.5 - 1, jnp.float32)
    np.testing.assert_array_equal(QUANTISERS["round"](between), levels[1:])
    np.testing.assert_array_equal(QUANTISERS["truncate"](between), levels[:-1])
    for quantise in QUANTISERS.values():
        np.testing.assert_array_equal(quantise(jnp.array([-9.0, 9.0])), [0, 255])


def test_balanced_labels():
    np.testing.assert_array_equal(np.bincount(balanced_labels(40, 10)), [4] * 10)


def test_random_labels_depend_on_the_seed_alone():
    labels = LABEL_RULES["random"](range(4000), 10)
    np.testing.assert_array_equal(LABEL_RULES["random"](range(1990, 2000), 10), labels[1990:2000])
    shares = np.bincount(labels, minlength=10) / 4000
    assert abs(shares - 0.1).max() < 5 * np.sqrt(0.1 * 0.9 / 4000)
    assert len(shares) == 10
    np.testing.assert_array_equal(LABEL_RULES["seed mod classes"](range(8, 12), 10), [8, 9, 0, 1])


def test_a_sample_depends_on_its_seed_alone():
    labels = balanced_labels(20, 4)
    early = generated(draw, PARAMS, seeds=range(20), identity="g", labels=labels)
    late = generated(draw, PARAMS, seeds=range(5, 15), identity="g", labels=labels[5:15])
    whole = early.function(early.arguments, jnp.arange(20))
    part = jax.jit(late.function)(late.arguments, jnp.array([3, 0]))
    np.testing.assert_array_equal(part["label"], whole["label"][jnp.array([8, 5])])
    np.testing.assert_allclose(part["image"], whole["image"][jnp.array([8, 5])], atol=1e-6)
    assert (early.seeds, late.seeds) == ("0-19", "5-14")
    assert early.function == late.function  # one compiled program serves both


def test_identity_follows_the_content():
    pixels = images(8)
    one = from_arrays(pixels, np.arange(8))
    assert one.identity == from_arrays(pixels.copy(), np.arange(8)).identity
    assert one.identity != from_arrays(pixels[::-1], np.arange(8)).identity
    assert one.identity != from_arrays(pixels, np.arange(8)[::-1]).identity


def _written(folder, pixels, kind="png"):
    folder.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.{kind}", lossless=True)
    return folder


def _features_of(source):
    return collect(source, Toy(), {"features": Features(20)}, batch=8).accumulators["features"]["rows"]


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_files_are_read_a_batch_at_a_time(tmp_path, kind):
    pixels = images(20)
    found = _features_of(from_store(open_store(_written(tmp_path / "d", pixels, kind)), Toy()))
    np.testing.assert_array_equal(found, _features_of(from_arrays(pixels)))
    np.testing.assert_allclose(found, features(pixels), rtol=1e-6)


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for i, image in enumerate(images(3)):
        Image.fromarray(image).save(folder / f"{i}.jpg", quality=90)
    rows = from_store(open_store(folder), Toy()).read(np.array([2, 0]))["image"]
    for row, name in zip(rows, ("2.jpg", "0.jpg"), strict=True):
        with Image.open(folder / name) as decoded:
            np.testing.assert_array_equal(row, np.asarray(decoded))


def test_an_npz_is_read_from_the_disk(tmp_path):
    pixels = images(20)
    np.savez(tmp_path / "a.npz", pixels, np.arange(20))
    store = open_store(tmp_path / "a.npz")
    assert isinstance(store.images.base, np.memmap)
    source = from_store(store, Toy())
    assert (source.count, source.labels, source.read([3, 1])["label"].tolist()) == (20, "given", [3, 1])
    np.testing.assert_array_equal(_features_of(source), _features_of(from_arrays(pixels)))


def test_images_of_any_size_are_resized_one_by_one(tmp_path):
    """As the network's own resize does it for a batch of one size."""
    rng = np.random.default_rng(0)
    sizes = [(31, 40), (299, 299), (333, 20), (31, 40)]
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    store = open_store(_written(tmp_path / "d", pixels))
    for mode in RESIZES:
        levels = from_store(store, Inception(mode)).read(np.array([0, 1, 2, 3, 3]))["levels"]
        assert (levels.shape, levels.dtype) == ((5, 299, 299, 3), np.float32)
        for image, level in zip([*pixels, pixels[3]], levels, strict=True):
            expected = fid_input(jnp.asarray(image[None], jnp.float32), mode)
            np.testing.assert_allclose(fid_input(level[None], mode), expected, atol=1e-3)
    with pytest.raises(GenError, match=r"002.png is .*, others are .*; expected one size"):
        from_store(store, Toy()).read(np.array([0, 2]))


def test_damaged_files_are_named(tmp_path):
    folder = _written(tmp_path / "d", images(8))
    (folder / "005.png").write_bytes((folder / "005.png").read_bytes()[:60])
    (folder / "006.png").write_bytes(b"no picture")
    source = from_store(open_store(folder), Toy())
    for index in (5, 6):
        with pytest.raises(GenError, match=f"00{index}.png is not a readable image"):
            source.read(np.array([index]))
    with pytest.raises(GenError, match=r"005.png is not a readable image"):
        collect(source, Toy(), {"features": Features(8)}, batch=4)


def test_a_file_whose_disk_does_not_answer_is_named(tmp_path, monkeypatch):
    folder, answers = tmp_path / "images", threading.Event()
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    store = open_store(folder)
    monkeypatch.setattr(type(store), "image", lambda *_: answers.wait())
    monkeypatch.setattr(vanished, "STALL", 0.2)
    with pytest.raises(vanished.Stalled, match=r"a\.png"):
        from_store(store, Toy()).read(np.array([0]))
    answers.set()


def test_refuses():
    pixels = images(8)
    for call, message in (
        (lambda: from_arrays(pixels[:0]), "N > 0"),
        (lambda: from_arrays(pixels[0]), "expected \\(N, H, W, C\\)"),
        (lambda: from_arrays(pixels.astype(np.int64)), "expected uint8"),
        (lambda: from_arrays(pixels / 255.0), "need a quantiser"),
        (lambda: from_arrays(pixels, np.arange(7)), "one integer per image"),
        (lambda: from_arrays(pixels, np.arange(8.0)), "one integer per image"),
        (lambda: generated(draw, PARAMS, seeds=range(0), identity="g"), "at least one seed"),
        (
            lambda: generated(draw, PARAMS, seeds=range(3), identity="g", labels=np.arange(4)),
            "3 seeds with 4 values of 'label'",
        ),
        (lambda: generated(draw, PARAMS, seeds=range(3), identity="g", quantiser="nearest"), "unknown quantiser"),
    ):
        with pytest.raises(GenError, match=message):
            call()
