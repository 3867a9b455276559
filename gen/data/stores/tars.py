"""Tar shards in the WebDataset layout: KEY.jpg with KEY.cls, KEY.json or KEY.npy beside, in one or many files.

A name is KEY and one ending, so that keys may hold dots (n01440764.10026.jpg). A file whose key goes on after that of
another image (s.mask.png beside s.jpg) is a further field of that sample, as WebDataset names them: it is left out and
said, unless it has a label of its own. A label also belongs to the one image whose key goes on after it (s.image.jpg
with s.cls).
"""

import contextlib
import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen.data.stores.arrays import npy
from gen.data.stores.base import MAX_FILE, Store, some_bytes, targets
from gen.data.stores.classes import Classes, of_folders, renamed
from gen.data.stores.strays import is_image, is_stray, said, sorted_out
from gen.errors import GenError
from gen.files import atomic, reading

__all__ = ["open_tars"]

VERSION = 2  # of what `_scan` finds, in the index that is kept beside a shard
MAX_FIELD = 64 << 20  # bytes of what lies beside an image: a .npy of 77 tokens takes 240 KB

Image = tuple[int, str, int, int]  # number of the shard, name, offset, bytes


def open_tars(path: Path, shards: list[Path]) -> Store:
    """Gives the images of one or more shards in their order; see `gen.data.stores.open_store`.

    Raises GenError for a shard that has become shorter since it was indexed.
    """
    images: list[Image] = []
    labels: list[int | None] = []
    texts: list[np.ndarray | None] = []
    ignored: list[str] = []
    inner: list[str] = []
    files = [open(shard, "rb") for shard in shards]  # noqa: SIM115 - stay open as long as the store

    def bytes_at(number: int, offset: int, size: int) -> bytes:
        with reading(shards[number]):
            data = os.pread(files[number].fileno(), size, offset)
        if len(data) != size:
            raise GenError(f"{shards[number]} is shorter than when it was indexed; copy it again")
        return data

    for number, shard in enumerate(shards):
        prefix = f"{shard.name}/" if len(shards) > 1 else ""
        found = _index(shard)
        ignored += [prefix + name for name in found["ignored"]]
        for name, offset, size, label, text in found["images"]:
            images.append((number, prefix + name, offset, size))
            inner.append(name)
            labels.append(label)
            title = f"{shard}:{name}, its .npy"
            texts.append(text and npy(io.BytesIO(bytes_at(number, *text)), text[1], title, text[1]))
    names = [name for _, name, _, _ in images]

    def read(index: int) -> bytes:
        number, _, offset, size = images[index]
        return bytes_at(number, offset, size)

    classes = of_folders(inner, str(path)) if all(label is None for label in labels) else Classes()
    given: tuple[tuple[str, Sequence[Any]], ...] = (("label", labels), ("text", texts))
    for what, values in given:
        if any(value is not None for value in values):
            classes = dataclasses.replace(classes, **_targets(str(path), what, names, values))
    if path.is_dir() and (listed := path / "classes.txt").exists():
        with reading(listed):
            classes = renamed(classes, listed.read_bytes(), str(path))
    return Store(
        str(path),
        names,
        read,
        **classes.known(),
        ignored=ignored,
        notes=[*said(ignored, str(path)), *classes.notes],
        content=f"{[image[3] for image in images]} {some_bytes(read, len(names))}",
    )


def _targets(where: str, what: str, names: list[str], values: Sequence[Any]) -> dict[str, Any]:
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise GenError(
            f"{where} has no {what} for {len(missing)} images, the first {missing[0]}; give one to all, or to none"
        )
    return targets(values, lambda row: f"{where}:{names[row]}")


def _index(shard: Path) -> dict[str, Any]:
    """What `_scan` finds. Kept beside the shard, where the folder takes it."""
    found = os.stat(shard)
    tag = [VERSION, found.st_size, found.st_mtime_ns]
    kept = shard.with_name(f".{shard.name}.index.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or another version's: indexed again
        index = json.loads(kept.read_text())
        if index["tag"] == tag:
            return {"images": list(index["images"]), "ignored": list(index["ignored"])}
    index = _scan(shard, found.st_size)
    text = json.dumps({"tag": tag, **index}).encode()
    with contextlib.suppress(GenError):  # a folder that is only read is indexed each time
        atomic(kept, lambda file: file.write(text))
    return index


def _scan(shard: Path, length: int) -> dict[str, Any]:
    """ "images": [[name, offset, bytes, class or None, [offset, bytes] of its .npy or None]]; "ignored": names."""
    images: dict[str, list[Any]] = {}
    labels: dict[str, int] = {}
    texts: dict[str, list[int]] = {}
    others: list[str] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name, (key, extension) = member.name, os.path.splitext(member.name)
                if member.isdir():
                    continue
                if is_stray(name):
                    others.append(name)
                elif not member.isreg() or member.sparse is not None:
                    if is_image(name):
                        raise GenError(f"{shard}:{name} is a link or no plain file; pack the files themselves (tar -h)")
                    others.append(name)
                elif member.offset_data + member.size > length:
                    raise GenError(f"{shard} ends within {name}; copy it again")
                elif is_image(name):
                    if member.size > MAX_FILE:
                        raise GenError(f"{shard}:{name} has {member.size} bytes; expected at most {MAX_FILE}")
                    if key in images:
                        raise GenError(f"{shard} has two images for the key {key}; give each its own name")
                    images[key] = [name, member.offset_data, member.size]
                elif extension.lower() == ".npy" and member.size <= MAX_FIELD:
                    texts[key] = [member.offset_data, member.size]
                elif extension.lower() in (".cls", ".json") and member.size <= MAX_FIELD:
                    file = archive.extractfile(member)
                    label = _label(file.read() if file else b"", extension.lower(), f"{shard}:{name}")
                    if label is not None and labels.setdefault(key, label) != label:
                        raise GenError(f"{shard}:{name} says {label}, another file of the key {labels[key]}; keep one")
                else:
                    others.append(name)
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise GenError(f"{shard} is no readable tar ({error}); copy or make it again") from None
    _, ignored = sorted_out(others, str(shard))
    own = labels.keys() | texts.keys()
    further = [key for key in images if key not in own and any(shorter in images for shorter in _prefixes(key))]
    ignored += [images.pop(key)[0] for key in further]
    beside: tuple[Mapping[str, Any], ...] = (labels, texts)
    for values in beside:
        owners: dict[str, str] = {}
        for key, image in images.items():
            owner = next((one for one in (key, *_prefixes(key)) if one in values), None)
            image.append(None if owner is None else values[owner])
            if owner is not None and owners.setdefault(owner, key) != key:
                raise GenError(f"{shard} has two images for the key {owner}, {image[0]} and another; give each its own")
    return {"images": list(images.values()), "ignored": ignored}


def _prefixes(key: str) -> Iterable[str]:
    """Shorter keys that a key with dots goes on from, the longest first: a/s.b.c -> a/s.b, a/s."""
    folder, slash, base = key.rpartition("/")
    parts = base.split(".")
    return (folder + slash + ".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))


def _label(data: bytes, extension: str, name: str) -> int | None:
    try:
        if extension == ".cls":
            return int(data.decode().strip())
        found = json.loads(data)
        label = found.get("label") if isinstance(found, dict) else None
        if label is not None and type(label) is not int:
            raise ValueError
        return label
    except (ValueError, TypeError, RecursionError):
        raise GenError(f"{name} is no label; expected a class number, from 0 on") from None
