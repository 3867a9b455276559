"""What is wrong with the data is said in one line, before anything is compiled and before a run folder exists."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gen.cli import main
from gen.data.caches import seal
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


def latents(folder: Path) -> str:
    rows = np.random.default_rng(0).normal(size=(300, 32, 32, 4)).astype(np.float32)
    (folder / "cache").mkdir()
    np.save(folder / "cache" / "latent.npy", rows)
    np.save(folder / "cache" / "label.npy", np.arange(300, dtype=np.int32) + 900)
    return seal(folder / "cache", tokenizer="t", data="d").path


GOOD = png(picture(0, 32, 32))
CASES: dict[str, tuple[str, Callable[[Path], str], str]] = {
    "missing": ("edm-smoke", lambda f: str(f / "photos.zip"), "no data at "),
    "empty": ("edm-smoke", empty, "no images in "),
    "corrupt": ("edm-smoke", lambda f: of_images(f, [GOOD[:500]] * 64), "a.zip:0.png is not a readable image"),
    "wrong size": ("edm-smoke", lambda f: of_images(f, [png(picture(0))] * 64), "0.png is 16 x 12; expected 32 x 32"),
    "labels missing": ("edm-smoke", lambda f: str(edm_zip(f / "a.zip", None)), "has no class labels"),
    "labels of too many classes": (
        "edm-smoke",
        lambda f: of_images(f, [GOOD] * 64, list(range(64))),
        "10.png has label 10; the model knows 10 classes, 0 to 9",
    ),
    "labels that the latent model does not know": (
        "dit-xl2",
        latents,
        "has label 1199; the model knows 1000 classes, 0 to 999",
    ),
    "fewer than the batch": ("edm-smoke", lambda f: image_zip(f / "a.zip", 32), "fewer than the batch of 64"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_end_in_one_line(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, make, message = CASES[case]
    monkeypatch.setattr(engine, "abstract_states", lambda *args: pytest.fail("training began"))
    options = ["--outdir", str(tmp_path / "run"), "--engine.mesh.fsdp", "1"]
    assert main(["train", preset, "--data", make(tmp_path), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert said.startswith("error: ")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()
