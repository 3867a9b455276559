import contextlib
import errno
import io
import os
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gen.data import stores
from gen.data.convert import Copy, convert
from gen.data.stores import open_store, tars
from gen.errors import GenError
from scripts.fuzz_readers import LAYOUTS, damaged, original, place, read_all
from tests.data.files import edm_zip, folder, picture, png, tar

NAMES = [f"00000/img{i:08d}.png" for i in range(6)]


def pixels(path: Path, index: int) -> np.ndarray:
    return np.asarray(open_store(path).image(index))


def test_folder_has_a_class_per_folder(tmp_path: Path) -> None:
    (folder(tmp_path / "a") / "notes.txt").write_text("x")
    store = open_store(tmp_path / "a")
    assert store.label is not None
    assert store.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert (store.class_names, store.ignored) == (("c0", "c1"), ["notes.txt"])
    np.testing.assert_array_equal(np.asarray(store.image(1)), picture(2))


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(picture(i)))
    assert open_store(tmp_path).label is None


def test_zip_has_labels_by_name(tmp_path: Path) -> None:
    store = open_store(edm_zip(tmp_path / "a.zip", [[name, 5 - i] for i, name in reversed(list(enumerate(NAMES)))]))
    assert store.label is not None
    assert store.label.tolist() == [5, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(np.asarray(store.image(3)), picture(3))
    vectors = open_store(edm_zip(tmp_path / "b.zip", [[name, [0.5, i]] for i, name in enumerate(NAMES)]))
    assert vectors.text is not None
    assert vectors.text.shape == (6, 2)
    assert open_store(edm_zip(tmp_path / "c.zip", None)).label is None


def test_tar_shards_are_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(2):
        tar(tmp_path / f"{n}.tar", {f"k{n}.png": png(picture(n)), f"k{n}.cls": str(n + 3).encode()})
    store = open_store(tmp_path)
    assert store.label is not None
    assert store.label.tolist() == [3, 4]
    np.testing.assert_array_equal(np.asarray(store.image(1)), picture(1))
    monkeypatch.delattr(tars, "_scan")
    assert open_store(tmp_path).identity() == store.identity()
    tar(tmp_path / "1.tar", {"k.png": png(picture(7)), "k.cls": b"0", "more.png": png(picture(8)), "more.cls": b"1"})
    with pytest.raises(NameError):  # changed, so it is scanned
        open_store(tmp_path)


def test_arrays(tmp_path: Path) -> None:
    images = np.stack([picture(i) for i in range(4)])
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.arange(4))
    np.save(tmp_path / "a.npy", images[..., 0])
    np.testing.assert_array_equal(pixels(tmp_path / "a.npz", 2), images[2])
    assert np.asarray(open_store(tmp_path / "a.npy").image(1, channels=1)).tolist() == images[1, ..., 0].tolist()


def test_identity_is_of_content_and_not_of_place(tmp_path: Path) -> None:
    labels = [[name, 0] for name in NAMES]
    same = [open_store(edm_zip(tmp_path / name, labels)).identity() for name in ("a.zip", "b.zip")]
    other = open_store(edm_zip(tmp_path / "c.zip", [*labels[1:], [NAMES[0], 1]])).identity()
    assert same[0] == same[1] != other


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[name, 0] for name in NAMES[1:]], "no label for 1 of 6 images, the first 00000/img00000000.png"),
        ([[name, -1] for name in NAMES], "has label -1; expected a class from 0 on"),
        ([[name, "cat"] for name in NAMES], "has label cat; expected a class number"),
        ([[name, [1.0] * (i + 1)] for i, name in enumerate(NAMES)], "a vector of 2 numbers; expected 1"),
        ([1, 2], "labels of another form"),
        ("x", "labels of another form"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, labels: object, message: str) -> None:
    with pytest.raises(GenError, match=message):
        open_store(edm_zip(tmp_path / "a.zip", labels))


