"""Data sets to EDM zips, tar shards or ArrayRecord: parallel, resumable, the same bytes every time.

What is being written lies in ``OUT.partial`` (with ``OUT.partial.json``, which says what it is made of) and becomes
OUT in one move. A conversion that was killed finds the last whole image in it and goes on there; nothing else is
stored, so what stands in the file is all there is to trust, and its checksums are.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from gen.data.stores import Store
from gen.data.transforms import Crop, Filter, encode_png, fit
from gen.data.vanished import ahead
from gen.errors import GenError
from gen.files import atomic, settle, write_json, writing

__all__ = ["Copy", "Transcode", "convert", "split_rows"]

Maker = Callable[[Store, int], tuple[str, bytes]]  # store, index -> extension, file content
DATE = (1980, 1, 1, 0, 0, 0)  # in every header: equal images are equal bytes


@dataclasses.dataclass(frozen=True)
class Transcode:
    """Images decoded, cropped and written as PNG or JPEG.

    Attributes:
      size: side in pixels; None keeps the images' own.
      crop, filter: see `gen.data.images.Images`; "random" makes no sense here.
      channels: 3 or 1.
      quality: JPEG quality 1 to 100; None is PNG without compression (`encode_png`): quickest to read.

    Raises GenError for random crops, a size without a crop, and a size or quality out of range.
    """

    size: int | None = None
    crop: Crop = "none"
    filter: Filter = "lanczos"
    channels: int = 3
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.crop == "random":
            raise GenError("a conversion cannot crop at random; choose adm, center or squeeze")
        if (self.size is None) != (self.crop == "none"):
            raise GenError("size and crop go together; give both, or neither to keep the images' sizes")
        if self.size is not None and not 1 <= self.size <= 8192:
            raise GenError(f"size is {self.size}; expected 1 to 8192 pixels")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise GenError(f"JPEG quality is {self.quality}; expected 1 to 100")

    def __call__(self, store: Store, index: int) -> tuple[str, bytes]:
        """Gives (extension, file content) of one image."""
        image = fit(store.image(index, self.channels), self.crop, self.size, self.filter)
        if self.quality is None:
            return ".png", encode_png(image)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality)
        return ".jpg", out.getvalue()


@dataclasses.dataclass(frozen=True)
class Copy:
    """Files as they are, byte for byte."""

    def __call__(self, store: Store, index: int) -> tuple[str, bytes]:
        """Gives (extension, file content) of one image."""
        return store.read(index)


def convert(
    store: Store,
    out: str | Path,
    maker: Maker,
    *,
    rows: Sequence[int] | None = None,
    threads: int | None = None,
    skip_broken: bool = False,
    shard: int = 4096,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[int, list[str]]:
    """Writes `store` to `out`; called again after an interruption it goes on.

    Args:
      store: the images and labels.
      out: ``name.zip`` (EDM layout), ``name.array_record``, or a folder to be filled with tar shards.
      maker: `Transcode` or `Copy`.
      rows: indices to take, in this order; all by default.
      threads: that decode and encode; as many as there are processors by default. The bytes do not depend on it.
      skip_broken: leave images out that cannot be read instead of stopping at the first.
      shard: images per tar file.
      on_image: called as (images done, images in all), at the start and after each image.

    Returns (number of images written, messages of those left out).

    Raises:
      GenError: an image that cannot be read, an output that exists and is another's, a disk that is full.
    """
    out = Path(out)
    chosen = list(range(len(store))) if rows is None else [int(row) for row in rows]
    if shard < 1 or not chosen:
        raise GenError(f"nothing to convert: {len(chosen)} images in shards of {shard}; expected at least one")
    # Resuming trusts what is there only if the same would be written again.
    picked = hashlib.sha256(np.asarray(chosen, np.int64).tobytes()).hexdigest()[:16]
    job = {"data": store.identity(), "rows": picked, "maker": repr(maker), "skip": skip_broken, "shard": shard}
    kinds: dict[str, Callable[[], Sink]] = {
        ".zip": lambda: ZipSink(out, store, job, chosen),
        ".array_record": lambda: RecordSink(out, store, job, chosen),
        "": lambda: Shards(out, store, job, chosen, shard),
    }
    if out.suffix not in kinds:
        raise GenError(
            f"cannot write {out}; give a name that ends in .zip or .array_record, or a folder for tar shards"
        )
    dropped: list[str] = []
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(kinds[out.suffix]()) as sink:
            done = sink.done
            if on_image is not None:
                on_image(done, len(chosen))
            for position, extension, data in _made(store, chosen, sink.next, maker, threads, skip_broken, dropped):
                sink.write(position, extension, data)
                done += 1
                if on_image is not None:
                    on_image(done, len(chosen))
            if not done:
                raise GenError(f"none of the {len(chosen)} images of {store.path} can be read; check the data")
            sink.finish()
    return done, dropped


def split_rows(store: Store, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gives indices of `count` images held out, and of the rest, both sorted; from every class its share.

    A class's share is rounded down; the images still lacking come from the classes with the largest remainders.
    The choice within a class is a fixed function of (seed, number of images in the class).

    Raises GenError for a part that is empty, or leaves none.
    """
    from gen.data.loader import epoch_order

    if not 0 < count < len(store):
        raise GenError(f"cannot hold out {count} of {len(store)} images; expected 1 to {len(store) - 1}")
    label = np.zeros(len(store), np.int32) if store.label is None else store.label
    classes, sizes = np.unique(label, return_counts=True)
    exact = sizes * (count / len(store))
    takes = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - takes), kind="stable")
    takes[order[: count - int(takes.sum())]] += 1
    held = np.concatenate(
        [
            np.flatnonzero(label == c)[epoch_order(int(size), seed, int(c))[:take]]
            for c, size, take in zip(classes, sizes, takes, strict=True)
        ]
    )
    return np.sort(held), np.setdiff1d(np.arange(len(store)), held)


