"""Folders of image files. Links are followed; a link to nothing, and what is no regular file, is refused by name."""

import dataclasses
import os
import stat
from pathlib import Path

from gen.data.stores.base import MAX_FILE, Store, some_bytes
from gen.data.stores.classes import Classes, of_dataset_json, of_folders, renamed
from gen.data.stores.strays import is_image, is_stray, said, sorted_out
from gen.errors import GenError
from gen.files import reading

__all__ = ["open_folder"]


def open_folder(path: Path) -> Store:
    """Gives the image files below `path` in the order of their names; see `gen.data.stores.open_store`.

    Raises GenError for a file that is too large to be an image.
    """
    names, ignored = sorted_out(_files(path), str(path))
    names.sort()

    def read(index: int) -> bytes:
        with reading(path / names[index]), open(path / names[index], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise GenError(f"{path / names[index]} has {size} bytes; expected at most {MAX_FILE}, leave it out")
            return file.read()

    sizes = [_size(path / name) for name in names]
    classes = _classes(path, names)
    return Store(
        str(path),
        names,
        read,
        **classes.known(),
        ignored=sorted(ignored),
        notes=[*said(ignored, str(path)), *classes.notes],
        content=f"{sizes} {some_bytes(read, len(names))}",
    )


def _files(path: Path) -> list[str]:
    """All files below `path`, with "/" between folders; folders that are strays are listed and not entered."""
    files: list[str] = []
    # The keys of a folder and of those around it, to see a link that leads back up.
    inside: dict[str, tuple[tuple[int, int], ...]] = {str(path): (_key(path),)}

    def failed(error: OSError) -> None:
        raise GenError(
            f"cannot read {error.filename} ({error.strerror}); check its permissions, or move it out of the data"
        ) from None

    for folder, folders, here in os.walk(path, onerror=failed, followlinks=True):
        place = Path(folder).relative_to(path)
        around = inside.pop(folder)
        for name in sorted(folders):
            if is_stray(name):
                files.append(f"{(place / name).as_posix()}/")
                folders.remove(name)
                continue
            key = _key(Path(folder, name))
            if key in around:
                raise GenError(f"{Path(folder, name)} is a link to a folder that it lies in; remove the link")
            inside[os.path.join(folder, name)] = (*around, key)
        folders.sort()
        for name in here:
            if not is_image(name) and not is_stray(name) and os.path.islink(os.path.join(folder, name)):
                _size(Path(folder, name))  # a class folder may be behind a link to nothing
            files.append((place / name).as_posix())
    return files


def _key(folder: Path) -> tuple[int, int]:
    with reading(folder):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


def _size(file: Path) -> int:
    """Bytes of a file. Raises GenError for a link to nothing, and for what is no file."""
    try:
        found = os.stat(file)
    except OSError as error:
        if os.path.islink(file):
            target = os.readlink(file)
            raise GenError(f"{file} is a link to {target}, which is not there; restore or remove it") from None
        raise GenError(f"cannot read {file} ({error.strerror}); check the disk, then start again") from None
    if not stat.S_ISREG(found.st_mode):
        raise GenError(f"{file} is no regular file; move it out of the data")
    return found.st_size


def _classes(path: Path, names: list[str]) -> Classes:
    described, listed = path / "dataset.json", path / "classes.txt"
    with reading(path):
        if described.exists():
            classes = of_dataset_json(described.read_bytes(), names, str(path))
        else:
            classes = of_folders(names, str(path))
            tops = {name.split("/")[0] for name in names}
            empty = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in tops and not is_stray(p.name))
            if empty and classes.class_names:
                note = f"{path}: no images in {', '.join(empty[:3])}: {len(empty)} folders get no label"
                classes = dataclasses.replace(classes, notes=(*classes.notes, note))
        return renamed(classes, listed.read_bytes(), str(path)) if listed.exists() else classes
