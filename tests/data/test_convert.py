import errno
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from gen.cli import main
from gen.data import convert as conversion
from gen.data import vanished
from gen.data.convert import Copy, Transcode, convert, split_rows
from gen.data.inspect import inspect, preview
from gen.data.stores import Store, open_store
from gen.errors import GenError
from tests.data.files import edm_zip, folder, picture, png, tar


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(folder(tmp_path / "in", count=10, classes=3))


@pytest.mark.parametrize("name", ["out.zip", "out", "out.array_record"])
def test_every_layout_holds_the_same(store: Store, tmp_path: Path, name: str) -> None:
    assert convert(store, tmp_path / name, Transcode(), shard=4) == (10, [])
    back = open_store(tmp_path / name)
    np.testing.assert_array_equal(back.label, store.label)
    for i in range(10):
        np.testing.assert_array_equal(np.asarray(back.image(i)), np.asarray(store.image(i)))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in", name])


def test_zip_has_edm_layout(store: Store, tmp_path: Path) -> None:
    convert(store, tmp_path / "o.zip", Transcode(size=8, crop="adm", quality=90))
    with zipfile.ZipFile(tmp_path / "o.zip") as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        described = json.loads(archive.read("dataset.json"))
    assert names[:2] == ["00000/img00000000.jpg", "00000/img00000001.jpg"]
    assert described["labels"][0] == ["00000/img00000000.jpg", 0]
    assert described["class_names"] == ["c0", "c1", "c2"]
    assert open_store(tmp_path / "o.zip").image(0).size == (8, 8)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["out.zip", "out", "out.array_record"])
@pytest.mark.parametrize("cut", [0, 37])
def test_interrupted_conversions_end_in_the_same_bytes(store: Store, tmp_path: Path, name: str, cut: int) -> None:
    def content(path: Path) -> list[bytes]:
        return [p.read_bytes() for p in (sorted(path.iterdir()) if path.is_dir() else [path])]

    whole = tmp_path / "whole" / name
    convert(store, whole, Transcode(), shard=4, threads=1)

    for stop in (3, 7, 10):

        def kill(done: int, count: int, stop: int = stop) -> None:
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            convert(store, tmp_path / name, Transcode(), shard=4, threads=3, on_image=kill)
        partial = tmp_path / f"{name}.partial"
        if cut and partial.is_file():  # what was not yet written when the power went
            partial.write_bytes(partial.read_bytes()[:-cut])
    convert(store, tmp_path / name, Transcode(), shard=4)
    assert content(tmp_path / name) == content(whole)


