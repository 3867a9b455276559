"""How samples are written: a folder of PNG files, one contact sheet, an .npz or a .zip, and a note beside them."""

import io
import json
import math
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from gen.errors import GenError
from gen.files import atomic, read_json, write_json, writing
from gen.sampling.seeds import parse_seeds, spell
from gen.training.indexed import ArrayWriter, Writer

__all__ = ["SampleWriter", "contact_sheet", "read_note", "sample_form", "sample_writer"]

SHEET = 64  # images in the grid.png beside a folder of PNG files
SHOWN = 48  # smaller images are enlarged to this height in a contact sheet
_OTHERS = {".avif", ".gz", ".h5", ".npy", ".pkl", ".pt", ".safetensors", ".tar", ".tgz", ".7z"}


def sample_form(out: str | Path) -> str:
    """Gives the ending that decides how samples are written: ".npz", ".zip", ".png", or "" for a folder.

    Raises GenError for the ending of another kind of file, which would become the name of a folder.
    """
    ending = Path(out).suffix.lower()
    if ending in (".npz", ".zip", ".png"):
        return ending
    if ending in Image.registered_extensions() or ending in _OTHERS:
        raise GenError(
            f"samples are not written as {ending} ({out}); write .png for one contact sheet, .npz, .zip, or the name "
            "of a folder for PNG files"
        )
    return ""


def read_note(path: str | Path) -> dict[str, Any] | None:
    """Gives what `generate` noted beside samples: ``seeds`` ("0-63"), ``quantiser``, ``rule`` of labels, ``identity``.

    None for images that `generate` did not write. Raises GenError for a note of an earlier version.
    """
    path = Path(path)
    try:
        if path.is_dir():
            note = json.loads((path / "samples.json").read_text())
        elif path.suffix in (".npz", ".zip"):
            with zipfile.ZipFile(path) as archive:
                note = json.loads(archive.comment)
        else:
            return None
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    known = isinstance(note, dict) and {"identity", "seeds", "quantiser", "rule"} <= set(note)
    if known and not isinstance(note["seeds"], str):
        raise GenError(f"{path} holds samples of an earlier version, noted in another way; make them again")
    return note if known else None


class SampleWriter(Writer, Protocol):
    """A writer that also says in which order it takes the images."""

    @property
    def seeds(self) -> Sequence[int]:
        """Gives all seeds, in the order of the rows; those before row `next` are there."""
        ...


def sample_writer(
    out: Path, ending: str, seeds: list[int], labels: np.ndarray | None, note: dict[str, Any]
) -> SampleWriter:
    """Gives the writer of a form (`sample_form`) for images of `seeds`; `note` is kept beside them (`read_note`)."""
    match ending:
        case ".npz":
            return _Npz(out, seeds, note)
        case ".zip":
            return _Zip(out, seeds, labels, note)
        case ".png":
            return _Sheet(out, seeds)
        case _:
            return _Folder(out, seeds, labels, note)


class _Npz:
    """Drops what was only there to be checked."""

    def __init__(self, path: Path, seeds: Sequence[int], note: dict[str, Any]) -> None:
        self.seeds, self.inner = seeds, ArrayWriter(path, len(seeds), note["identity"], note)

    @property
    def next(self) -> int:
        return self.inner.next

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        self.inner.write(first, {name: rows for name, rows in arrays.items() if name != "image"})

    def close(self) -> None:
        self.inner.close()


class _Sheet:
    """All images in one picture."""

    def __init__(self, path: Path, seeds: Sequence[int]) -> None:
        self.path, self.seeds, self.images, self.next = path, seeds, list[np.ndarray](), 0

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        self.images.extend(arrays["arr_0"])
        self.next = first + len(arrays["arr_0"])

    def close(self) -> None:
        sheet = _png(contact_sheet(np.stack(self.images)))
        atomic(self.path, lambda file: file.write(sheet))