def test_bad_containers_are_named(tmp_path: Path) -> None:
    with pytest.raises(GenError, match=r"no data at .*nothing; expected a folder"):
        open_store(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GenError, match="no images in"):
        open_store(tmp_path / "empty")
    for suffix in (".zip", ".tar", ".npz", ".npy"):
        (tmp_path / f"x{suffix}").write_bytes(b"rubbish" * 100)
        with pytest.raises(GenError, match=f"x\\{suffix}"):
            open_store(tmp_path / f"x{suffix}")
    (tmp_path / "x.mp4").write_bytes(b"")
    with pytest.raises(GenError, match="no known kind of data"):
        open_store(tmp_path / "x.mp4")
    tar(tmp_path / "half.tar", {"a.png": b"x", "a.cls": b"1", "b.png": b"y"})
    with pytest.raises(GenError, match=r"no label for 1 images, the first b\.png; give one to all"):
        open_store(tmp_path / "half.tar")
    np.savez(tmp_path / "l.npz", image=np.zeros((3, 4, 4, 3), np.uint8), label=np.zeros(2, int))
    with pytest.raises(GenError, match=r"labels int64 \(2,\) for 3 images"):
        open_store(tmp_path / "l.npz")
    np.savez(tmp_path / "f.npz", image=np.zeros((3, 4, 4, 3)))
    with pytest.raises(GenError, match="expected uint8"):
        open_store(tmp_path / "f.npz")


def test_vanished_file_is_named(tmp_path: Path) -> None:
    store = open_store(folder(tmp_path / "a"))
    (tmp_path / "a" / "c0" / "000.png").unlink()
    with pytest.raises(GenError, match=r"cannot read .*000.png \(No such file"):
        store.image(0)


def test_hostile_archives_cost_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(stores.MAX_FILE + 1))
        archive.writestr("../../escape.png", png(picture(0)))
    store = open_store(tmp_path / "bomb.zip")
    assert list(store.names) == ["../../escape.png", "a.png"]
    with pytest.raises(GenError, match="expected at most"):
        store.image(1)
    with zipfile.ZipFile(tmp_path / "labels.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(picture(0)))
        archive.writestr("dataset.json", b"[" + b"0," * (1 << 20) + b"0]")
    with pytest.raises(GenError, match=r"dataset\.json has 2097155 bytes; expected at most 1114112"):
        open_store(tmp_path / "labels.zip")
    # A member that unpacks to more than it says is cut at what it says, and refused.
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
    data = (tmp_path / "liar.zip").read_bytes().replace(struct.pack("<I", 1 << 20), struct.pack("<I", 100))
    (tmp_path / "liar.zip").write_bytes(data)
    with pytest.raises(GenError, match="damaged in the zip"):
        open_store(tmp_path / "liar.zip").image(0)
    # An npz whose header claims terabytes.
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 999, 999, 3)}
    )
    (tmp_path / "huge.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("image.npy", header.getvalue())
    np.save(tmp_path / "object.npy", np.array([print], object), allow_pickle=True)
    for name, message in (
        ("huge.npy", "but holds 0 bytes"),
        ("huge.npz", "but holds 0"),
        ("object.npy", "no npy|holds"),
    ):
        with pytest.raises(GenError, match=message):
            open_store(tmp_path / name)


class Image:
    """Stands for `datasets.Image`; the store looks at the names of feature types only."""

    def __init__(self, decode: bool) -> None:
        assert not decode


class ClassLabel:
    names = ("cat", "dog")


class Value:
    pass


class List:
    pass


class Rows:
    """As much of `datasets.Dataset` as the store uses."""

    _fingerprint = "f0"

    def __init__(self, features: dict[str, object], columns: dict[str, list]) -> None:
        self.features, self.columns = features, columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: str | int):
        return self.columns[key] if isinstance(key, str) else {name: rows[key] for name, rows in self.columns.items()}

    def cast_column(self, name: str, kind: object) -> "Rows":
        return self


def hugging_face(monkeypatch: pytest.MonkeyPatch, features: dict[str, object], columns: dict[str, list]) -> None:
    """A module `datasets` that knows one data set, pets, with one split, test."""
    module = types.ModuleType("datasets")

    def load_dataset(name: str, split: str) -> Rows:
        if (name, split) != ("pets", "test"):
            raise FileNotFoundError(f"Dataset '{name}' has no split {split}")
        return Rows(features, columns)

    module.load_dataset, module.Image = load_dataset, Image
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hugging_face_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.png").write_bytes(png(picture(1)))
    cells = [
        {"bytes": png(picture(0)), "path": None},
        {"bytes": None, "path": str(tmp_path / "one.png")},
        {"bytes": None, "path": None},
    ]
    hugging_face(monkeypatch, {"id": Value(), "picture": Image(False), "kind": ClassLabel()},
                 {"id": [7, 8, 9], "picture": cells, "kind": [1, 0, 1]})  # fmt: skip
    store = open_store("hf:pets:test")
    assert store.label is not None
    assert (store.label.tolist(), store.class_names) == ([1, 0, 1], ("cat", "dog"))
    for index in range(2):
        np.testing.assert_array_equal(np.asarray(store.image(index)), picture(index))
        assert store.read(index)[0] == ".png"  # which its name does not say
    with pytest.raises(GenError, match="hf:pets:test:00000002 has no image"):
        store.image(2)
    (tmp_path / "one.png").unlink()
    with pytest.raises(GenError, match=r"cannot read .*one\.png \(No such file"):
        store.image(1)
    for text, message in (("hf:pets", "cannot load hf:pets .*no split train"), ("hf:", "names no data set")):
        with pytest.raises(GenError, match=message):
            open_store(text)


