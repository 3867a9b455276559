"""Zip archives of image files: EDM's and StyleGAN's layout, or folders with a class each.

Two members of one name are refused, since only one of them would be read. Archives within are left out, and said.
"""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

from gen.data.stores.base import MAX_FILE, Store
from gen.data.stores.classes import MAX_JSON, of_dataset_json, of_folders, renamed
from gen.data.stores.strays import said, sorted_out
from gen.errors import GenError
from gen.files import reading

__all__ = ["open_zip"]


def open_zip(path: Path) -> Store:
    """Gives the images in a zip in the order of their names; see `gen.data.stores.open_store`.

    Raises GenError for a file that is no zip, or holds two files of one name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            listed = [info for info in archive.infolist() if info.filename and info.filename[-1] not in "/\\"]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise GenError(f"{path} is no readable zip ({error}); copy or make it again") from None
    paths = [info.filename.replace("\\", "/") for info in listed]  # some programs on Windows write them so
    members = dict(zip(paths, listed, strict=True))
    if len(members) < len(listed):
        twice = next(place for place, info in zip(paths, listed, strict=True) if members[place] is not info)
        raise GenError(f"{path} holds two files {twice}; pack it again with one file of each name")
    file = open(path, "rb")  # noqa: SIM115 - stays open as long as the store
    names, ignored = sorted_out(sorted(members), str(path))

    def read(index: int) -> bytes:
        return _member(file, path, members[names[index]], MAX_FILE)

    limit = MAX_JSON * (16 + len(names))
    if "dataset.json" in members:
        classes = of_dataset_json(_member(file, path, members["dataset.json"], limit), names, str(path))
    else:
        classes = of_folders(names, str(path))
    if "classes.txt" in members:
        classes = renamed(classes, _member(file, path, members["classes.txt"], limit), str(path))
    return Store(
        str(path),
        names,
        read,
        **classes.known(),
        ignored=ignored,
        notes=[*said(ignored, str(path)), *classes.notes],
        content=f"{[members[name].CRC for name in names]}",
    )


def _member(file: io.BufferedReader, path: Path, info: zipfile.ZipInfo, limit: int) -> bytes:
    """One member's bytes, at a given place: unlike `zipfile`, without a shared file position."""
    name = f"{path}:{info.filename}"
    bad = GenError(f"{name} is damaged in the zip; copy the archive again")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise GenError(f"{name} is encrypted or compressed in a rare way; pack the archive again, stored or deflated")
    if max(info.file_size, info.compress_size) > limit:
        raise GenError(f"{name} has {info.file_size} bytes; expected at most {limit}, leave it out")
    with reading(path):
        head = os.pread(file.fileno(), 30, info.header_offset) if info.header_offset >= 0 else b""
        if len(head) < 30 or head[:4] != b"PK\3\4":
            raise bad
        start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        data = os.pread(file.fileno(), info.compress_size, start)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, info.file_size + 1)
        except zlib.error:
            raise bad from None
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise bad
    return data