def _made(
    store: Store, rows: list[int], first: int, maker: Maker, threads: int | None, skip: bool, dropped: list[str]
) -> Iterator[tuple[int, str, bytes]]:
    """(position, extension, content) in order from `first` on, made ahead by threads (Pillow frees the GIL)."""

    def make(position: int) -> tuple[str, bytes]:
        return maker(store, rows[position])

    for position, made in ahead(make, range(first, len(rows)), lambda p: store.title(rows[p]), threads):
        try:
            yield position, *made.result()
        except GenError as error:
            if not skip:
                raise
            dropped.append(str(error))


class Sink(Protocol):
    """Takes images in order of their position among the rows.

    Attributes:
      next: the first position that is not yet written.
      done: images written before.
    """

    next: int
    done: int

    def write(self, position: int, extension: str, data: bytes) -> None:
        """Writes one image."""
        ...

    def finish(self) -> None:
        """Makes the output appear, once all images are written."""
        ...

    def close(self) -> None:
        """Lets go of the files, finished or not."""
        ...


def _begin(out: Path, job: dict[str, Any]) -> Path:
    """The partial file's path, after making sure that it is this job's or absent."""
    partial, tag = out.with_name(out.name + ".partial"), out.with_name(out.name + ".partial.json")
    if out.exists():
        if not partial.exists():
            tag.unlink(missing_ok=True)  # killed between the move and this
        raise GenError(f"{out} exists; remove it or give another output")
    if tag.exists():
        try:
            found = json.loads(tag.read_text())
        except ValueError:
            found = None
        if found != job:
            raise GenError(f"{partial} was begun from other data or options; remove it and {tag.name}, or finish that")
    else:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        write_json(tag, job)
    return partial


def _end(partial: Path, out: Path) -> None:
    settle(partial, out)
    out.with_name(out.name + ".partial.json").unlink(missing_ok=True)


def _member(position: int, extension: str) -> str:
    """EDM's names: 00000/img00000000.png."""
    return f"{position // 1000:05d}/img{position:08d}{extension}"


def _simple(out: Path, store: Store) -> None:
    """Raises GenError for what only tar shards hold: sequences of text, and classes beside text."""
    if store.text_mask is not None or (store.text is not None and store.label is not None):
        raise GenError(f"{out} cannot hold sequences of text, or text beside classes; give a folder for tar shards")


def _value(store: Store, row: int) -> Any:
    """The label of a row as JSON has it: class, vector, or None."""
    if store.label is not None:
        return int(store.label[row])
    return None if store.text is None else store.text[row].tolist()


class ZipSink:
    """An EDM zip: stored members 00000/img00000000.png ..., dataset.json at the end."""

    def __init__(self, out: Path, store: Store, job: dict[str, Any], rows: list[int]):
        self.out, self.store, self.rows = out, store, rows
        self.partial = _begin(out, job)
        self.file = open(self.partial, "r+b" if self.partial.exists() else "w+b")  # noqa: SIM115
        members, end = _whole_members(self.file)
        self.file.seek(end)
        self.file.truncate()
        self.zip = zipfile.ZipFile(self.file, "w")
        self.zip.filelist += members
        self.zip.NameToInfo |= {member.filename: member for member in members}
        _simple(out, store)
        self.done = len(members)
        self.next = 1 + _position(members[-1].filename) if members else 0

    def write(self, position: int, extension: str, data: bytes) -> None:
        """Writes one member."""
        self.zip.writestr(zipfile.ZipInfo(_member(position, extension), DATE), data)

    def finish(self) -> None:
        """Writes dataset.json and the directory, and moves the file to its name."""
        values = [[name, _value(self.store, self.rows[_position(name)])] for name in self.zip.namelist()]
        described: dict[str, Any] = {"labels": None if values[0][1] is None else values}
        if self.store.class_names:
            described["class_names"] = list(self.store.class_names)
        self.zip.writestr(zipfile.ZipInfo("dataset.json", DATE), json.dumps(described))
        self.zip.close()
        self.file.flush()
        _end(self.partial, self.out)

    def close(self) -> None:
        """Closes the file; without a directory when it is not finished."""
        self.zip.fp = None
        self.file.close()