class _Folder:
    """A folder of PNG files named by seed; each appears whole. Its ``seeds`` are those that are there, then the rest.

    samples.json tells of the samples of all calls for this folder, by ascending seed, before the first is made.
    """

    def __init__(self, path: Path, seeds: Sequence[int], labels: np.ndarray | None, about: dict[str, Any]) -> None:
        self.path, note = path, path / "samples.json"
        given = dict(zip(seeds, [None] * len(seeds) if labels is None else labels.tolist(), strict=True))
        if note.is_file():
            about, self.known = self._joined(read_note(path) or {}, given, about)
        elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise GenError(f"{path} exists and holds no samples of this program; choose another output folder")
        else:
            self.known = given
        self.known = dict(sorted(self.known.items()))
        about = about | {"seeds": spell(list(self.known))}
        about |= {} if labels is None else {"labels": list(self.known.values())}
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        if not note.is_file() or read_json(note) != about:
            write_json(note, about)
        there = {entry.name for entry in os.scandir(path)}
        done = [seed for seed in seeds if _name(seed) in there]
        self.next, self.seeds = len(done), [*done, *(seed for seed in seeds if _name(seed) not in there)]
        if self.next < len(seeds):
            (path / "grid.png").unlink(missing_ok=True)

    def _joined(self, old: Any, given: dict[int, Any], about: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Any]]:
        """The note of these samples and those that are there, and all labels by seed."""
        if old.get("identity") != about["identity"]:
            raise GenError(f"{self.path} holds samples of another model or settings; choose another output folder")
        seeds = parse_seeds(old["seeds"])
        known = dict(zip(seeds, old.get("labels", [None] * len(seeds)), strict=True))
        for seed, label in given.items():
            if known.get(seed, label) != label:
                raise GenError(
                    f"{self.path} holds seed {seed} as class {known[seed]}, not {label}; choose another output folder"
                )
        return about | ({} if old["rule"] == about["rule"] else {"rule": "given"}), known | given

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        with writing(self.path):
            for seed, image in zip(self.seeds[first:], arrays["arr_0"], strict=False):
                # renamed when whole; not synced, since a crash of the machine costs only samples made again
                part = self.path / f".{_name(seed)}.part"
                part.write_bytes(_png(image))
                part.replace(self.path / _name(seed))
        self.next = first + len(arrays["arr_0"])

    def close(self) -> None:
        if self.next == len(self.seeds) and not (self.path / "grid.png").exists():
            shown = [seed for seed in self.known if (self.path / _name(seed)).exists()][:SHEET]
            sheet = _png(contact_sheet(np.stack([self.image(seed) for seed in shown])))
            atomic(self.path / "grid.png", lambda file: file.write(sheet))

    def image(self, seed: int) -> np.ndarray:
        """(H, W, C) uint8 of a written seed."""
        with Image.open(self.path / _name(seed)) as image:
            array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array


class _Zip:
    """PNG files gather in a folder beside the archive, which appears when all are there."""

    def __init__(self, path: Path, seeds: Sequence[int], labels: np.ndarray | None, note: dict[str, Any]) -> None:
        self.path, self.given, self.labels, self.note = path, seeds, labels, note
        self.partial = path.with_name(path.name + ".partial")
        self.folder: _Folder | None = None
        self.next, self.seeds = len(seeds), seeds
        if not path.exists():
            self.folder = _Folder(self.partial, seeds, labels, note)
            self.next, self.seeds = self.folder.next, self.folder.seeds
        elif (read_note(path) or {}).get("identity") != note["identity"]:
            raise GenError(f"{path} exists and holds other samples or none; choose another output file")

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        assert self.folder is not None
        self.folder.write(first, arrays)
        self.next = self.folder.next

    def close(self) -> None:
        folder = self.folder
        if folder is None or self.next < len(folder.seeds):
            return
        names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(self.given))]

        def pack(out: IO[bytes]) -> None:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
                archive.comment = json.dumps(self.note).encode()
                for name, seed in zip(names, self.given, strict=True):
                    archive.writestr(zipfile.ZipInfo(name), (self.partial / _name(seed)).read_bytes())
                pairs = None if self.labels is None else list(zip(names, self.labels.tolist(), strict=True))
                archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": pairs}))

        atomic(self.path, pack)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.folder = None


def _name(seed: int) -> str:
    return f"{seed:06d}.png"


def _png(image: np.ndarray) -> bytes:
    """(H, W, 1 or 3) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Gives images (N, H, W, C) uint8 side by side, near square; small ones enlarged (Lanczos). (H', W', C) uint8."""
    count, height, width, channels = images.shape
    if height < SHOWN:
        size = (round(width * SHOWN / height), SHOWN)
        planes = images.transpose(0, 3, 1, 2).reshape(-1, height, width)
        shown = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in planes])
        images = shown.reshape(count, channels, size[1], size[0]).transpose(0, 2, 3, 1)
        height, width = images.shape[1:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, columns * width, channels)
