"""What is wrong with the data is said in one line, before anything is compiled and before a run folder exists."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gen.cli import main
from gen.cli.opening import prepare
from gen.data.caches import seal
from gen.errors import GenError
from gen.nn.conditions import class_count
from gen.training import engine
from tests.data.files import edm_zip, picture, png
from tests.test_edm_presets import image_zip


def of_images(folder: Path, images: list[bytes], labels: list[int] | None = None) -> str:
    """A zip of the given files, in ten classes unless said otherwise."""
    names = [f"{i}.png" for i in range(len(images))]
    path = edm_zip(folder / "a.zip", list(zip(names, labels or [i % 10 for i in range(len(images))], strict=True)), 0)
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in zip(names, images, strict=True):
            archive.writestr(name, data)
    return str(path)


def empty(folder: Path) -> str:
    (folder / "photos").mkdir()
    return str(folder / "photos")


def latents(folder: Path, shape: tuple[int, ...] = (32, 32, 4), label: int = 0, **arrays: np.ndarray) -> str:
    """A latent cache of 300 rows with labels from `label` on (none below 0)."""
    rows = {"latent": np.random.default_rng(0).normal(size=(300, *shape)).astype(np.float32), **arrays}
    if label >= 0:
        rows["label"] = np.arange(300, dtype=np.int32) + label
    (folder / "cache").mkdir()
    for name, values in rows.items():
        np.save(folder / "cache" / f"{name}.npy", values)
    return seal(folder / "cache", tokenizer="t", data="d").path


def vectors(folder: Path) -> str:
    """A zip of images with text vectors of three numbers."""
    path = of_images(folder, [GOOD] * 64)
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist() if name != "dataset.json"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            archive.writestr(name, data)
        archive.writestr("dataset.json", json.dumps({"labels": [[name, [0.5, i, 1.0]] for i, name in enumerate(kept)]}))
    return path


GOOD = png(picture(0, 32, 32))
CASES: dict[str, tuple[str, Callable[[Path], str], str]] = {
    "missing": ("edm-smoke", lambda f: str(f / "photos.zip"), "no data at "),
    "empty": ("edm-smoke", empty, "no images in "),
    "corrupt": ("edm-smoke", lambda f: of_images(f, [GOOD[:500]] * 64), "a.zip:0.png is not a readable image"),
    "wrong size": ("edm-smoke", lambda f: of_images(f, [png(picture(0))] * 64), "0.png is 16 x 12; expected 32 x 32"),
    "labels missing": ("edm-cifar10-cond", lambda f: str(edm_zip(f / "a.zip", None)), "has no class labels"),
    "labels of too many classes": (
        "edm-cifar10-cond",
        lambda f: of_images(f, [GOOD] * 64, list(range(64))),
        "10.png has label 10; the model knows 10 classes, 0 to 9",
    ),
    "labels that the latent model does not know": (
        "dit-xl2",
        lambda f: latents(f, label=900),
        "row 100 of {}/cache has label 1000; the model knows 1000 classes, 0 to 999",
    ),
    "labels that another latent model does not know": (
        "edm2-xs-512",
        lambda f: latents(f, (64, 64, 4), label=900),
        "row 100 of {}/cache has label 1000; the model knows 1000 classes, 0 to 999",
    ),
    "latents without labels": (
        "sit-xl2",
        lambda f: latents(f, label=-1),
        "has no class labels, and the model is conditioned on 1000 classes; put the images of each class in a folder "
        "of its own, or train a model without classes: gen train --unconditional",
    ),
    "images in place of latents": (
        "sit-xl2",
        lambda f: of_images(f, [GOOD] * 4),
        "a.zip is no cache of latents; images have to be encoded before a model of latents can train on them: gen",
    ),
    "latents of another size": (
        "dit-xl2",
        lambda f: latents(f, (16, 16, 4)),
        "'latent' of {}/cache has the shape (16, 16, 4); the model takes (32, 32, 4)",
    ),
    "latents of another tokenizer": (
        "edm2-xs-512",
        lambda f: latents(f, (64, 64, 16)),
        "'latent' of {}/cache has the shape (64, 64, 16); the model takes (64, 64, 4)",
    ),
    "encoder features of another image size": (
        "repa-xl2",
        lambda f: latents(f, encoder_0=np.zeros((300, 64, 768), np.float32)),
        "'encoder_0' of {}/cache has the shape (64, 768); the model takes (256, 768)",
    ),
    "text in place of classes": ("edm-cifar10-cond", vectors, "has no class labels"),
    "text of the wrong width": (
        "edm-smoke --stages.0.data.labels text --stages.0.data.width 768",
        vectors,
        "a.zip has text vectors of 3 numbers; the model takes 768",
    ),
    "no text": (
        "edm-smoke --stages.0.data.labels text --stages.0.data.width 768",
        lambda f: of_images(f, [GOOD] * 64),
        "has no text vectors",
    ),
    "fewer than the batch": ("edm-smoke", lambda f: image_zip(f / "a.zip", 32), "fewer than the batch of 64"),
}


ENCODED: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda f: str(f / "photos.zip"), "no data at "),
    "empty": (empty, "no images in "),
    "corrupt": (lambda f: of_images(f, [GOOD[:500]] * 8), "a.zip:0.png is not a readable image"),
    "wrong size": (
        lambda f: of_images(f, [png(picture(0))] * 8),
        "images uint8 (12, 16, 3) for a tokenizer that takes uint8 (32, 32, 3); convert them (gen data convert)",
    ),
    "mixed sizes": (
        lambda f: of_images(f, [GOOD] * 7 + [png(picture(0))]),
        "7.png is 16 x 12; expected 32 x 32",
    ),
    "labels for some": (
        lambda f: str(edm_zip(f / "a.zip", [["00000/img00000000.png", 1]])),
        "has no label for 5 of 6 images, the first 00000/img00000001.png",
    ),
}


@pytest.mark.parametrize("case", ENCODED)
def test_bad_data_are_not_encoded(
    tmp_path: Path, case: str, toy_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = ENCODED[case]
    out = tmp_path / "latents"
    assert main(["encode", str(toy_tokenizer / "run"), "--data", make(tmp_path), "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("error: ")
    assert not out.exists()


@pytest.mark.parametrize("case", CASES)
def test_bad_data_end_in_one_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (preset, *overrides), make, message = CASES[case][0].split(), *CASES[case][1:]
    monkeypatch.setattr(engine, "abstract_states", lambda *args: pytest.fail("training began"))
    options = ["--outdir", str(tmp_path / "run"), "--engine.mesh.fsdp", "1"]
    assert main(["train", preset, "--data", make(tmp_path), *overrides, *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message.format(tmp_path) in said
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "make"),
    [("edm-cifar10-cond", lambda f: str(edm_zip(f / "a.zip", None))), ("sit-xl2", lambda f: latents(f, label=-1))],
)
def test_unlabelled_data_train_without_classes(tmp_path: Path, preset: str, make: Callable[[Path], str]) -> None:
    config = prepare(preset, {"data": make(tmp_path)}, unconditional=True).config
    assert class_count(config.stages[0].task.conditions) is None
    assert getattr(config.sampler.guidance, "scale", 1.0) == 1.0


def test_a_preset_without_classes_of_its_own_is_named() -> None:
    with pytest.raises(GenError, match="preset 'demo-tokenizer' has no classes of its own to leave out"):
        prepare("demo-tokenizer", {}, unconditional=True)