def _position(name: str) -> int:
    return int(Path(name).stem[3:])


def _whole_members(file: IO[bytes]) -> tuple[list[zipfile.ZipInfo], int]:
    """Members that are there in full, by their checksums, and where they end."""
    members: list[zipfile.ZipInfo] = []
    end = 0
    while True:
        file.seek(end)
        head = file.read(30)
        if len(head) < 30 or head[:4] != b"PK\3\4":
            return members, end
        method, _, _, crc, packed, size, length, extra = struct.unpack("<HHHIIIHH", head[8:30])
        name = file.read(length).decode("ascii", "replace")
        if method or extra or packed != size or not re.fullmatch(r"\d{5,}/img\d{8,}\.\w+", name):
            return members, end
        data = file.read(size)
        if len(data) != size or zlib.crc32(data) != crc:
            return members, end
        member = zipfile.ZipInfo(name, DATE)
        member.CRC, member.compress_size, member.file_size, member.header_offset = crc, size, size, end
        member.external_attr = 0o600 << 16  # as `zipfile` marks the members it writes
        members.append(member)
        end = file.tell()


class Shards:
    """A folder of tar shards 00000.tar ...: img00000000.png with img00000000.cls, or .npy for text; and classes.txt.

    A shard is written whole or not at all; an interrupted conversion goes on with the first that lacks.
    """

    def __init__(self, out: Path, store: Store, job: dict[str, Any], rows: list[int], shard: int):
        self.out, self.store, self.rows, self.shard = out, store, rows, shard
        self.partial = _begin(out, job)
        self.partial.mkdir(exist_ok=True)
        whole = 0
        self.done = 0
        while self._path(whole).exists():
            with tarfile.open(self._path(whole), "r:") as archive:
                self.done += sum(Path(name).suffix not in (".cls", ".npy") for name in archive.getnames())
            whole += 1
        self.next = min(whole * shard, len(rows))
        self.number = whole
        self.tar: tarfile.TarFile | None = None

    def _path(self, number: int) -> Path:
        return self.partial / f"{number:05d}.tar"

    def write(self, position: int, extension: str, data: bytes) -> None:
        """Writes one image and its label."""
        if self.tar is not None and position // self.shard != self.number:
            self._whole()
        if self.tar is None:
            self.number = position // self.shard
            self.tar = tarfile.open(self._path(self.number).with_suffix(".tmp"), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._add(f"img{position:08d}{extension}", data)
        row = self.rows[position]
        if self.store.text is not None:
            text = self.store.text[row]
            features = io.BytesIO()
            np.save(features, text if self.store.text_mask is None else text[self.store.text_mask[row]])
            self._add(f"img{position:08d}.npy", features.getvalue())
        if self.store.label is not None:
            self._add(f"img{position:08d}.cls", str(self.store.label[row]).encode())

    def _add(self, name: str, data: bytes) -> None:
        assert self.tar is not None
        head = tarfile.TarInfo(name)
        head.size = len(data)
        self.tar.addfile(head, io.BytesIO(data))

    def _whole(self) -> None:
        assert self.tar is not None
        self.tar.close()
        self.tar = None
        temporary = self._path(self.number).with_suffix(".tmp")
        settle(temporary, self._path(self.number))

    def finish(self) -> None:
        """Closes the last shard and moves the folder to its name."""
        if self.tar is not None:
            self._whole()
        for left in self.partial.glob("*.tmp"):
            left.unlink()
        if self.store.class_names:
            names = "".join(f"{' '.join(name.split())}\n" for name in self.store.class_names).encode(errors="replace")
            atomic(self.partial / "classes.txt", lambda file: file.write(names))
        _end(self.partial, self.out)

    def close(self) -> None:
        """Drops a shard that was begun."""
        if self.tar is not None:
            self.tar.fileobj.close()  # type: ignore[union-attr]


class RecordSink:
    """An ArrayRecord file of {"name", "label"} lines followed by the image's bytes; an interrupted one starts over.

    Raises GenError for a missing package array_record.
    """

    next = 0
    done = 0

    def __init__(self, out: Path, store: Store, job: dict[str, Any], rows: list[int]):
        try:
            from array_record.python.array_record_module import ArrayRecordWriter
        except ImportError:
            raise GenError(f"{out} needs the package array_record; pip install array_record") from None
        self.out, self.store, self.rows = out, store, rows
        _simple(out, store)
        self.class_names = store.class_names
        self.partial = _begin(out, job)
        self.writer: Any = ArrayRecordWriter(str(self.partial), "group_size:1")

    def write(self, position: int, extension: str, data: bytes) -> None:
        """Writes one record."""
        head = {"name": _member(position, extension), "label": _value(self.store, self.rows[position])}
        if self.class_names:  # the first record carries them
            head["class_names"], self.class_names = list(self.class_names), None
        self.writer.write(json.dumps(head).encode() + b"\n" + data)

    def finish(self) -> None:
        """Writes the index and moves the file to its name."""
        self.close()
        _end(self.partial, self.out)

    def close(self) -> None:
        """Closes the file of records."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
