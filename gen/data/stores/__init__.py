"""Where image files lie: folders, EDM and StyleGAN zips, tar shards, ArrayRecord, npz and npy, read by index.

`open_store` tells them apart by name and content. Nothing in a file is executed, no name inside an archive becomes a
path on disk, and sizes are checked before memory is taken. What is no image of the data is never counted in silence:
each kind of stray is read, left out and said, or refused by name (docs/data.md).
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from gen.data.stores.array_record import open_array_record
from gen.data.stores.arrays import load_arrays, open_arrays
from gen.data.stores.base import MAX_FILE, ArrayStore, Store
from gen.data.stores.folders import open_folder
from gen.data.stores.strays import EXTENSIONS, is_image
from gen.data.stores.tables import open_table
from gen.data.stores.tars import open_tars
from gen.data.stores.zips import open_zip
from gen.errors import GenError

__all__ = ["EXTENSIONS", "MAX_FILE", "ArrayStore", "Store", "load_arrays", "open_store"]

PACKED = (".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar")


def open_store(path: str | Path) -> Store:
    """Gives the images at `path`; what is left out of them is said once on stderr.

    - a folder: image files below it in the order of their names, links followed; classes from ``dataset.json`` or,
      without it, a class per folder (`gen.data.stores.classes`). A folder of .tar files: shards.
    - .zip: EDM's and StyleGAN's layout, or folders with a class each; classes (or vectors) from ``dataset.json``.
    - .tar: one WebDataset shard: KEY.jpg with KEY.cls (a number), KEY.json ({"label": n}) or KEY.npy (text).
    - .npz and .npy: uint8 (N, H, W, C) or (N, H, W); in an npz as image, images or arr_0, with label, labels or arr_1,
      or text and text_mask (`gen.data.text`).
    - .array_record: as ``gen data convert`` writes it.
    - hf:NAME or hf:NAME:SPLIT: a Hugging Face data set (needs the extra hf-datasets).

    The first four take the names of classes, one a line, from a file ``classes.txt`` beside the images or shards.

    Raises:
      GenError: nothing there, no images in it, a damaged container, labels that do not fit the images.
    """
    text = str(path)
    store = open_table(text) if text.startswith("hf:") else _local(Path(path))
    if not len(store):
        others = ", ".join(list(store.ignored)[:3])
        raise GenError(
            f"no images in {path}; expected files such as {', '.join(EXTENSIONS[:4])}, check the path"
            + (f" (it has {others})" if others else "")
        )
    _ = store.num_classes  # names that do not cover the labels are refused
    for note in store.notes:
        _say(note)
    return store


def _local(path: Path) -> Store:
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise GenError(f"no data at {path}; expected a folder, .zip, .tar, .npz, .npy or .array_record")
        kinds: dict[str, Callable[[Path], Store]] = {
            ".zip": open_zip,
            ".tar": lambda p: open_tars(p, [p]),
            ".npz": open_arrays,
            ".npy": open_arrays,
            ".array_record": open_array_record,
        }
        if path.suffix.lower() not in kinds:
            advice = "; unpack it" if path.suffix.lower() in PACKED else ""
            raise GenError(f"{path} is no known kind of data; expected a folder or {', '.join(kinds)}{advice}")
        return kinds[path.suffix.lower()](path)
    except OSError as error:
        raise GenError(f"cannot read {path} ({error.strerror or error}); check the path and its permissions") from None


def _folder(path: Path) -> Store:
    """Shards where a folder holds .tar files and no images, else its images."""
    shards = sorted(shard for shard in path.glob("*.tar") if not shard.name.startswith("."))
    if not shards:
        return open_folder(path)
    beside = next((entry for entry in sorted(path.iterdir()) if entry.is_dir() or is_image(entry.name)), None)
    if beside is not None:
        images = open_folder(path)
        if len(images):
            raise GenError(
                f"{path} holds tar shards ({shards[0].name}) and image files ({images.names[0]}); only one of them can "
                "be the data: move the others out, or name one shard"
            )
    return open_tars(path, shards)


@functools.cache
def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)
