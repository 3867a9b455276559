"""What real data sets hold besides plain images: each is read, left out and said, or refused by name (docs/data.md)."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen.data.convert import Copy, convert
from gen.data.stores import Store, open_store
from gen.errors import GenError
from tests.data.files import folder, picture, png, tar

GOOD = png(picture(0))


def written(path: Path, *names: str) -> Path:
    """A folder with an image, or some text, at each name."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(GOOD if Path(name).suffix.lower() in (".png", ".jfif", ".jpe") else b"text")
    return path


def linked(path: Path, name: str, target: str) -> Path:
    (path / name).symlink_to(target)
    return path


def zipped(path: Path, *names: str, **texts: str) -> Path:
    path.mkdir(parents=True)
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, GOOD)
        for name, text in texts.items():
            archive.writestr(name.replace("__", "."), text)
    return path / "a.zip"


def shard(path: Path, *names: str, **labels: int) -> Path:
    path.mkdir(parents=True)
    members = dict.fromkeys(names, GOOD) | {f"{key}.cls": str(n).encode() for key, n in labels.items()}
    return tar(path / "a.tar", members)


TWO = ("cat/1.png", "dog/1.png")
# what lies there -> the images, their labels, and words that are said about it ("" for silence)
READ: dict[str, tuple[Callable[[Path], Path], list[str], list[int] | None, str]] = {
    "other endings": (lambda p: written(p, "cat/1.JFIF", "dog/1.jpe"), ["cat/1.JFIF", "dog/1.jpe"], [0, 1], ""),
    "hidden files and folders": (lambda p: written(p, *TWO, "cat/._1.png", ".git/1.png"), [*TWO], [0, 1], ""),
    "what systems leave": (
        lambda p: written(
            p, *TWO, "cat/Thumbs.db", "desktop.ini", "cat/.DS_Store", "__MACOSX/cat/1.png", "@eaDir/1.png"
        ),
        [*TWO],
        [0, 1],
        "",
    ),
    "other files": (
        lambda p: written(p, *TWO, "cat/notes.txt", "dog/old.tar"),
        [*TWO],
        [0, 1],
        "cat/notes.txt, dog/old",
    ),
    "the tool's own sheet": (
        lambda p: written(p, "000000.png", "000001.png", "grid.png", "samples.json"),
        ["000000.png", "000001.png"],
        None,
        "none of its images: grid.png",
    ),
    "a picture called grid": (lambda p: written(p, "000000.png", "grid.png"), ["000000.png", "grid.png"], None, ""),
    "numbered class folders": (
        lambda p: written(p, *(f"{i}/a.png" for i in range(11))),
        ["0/a.png", "1/a.png", "10/a.png", "2/a.png", *(f"{i}/a.png" for i in range(3, 10))],
        [0, 1, 10, *range(2, 10)],
        "",
    ),
    "class folders counted from 1": (
        lambda p: written(p, "1/a.png", "2/a.png"),
        ["1/a.png", "2/a.png"],
        [0, 1],
        "1 to 2",
    ),
    "one folder around the classes": (
        lambda p: written(p, "pets/cat/1.png", "pets/dog/1.png"),
        ["pets/cat/1.png", "pets/dog/1.png"],
        [0, 1],
        "all images lie in pets/",
    ),
    "a folder without images": (
        lambda p: written(p, *TWO, "bird/a.txt"),
        [*TWO],
        [0, 1],
        "no images in bird: 1 folders",
    ),
    "folders by thousands": (
        lambda p: written(p, "00000/img00000007.png", "00001/img00001000.png"),
        ["00000/img00000007.png", "00001/img00001000.png"],
        None,
        "",
    ),
    "images beside class folders": (lambda p: written(p, *TWO, "a.png"), ["a.png", *TWO], None, "the first a.png"),
    "a linked class folder": (
        lambda p: linked(written(p, "in/cat/1.png", "other/1.png") / "in", "dog", "../other"),
        [*TWO],
        [0, 1],
        "",
    ),
    "a linked image": (
        lambda p: (
            linked(written(p, "in/cat/1.png", "in/dog/0.png", "x.png") / "in" / "dog", "1.png", "../../x.png").parent
        ),
        ["cat/1.png", "dog/0.png", "dog/1.png"],
        [0, 1, 1],
        "",
    ),
    "a zip by a Mac": (lambda p: zipped(p, *TWO, "__MACOSX/cat/._1.png"), [*TWO], [0, 1], ""),
    "a zip by Windows": (lambda p: zipped(p, "cat\\1.png", "dog\\1.png"), [*TWO], [0, 1], ""),
    "a zip of a folder": (
        lambda p: zipped(p, "pets/cat/1.png", "pets/dog/1.png"),
        ["pets/cat/1.png", "pets/dog/1.png"],
        [0, 1],
        "all images lie in pets/",
    ),
    "keys with dots": (
        lambda p: shard(p, "n01.1.png", "n01.2.png", **{"n01.1": 4, "n01.2": 5}),
        ["n01.1.png", "n01.2.png"],
        [4, 5],
        "",
    ),
    "a further field of a sample": (lambda p: shard(p, "s.png", "s.mask.png", s=3), ["s.png"], [3], "s.mask.png"),
    "a field with a name": (lambda p: shard(p, "s.image.png", s=3), ["s.image.png"], [3], ""),
    "class folders in a tar": (
        lambda p: shard(p, "./cat/1.png", "./dog/1.png"),
        ["./cat/1.png", "./dog/1.png"],
        [0, 1],
        "",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_it_is_read_or_left_out_and_said(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, names, labels, words = READ[case]
    store = open_store(make(tmp_path / "data"))
    assert list(store.names) == names
    assert (None if store.label is None else store.label.tolist()) == labels
    said = capsys.readouterr().err
    assert (words in said and said.startswith("note: ")) if words else not said
    for index in range(len(store)):
        np.testing.assert_array_equal(store.pixels(index), picture(0))


def described(path: Path, labels: list[list[object]], **more: object) -> Path:
    written(path, *TWO)
    (path / "dataset.json").write_text(json.dumps({"labels": labels, **more}))
    return path


def named(path: Path, *names: str) -> Path:
    (written(path, *TWO) / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(written(path, *TWO) / "cat" / "2.png")
    return path


def twice(path: Path) -> Path:
    place = zipped(path, "1.png")
    with zipfile.ZipFile(place, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("1.png", GOOD)
    return place


LABELS: list[list[object]] = [["cat/1.png", 0], ["dog/1.png", 1]]
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "shards beside images": (
        lambda p: tar(written(p, *TWO) / "old.tar", {"1.png": GOOD}).parent,
        r"holds tar shards \(old\.tar\) and image files \(cat/1\.png\)",
    ),
    "photographs of other kinds": (lambda p: written(p, *TWO, "cat/2.HEIC"), r"data:cat/2\.HEIC is an image of a kind"),
    "splits": (lambda p: written(p, "train/cat/1.png", "val/cat/1.png"), r"holds train, val, which are splits"),
    "a link to nothing": (
        lambda p: linked(written(p, *TWO), "cat/2.png", "gone.png"),
        r"2\.png is a link to gone",
    ),
    "a class folder's link to nothing": (lambda p: linked(written(p, *TWO), "cow", "gone"), r"cow is a link to gone"),
    "a folder within itself": (
        lambda p: linked(written(p, *TWO), "cat/all", ".."),
        r"cat/all is a link to a folder",
    ),
    "a pipe": (pipe, r"2\.png is no regular file"),
    "a label without image": (
        lambda p: described(p, [*LABELS, ["3.png", 1]]),
        r"1 images that are not there",
    ),
    "too few names": (
        lambda p: described(p, LABELS, class_names=["cat"]),
        r"dog/1\.png has label 1, but there are 1",
    ),
    "names that do not fit": (
        lambda p: named(p, "a", "b", "c"),
        r"classes\.txt of .* has 3 names for 2 classes",
    ),
    "two members of one name": (twice, r"holds two files 1\.png"),
    "two images of one key": (lambda p: shard(p, "s.png", "s.jpg", s=1), r"two images for the key s; give"),
    "two fields of one label": (lambda p: shard(p, "s.a.png", "s.b.png", s=1), r"two images for the key s, s\.b\.png"),
    "an archive of another kind": (
        lambda p: written(p, "a.tar.gz") / "a.tar.gz",
        r"no known kind of data.*; unpack it",
    ),
    "nothing but others": (lambda p: written(p, "a.txt"), r"no images in .* \(it has a\.txt\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(GenError, match=message):
        open_store(make(tmp_path / "data"))


def test_a_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "2.png"
        archive.addfile(link)
    with pytest.raises(GenError, match=r"1\.png is a link or no plain file; pack the files themselves"):
        open_store(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["o.zip", "o", "o.array_record"])
def test_names_of_classes_travel(tmp_path: Path, name: str) -> None:
    convert(open_store(folder(tmp_path / "in")), tmp_path / name, Copy())
    assert open_store(tmp_path / name).class_names == ("c0", "c1")


def test_names_of_classes_stand_in_a_file_beside_the_images(tmp_path: Path) -> None:
    assert open_store(named(tmp_path / "data", "a cat", "a dog")).class_names == ("a cat", "a dog")
    assert open_store(zipped(tmp_path / "zip", "0/1.png", "1/1.png", classes__txt="a\nb")).class_names == ("a", "b")


def test_text_of_any_length_travels_in_shards(tmp_path: Path) -> None:
    features = [np.full((length, 3), length, np.float16) for length in (2, 1)]
    members = {}
    for i, feature in enumerate(features):
        file = io.BytesIO()
        np.save(file, feature)
        members |= {f"{i}.png": png(picture(i)), f"{i}.npy": file.getvalue()}
    store = open_store(tar(tmp_path / "a.tar", members))

    def holds(store: Store) -> None:
        assert store.text is not None
        assert store.text_mask is not None
        assert (store.text.shape, store.text.dtype) == ((2, 2, 3), np.float16)
        assert store.text_mask.tolist() == [[True, True], [True, False]]
        assert store.text[..., 0].tolist() == [[2, 2], [1, 0]]

    holds(store)
    convert(store, tmp_path / "shards", Copy())
    holds(open_store(tmp_path / "shards"))
    with pytest.raises(GenError, match="cannot hold sequences of text, or text beside classes; give a folder"):
        convert(store, tmp_path / "o.zip", Copy())


def test_a_class_and_text_of_one_image_are_both_kept(tmp_path: Path) -> None:
    vector = io.BytesIO()
    np.save(vector, np.ones(3, np.float32))
    members = {"s.png": GOOD, "s.cls": b"2", "s.npy": vector.getvalue(), "s.json": b'{"label": 2, "caption": "a cat"}'}
    store = open_store(tar(tmp_path / "a.tar", members))
    assert store.label is not None
    assert store.text is not None
    assert (store.label.tolist(), store.text.tolist(), list(store.ignored)) == ([2], [[1, 1, 1]], [])
    convert(store, tmp_path / "shards", Copy())
    again = open_store(tmp_path / "shards")
    assert again.label is not None
    assert again.text is not None
    assert (again.label.tolist(), again.text.tolist()) == ([2], [[1, 1, 1]])
    with pytest.raises(GenError, match="give a folder for tar shards"):
        convert(store, tmp_path / "o.array_record", Copy())
    with pytest.raises(GenError, match=r"s\.json says 3, another file of the key 2; keep one"):
        open_store(tar(tmp_path / "b.tar", members | {"s.json": b'{"label": 3}'}))


def test_avif_is_read(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.avif", quality=100)
    assert open_store(tmp_path).pixels(0).shape == picture(0).shape
