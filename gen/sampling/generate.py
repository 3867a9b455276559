"""Images by the thousand: a generator as an indexed job that writes PNG files, a grid, an .npz or a .zip."""

import hashlib
import io
import json
import math
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from gen.errors import GenError
from gen.files import atomic, read_json, write_json, writing
from gen.sampling.generator import Generator, GeneratorParams
from gen.training.indexed import ArrayWriter, Writer, run_indexed, sample_keys

__all__ = ["contact_sheet", "generate", "quantise", "read_note"]

SHEET = 64  # images in the grid.png beside a folder of PNG files
SHOWN = 48  # smaller images are enlarged to this height in a contact sheet


def quantise(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] as uint8 levels, ``floor(clip(127.5 x + 128, 0, 255))``: the rounding of the official codes."""
    return jnp.floor(jnp.clip(127.5 * images + 128.0, 0.0, 255.0)).astype(jnp.uint8)


def generate(
    generator: Generator,
    params: GeneratorParams,
    *,
    seeds: range,
    out: str | Path,
    batch: int,
    labels: np.ndarray | None = None,
    cond: Mapping[str, np.ndarray] | None = None,
    mesh: Mesh | None = None,
    rule: str = "given",
    label: str = "sample",
) -> np.ndarray | None:
    """Makes one image per seed and writes them; image i depends on seeds[i] and its condition alone.

    The ending of `out` decides the form: ``.npz`` (``arr_0`` uint8 (N, H, W, C), ``arr_1`` labels), ``.zip`` (PNG
    files and dataset.json with labels, as EDM's datasets), ``.png`` (one contact sheet of all), anything else a
    folder of PNG files named by seed (000000.png ...) with samples.json and a contact sheet grid.png of the first 64.
    An interrupted job goes on where it was (a contact sheet starts again), and what is half-written never has the
    final name. Once all is there, the same call does nothing.

    Args:
      generator: see `gen.sampling.generator`.
      params: arrays by role.
      seeds: consecutive seeds.
      batch: global batch size; it does not change the images beyond rounding.
      labels: (N,) class labels, the condition ``label``; they are stored with the images.
      cond: further conditioning arrays by name, (N, ...).
      mesh: devices to share the work.
      rule: how the labels follow from the seeds, for the note that goes with the samples (`read_note`).
      label: text of the progress line; "" for none.

    Returns:
      for generators that measure their network calls, those of the images made now (n,); None for others, and on
      processes other than the first.

    Raises GenError for seeds that are not consecutive, conditions of another length, NaN images, an `out` that holds
    other samples, and a disk that does not take them.
    """
    cond = dict(cond or {}) | ({} if labels is None else {"label": np.asarray(labels, np.int32)})
    if not seeds or seeds.step != 1:
        raise GenError(f"seeds {seeds.start} to {seeds.stop} step {seeds.step}; expected one or more consecutive seeds")
    for name, values in cond.items():
        if len(values) != len(seeds):
            raise GenError(f"{len(values)} values of '{name}' for {len(seeds)} seeds; give one per seed")

    def make(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        del weight
        rows = {name: values[indices - seeds.start] for name, values in arguments["cond"].items()}
        given = arguments["params"], sample_keys(0, indices), rows
        images, calls = (generator(*given), None) if counted is None else counted(*given)
        made = {"arr_0": quantise(images), "image": jnp.abs(images).max(axis=(1, 2, 3))}
        made |= {} if calls is None else {"calls": calls}
        return made | ({"arr_1": rows["label"]} if "label" in rows else {})

    counted = getattr(generator, "counted", None)
    arguments = {"params": params, "cond": cond}
    # guidance without a null class and the like: told before anything is compiled or written
    one = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(make, arguments, *one)
    note = {
        "identity": _identity(generator, params, seeds, cond),
        "seeds": [seeds.start, seeds.stop - 1],
        "quantiser": "round",
        "rule": rule if "label" in cond else "none",
    }
    writer = _Counting(_writer(Path(out), seeds, cond.get("label"), note))
    run_indexed(
        make, len(seeds), batch=batch, writer=writer, arguments=arguments, start=seeds.start, mesh=mesh, label=label
    )
    return np.concatenate(writer.calls) if writer.calls else None


def _identity(generator: Any, params: Any, seeds: range, cond: Mapping[str, np.ndarray]) -> str:
    """Text that differs when the images would: of configuration, weights, seeds and conditions."""
    leaves, tree = jax.tree.flatten(params)
    digest = hashlib.sha256(f"{generator!r} {tree} {seeds}".encode())
    digest.update(np.asarray(_bit_sums(leaves)).tobytes())
    for name, values in sorted(cond.items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sums(leaves: list[jax.Array]) -> jax.Array:
    """One weighted sum of bit patterns per array, in integers: the same for any layout over devices."""

    def total(leaf: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, kind)
        bits = bits.astype(jnp.uint32).reshape(-1)
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return jnp.stack([total(jnp.asarray(leaf)) for leaf in leaves]) if leaves else jnp.zeros(0, jnp.uint32)


def read_note(path: str | Path) -> dict[str, Any] | None:
    """What `generate` noted beside samples: ``seeds`` [first, last], ``quantiser``, ``rule`` of labels, ``identity``.

    None for images that `generate` did not write.
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
    return note if known else None


def _writer(out: Path, seeds: range, labels: np.ndarray | None, note: dict[str, Any]) -> Writer:
    match out.suffix:
        case ".npz":
            return _Npz(ArrayWriter(out, len(seeds), note["identity"], note))
        case ".zip":
            return _Zip(out, seeds, labels, note)
        case ".png":
            return _Sheet(out)
        case _:
            return _Folder(out, seeds, labels, note)


class _Counting:
    """Keeps the measured network calls and hands on the rest."""

    def __init__(self, inner: Writer) -> None:
        self.inner, self.calls = inner, list[np.ndarray]()

    @property
    def next(self) -> int:
        return self.inner.next

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        self.calls += [arrays["calls"]] if "calls" in arrays else []
        self.inner.write(first, {name: rows for name, rows in arrays.items() if name != "calls"})

    def close(self) -> None:
        self.inner.close()


class _Npz:
    """Drops what was only there to be checked."""

    def __init__(self, inner: ArrayWriter) -> None:
        self.inner = inner

    @property
    def next(self) -> int:
        return self.inner.next

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        self.inner.write(first, {name: rows for name, rows in arrays.items() if name != "image"})

    def close(self) -> None:
        self.inner.close()


class _Sheet:
    """All images in one picture."""

    def __init__(self, path: Path) -> None:
        self.path, self.images, self.next = path, list[np.ndarray](), 0

    def write(self, first: int, arrays: dict[str, np.ndarray]) -> None:
        self.images.extend(arrays["arr_0"])
        self.next = first + len(arrays["arr_0"])

    def close(self) -> None:
        sheet = _png(contact_sheet(np.stack(self.images)))
        atomic(self.path, lambda file: file.write(sheet))


class _Folder:
    """A folder of PNG files named by seed; each appears whole."""

    def __init__(self, path: Path, seeds: range, labels: np.ndarray | None, about: dict[str, Any]) -> None:
        self.path, self.seeds = path, seeds
        note = path / "samples.json"
        if note.is_file():
            if read_json(note).get("identity") != about["identity"]:
                raise GenError(
                    f"{path} holds samples of another model, seeds or settings; choose another output folder"
                )
        elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise GenError(f"{path} exists and holds no samples of this program; choose another output folder")
        else:
            with writing(path):
                path.mkdir(parents=True, exist_ok=True)
            write_json(note, about | ({} if labels is None else {"labels": labels.tolist()}))
        there = {entry.name for entry in os.scandir(path)}
        self.next = next((i for i, seed in enumerate(seeds) if _name(seed) not in there), len(seeds))

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
            sheet = _png(contact_sheet(np.stack([self.image(seed) for seed in self.seeds[:SHEET]])))
            atomic(self.path / "grid.png", lambda file: file.write(sheet))

    def image(self, seed: int) -> np.ndarray:
        """(H, W, C) uint8 of a written seed."""
        with Image.open(self.path / _name(seed)) as image:
            array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array


class _Zip:
    """PNG files gather in a folder beside the archive, which appears when all are there."""

    def __init__(self, path: Path, seeds: range, labels: np.ndarray | None, note: dict[str, Any]) -> None:
        self.path, self.labels, self.note = path, labels, note
        self.partial = path.with_name(path.name + ".partial")
        self.folder: _Folder | None = None
        self.next = len(seeds)
        if not path.exists():
            self.folder = _Folder(self.partial, seeds, labels, note)
            self.next = self.folder.next
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
        names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(folder.seeds))]

        def pack(out: IO[bytes]) -> None:
            with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
                archive.comment = json.dumps(self.note).encode()
                for name, seed in zip(names, folder.seeds, strict=True):
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
    """Images (N, H, W, C) uint8 side by side, near square; small ones enlarged (Lanczos). (H', W', C) uint8."""
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
