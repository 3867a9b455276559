"""ArrayRecord files, as ``gen data convert`` writes them."""

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from gen.data.stores.base import Store, targets
from gen.errors import GenError

__all__ = ["open_array_record"]


def open_array_record(path: Path) -> Store:
    """Gives records of a line of JSON ({"name", "label"}) and the image file's bytes.

    The native reader is used without `ArrayRecordDataSource`, which starts 64 Python threads to count records; where
    memory is limited one of them may not come up, and it waits for that one for ever.

    Raises GenError for a file that is empty or cannot be read, a missing package array_record, and a store that a
    forked process uses.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise GenError(f"{path} needs the package array_record; pip install array_record") from None
    with open(path, "rb"):
        pass  # a missing permission is said in Python's words
    if not path.stat().st_size:
        raise GenError(f"{path} is empty; copy or make it again")
    lock, process = threading.Lock(), os.getpid()
    damaged = (RuntimeError, ValueError, IndexError)

    def record(index: int) -> bytes:
        if os.getpid() != process:  # its threads did not come along, and it would wait for them for ever
            raise GenError(f"{path} was opened before this process was forked; start worker processes by spawn")
        with lock:
            return bytes(reader.read([index])[0])

    try:
        reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768)
        heads = [_record_head(record(i), path) for i in range(reader.num_records())]
    except damaged as error:
        raise GenError(f"{path} is no readable ArrayRecord ({error}); copy or make it again") from None
    names = [head["name"] for head, _ in heads]
    labels = [head.get("label") for head, _ in heads]

    def read(index: int) -> bytes:
        try:
            return record(index).partition(b"\n")[2]
        except damaged as error:
            raise GenError(f"{path} record {index} cannot be read ({error}); copy the file again") from None

    def title(row: int) -> str:
        return f"{path}:{names[row]}"

    found = targets(labels, title) if any(label is not None for label in labels) else {}
    class_names = heads[0][0]["class_names"] if heads else None
    content = " ".join(digest for _, digest in heads)
    return Store(str(path), names, read, **found, class_names=class_names, content=content)


def _record_head(record: bytes, path: Path) -> tuple[dict[str, Any], str]:
    try:
        head = json.loads(record.partition(b"\n")[0])
        names = head.get("class_names")
        known = {"name": str(head["name"]), "label": head.get("label"), "class_names": names and tuple(map(str, names))}
        return known, f"{zlib.crc32(record):08x}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GenError(f"{path} has records of another layout; expected those of gen data convert") from None