def test_other_jobs_and_outputs_are_left_alone(store: Store, tmp_path: Path) -> None:
    def kill(done: int, count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        convert(store, tmp_path / "o.zip", Transcode(), on_image=kill)
    with pytest.raises(GenError, match="begun from other data or options"):
        convert(store, tmp_path / "o.zip", Transcode(size=8, crop="adm"))
    convert(store, tmp_path / "o.zip", Transcode())
    with pytest.raises(GenError, match="exists; remove it"):
        convert(store, tmp_path / "o.zip", Transcode())
    with pytest.raises(GenError, match=r"ends in \.zip"):
        convert(store, tmp_path / "o.rar", Transcode())
    for options in ({"size": 8}, {"crop": "adm"}, {"crop": "random", "size": 8}, {"quality": 0}):
        with pytest.raises(GenError):
            Transcode(**options)


def test_broken_images_stop_or_are_left_out(tmp_path: Path) -> None:
    place = folder(tmp_path / "in", count=6)
    (place / "c1" / "003.png").write_bytes(b"gone")
    with pytest.raises(GenError, match=r"003\.png is not a readable image"):
        convert(open_store(place), tmp_path / "o.zip", Transcode())
    count, dropped = convert(open_store(place), tmp_path / "p.zip", Transcode(), skip_broken=True)
    assert (count, len(dropped)) == (5, 1)
    assert "003.png" in dropped[0]
    back = open_store(tmp_path / "p.zip")
    assert back.label is not None
    assert back.label.tolist() == [0, 0, 0, 1, 1]


def test_names_in_archives_become_no_paths(tmp_path: Path) -> None:
    hostile = {"../../evil.png": png(picture(0)), "/tmp/evil.png": png(picture(1))}
    tar(tmp_path / "slip.tar", hostile)
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        for name, data in hostile.items():
            archive.writestr(name, data)
    inside = tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    for kind in ("tar", "zip"):
        convert(open_store(tmp_path / f"slip.{kind}"), inside / f"{kind}-shards", Transcode())
        shards = inside / f"{kind}-shards"
        assert list(open_store(shards).names) == ["img00000000.png", "img00000001.png"]
    assert not list(tmp_path.rglob("evil.png"))


class Full:
    """Stands for an open file on a disk that takes `room` more bytes."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        if len(data) > self.room:
            self.file.write(data[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)


@pytest.mark.parametrize("name", ["out.zip", "out"])
def test_a_full_disk_is_one_line_and_goes_on_with_room(
    store: Store, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(store, tmp_path / "whole" / name, Transcode(), shard=4)

    def opened(path: Path, mode: str = "r") -> IO[bytes]:
        file = open(path, mode)  # noqa: SIM115
        return Full(file, 3000) if "w" in mode and ".partial" in str(path) and "json" not in str(path) else file

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "open", opened, raising=False)
        patch.setattr(tarfile, "bltn_open", opened)
        with pytest.raises(GenError, match=rf"cannot write .*{name}: No space left on device; free space or choose"):
            convert(store, tmp_path / name, Transcode(), shard=4)
    convert(store, tmp_path / name, Transcode(), shard=4)
    for one, two in zip(
        sorted((tmp_path / "whole").rglob("*.*")), sorted(tmp_path.glob(f"{name}/*")) or [tmp_path / name], strict=True
    ):
        assert one.read_bytes() == two.read_bytes()


def test_an_output_that_cannot_be_made_is_one_line(store: Store) -> None:
    with pytest.raises(GenError, match=r"cannot write /dev/null/o\.zip"):
        convert(store, "/dev/null/o.zip", Transcode())


def test_hugging_face_rows_divide_and_convert(tmp_path: Path) -> None:
    """Rows have no file names there: the endings come from the content."""
    found = Store("hf:pets", ["00000000", "00000001"], lambda i: png(picture(i)), np.array([1, 0], np.int32))
    convert(found, tmp_path / "o.zip", Copy())
    back = open_store(tmp_path / "o.zip")
    assert [name[-4:] for name in back.names] == [".png", ".png"]
    np.testing.assert_array_equal(np.asarray(back.image(1)), picture(1))


def test_a_real_hugging_face_data_set_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library itself, from Parquet files on disk as the hub has them; classes and vectors."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [picture(i) for i in range(5)]
    cells = [{"bytes": png(pixels), "path": None} for pixels in pictures]
    vectors = [[i + 0.5, -1.0, 2.0] for i in range(5)]
    for name, kind, values in (
        ("label", datasets.ClassLabel(names=["cat", "dog"]), [0, 1, 1, 0, 1]),
        ("text", datasets.Sequence(datasets.Value("float32")), vectors),
    ):
        features = datasets.Features({"image": datasets.Image(), name: kind})
        rows = datasets.Dataset.from_dict({"image": cells, name: values}, features)
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
        for out in (f"{name}.zip", f"{name}.array_record", f"{name}-shards"):
            assert main(["data", "convert", f"hf:{tmp_path / name}:train", str(tmp_path / out)]) == 0
            store = open_store(tmp_path / out)
            for index, pixels in enumerate(pictures):
                np.testing.assert_array_equal(store.pixels(index), pixels)
            found = store.label if name == "label" else store.text
            assert found is not None
            assert found.tolist() == values
            assert store.class_names == (["cat", "dog"] if out == "label.zip" else None)
    assert main(["data", "inspect", f"hf:{tmp_path / 'label'}:test"]) == 2  # there is no such split


def test_a_disk_that_does_not_answer_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def read(index: int) -> bytes:
        if index == 3:
            answer.wait()
        return png(picture(index))

    lost = Store("far", store.names, read, store.label)
    with monkeypatch.context() as patch:
        patch.setattr(vanished, "STALL", 1.0)
        for use in (lambda: convert(lost, tmp_path / "o.zip", Transcode(), threads=2), lambda: inspect(lost)):
            with pytest.raises(vanished.Stalled, match=r"no data for 1 s, while reading far:c0/009\.png; check that"):
                use()
    answer.set()
    assert convert(lost, tmp_path / "o.zip", Transcode(), threads=2) == (10, [])


def test_split_is_stratified_complete_and_byte_for_byte(store: Store, tmp_path: Path) -> None:
    held, rest = split_rows(store, 4)
    assert sorted([*held, *rest]) == list(range(10))
    assert store.label is not None
    assert np.bincount(store.label[held]).tolist() in ([2, 1, 1],)  # of 4, 3 and 3
    convert(store, tmp_path / "h.zip", Copy(), rows=held.tolist())
    assert open_store(tmp_path / "h.zip").read(1) == store.read(int(held[1]))
    with pytest.raises(GenError, match="cannot hold out 10 of 10"):
        split_rows(store, 10)


def test_inspection_names_what_it_finds(tmp_path: Path) -> None:
    place = folder(tmp_path / "in", count=6)
    (place / "c0" / "twin.png").write_bytes(png(picture(3), compress_level=1))
    (place / "c1" / "bad.png").write_bytes(b"x")
    (place / "c1" / "small.png").write_bytes(png(picture(9, 4, 4)))
    (place / "readme.md").write_text("")
    found = inspect(open_store(place))
    assert found.count == 9
    assert found.classes == {0: 4, 1: 5}
    assert found.sizes == {(16, 12): 7, (4, 4): 1}
    assert found.treated == {}
    assert found.duplicates == [["c0/twin.png", "c1/003.png"]]
    assert len(found.broken) == 1
    assert "bad.png" in found.broken[0]
    assert found.ignored == ["readme.md"]
    assert preview(open_store(place), columns=3, rows=2, side=8).size == (24, 16)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(edm_zip(tmp_path / "a.zip", [[f"00000/img{i:08d}.png", i % 2] for i in range(6)]))
    assert main(["data", "convert", source, str(tmp_path / "b.zip"), "--size", "8"]) == 0
    assert main(["data", "inspect", str(tmp_path / "b.zip"), "--preview", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "2 classes, labels 0 to 1, 3 to 3 images each" in out
    assert "8 x 8: 6" in out
    parts = ["--held-out", str(tmp_path / "h.zip"), "--rest", str(tmp_path / "r.zip"), "--count", "2"]
    assert main(["data", "split", source, *parts]) == 0
    assert (len(open_store(tmp_path / "h.zip")), len(open_store(tmp_path / "r.zip"))) == (2, 4)
    assert main(["data", "convert", str(tmp_path / "nothing"), str(tmp_path / "c.zip")]) == 2
    assert "no data at" in capsys.readouterr().err


def test_commands_read_zips_as_well(tmp_path: Path) -> None:
    from gen.cli.images import read_images

    images, labels = read_images(str(edm_zip(tmp_path / "a.zip", [[f"00000/img{i:08d}.png", i] for i in range(6)])))
    np.testing.assert_array_equal(images, [picture(i) for i in range(6)])
    assert labels.tolist() == list(range(6))
    with zipfile.ZipFile(tmp_path / "grey.zip", "w") as archive:
        archive.writestr("a.png", png(picture(0)[..., 0]))
    images, labels = read_images(str(tmp_path / "grey.zip"))
    assert (images.shape, labels) == ((1, 12, 16, 1), None)