def test_labels_of_hugging_face_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"bytes": png(picture(i))} for i in range(2)]
    for kind, column, rows in (
        (Value(), "label", [3, 0]),
        (List(), "text", [[0.5, 1.0], [2.0, 3.0]]),
        (Value(), "text", ["a caption", "another"]),
    ):
        hugging_face(monkeypatch, {"image": Image(False), column: kind}, {"image": cells, column: rows})
        store = open_store("hf:pets:test")
        assert (None if store.label is None else store.label.tolist()) == (rows if column == "label" else None)
        assert (None if store.text is None else store.text.tolist()) == (
            rows if column == "text" and kind.__class__ is List else None
        )
    hugging_face(monkeypatch, {"image": Image(False), "label": ClassLabel()}, {"image": cells, "label": [0, -1]})
    with pytest.raises(GenError, match="00000001 has label -1; expected a class from 0 on"):
        open_store("hf:pets:test")
    hugging_face(monkeypatch, {"caption": Value()}, {"caption": ["x"]})
    with pytest.raises(GenError, match="hf:pets:test has no column of images; it has caption"):
        open_store("hf:pets:test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GenError, match=r"pip install 'gen-image\[hf-datasets\]'"):
        open_store("hf:pets:test")


def test_one_of_several_columns_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [[{"bytes": png(picture(2 * i + c))} for i in range(2)] for c in range(2)]
    features = {"image": Image(False), "mask": Image(False), "fine": ClassLabel(), "coarse": ClassLabel()}
    columns = {"image": cells[0], "mask": cells[1], "fine": [0, 1], "coarse": [1, 1]}
    hugging_face(monkeypatch, features, columns)
    for where, message in (
        ("hf:pets:test", "several columns of images: image, mask; name the one that is meant"),
        ("hf:pets:test:mask", "several columns of classes: fine, coarse"),
        ("hf:pets:test:masks:fine", "no column 'masks'; it has image, mask, fine, coarse"),
        ("hf:pets:test:mask:fine:more", "names no data set"),
    ):
        with pytest.raises(GenError, match=message):
            open_store(where)
    store = open_store("hf:pets:test:mask:coarse")
    np.testing.assert_array_equal(store.pixels(1), picture(3))
    assert store.label is not None
    assert store.label.tolist() == [1, 1]


def test_array_records_refuse_forked_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native reader's threads do not survive a fork: it would wait for them for ever."""
    source = open_store(edm_zip(tmp_path / "a.zip", [[name, 0] for name in NAMES]))
    convert(source, tmp_path / "a.array_record", Copy())
    store = open_store(tmp_path / "a.array_record")
    assert store.read(2) == source.read(2)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(GenError, match="opened before this process was forked; start worker processes by spawn"):
        store.image(0)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENODEV])
def test_archives_on_a_lost_disk_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    zipped = open_store(edm_zip(tmp_path / "a.zip", [[name, 0] for name in NAMES]))
    shard = open_store(tar(tmp_path / "a.tar", {"a.png": png(picture(0))}))

    def lost(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", lost)
    for store, name in ((zipped, "a.zip"), (shard, "a.tar")):
        with pytest.raises(
            GenError, match=rf"cannot read .*{name} \(.*\); check that the disk or network folder is there"
        ):
            store.image(0)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:gen.data.caches")
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_ends_in_clear_errors(tmp_path: Path, data: st.DataObject, layout: str) -> None:
    raw = bytearray(original(layout))
    if data.draw(st.booleans()):
        raw = bytearray(damaged(bytes(raw), np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))))
    for _ in range(data.draw(st.integers(0, 4)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    inside = tmp_path / "data"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir()
    with contextlib.suppress(GenError):  # and nothing else
        read_all(layout, place(layout, bytes(raw), inside))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
