"""Classes of image files: dataset.json, classes.txt, and folders with a class each (the table is in docs/data.md)."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from gen.data.stores.base import targets
from gen.errors import GenError

__all__ = ["MAX_JSON", "Classes", "of_dataset_json", "of_folders", "renamed"]

MAX_JSON = 1 << 16  # bytes of dataset.json per image: a vector of 4096 numbers; parsed it takes ten times as much
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is known of the images besides their pixels; the attributes are those of `gen.data.stores.base.Store`."""

    label: np.ndarray | None = None
    text: np.ndarray | None = None
    text_mask: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    unlabelled: str = ""

    def known(self) -> dict[str, Any]:
        """Gives the attributes as arguments of `Store`, without the notes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "notes"}


def of_dataset_json(data: bytes, names: Sequence[str], where: str) -> Classes:
    """Gives labels, or vectors, and names of classes of a dataset.json: {"labels": [[file, class or vector], ...] or
    null}.

    Raises GenError for another form, an image without a label, and a label without its image.
    """
    advice = 'expected {"labels": [[file, class], ...]}, write it again with gen data convert'
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise GenError(f"dataset.json of {where} is not valid JSON; {advice}") from None
    if not isinstance(found, dict):
        raise GenError(f"dataset.json of {where} is no object; {advice}")
    rows = found.get("labels")
    if rows is None:
        return Classes(unlabelled=" in its dataset.json")
    try:
        by_name = {str(file).replace("\\", "/"): value for file, value in rows}
    except (TypeError, ValueError):
        raise GenError(f"dataset.json of {where} has labels of another form; {advice}") from None
    missing = [name for name in names if name not in by_name]
    if missing:
        raise GenError(
            f"dataset.json of {where} has no label for {len(missing)} of {len(names)} images, the first "
            f"{missing[0]}; label all of them or none"
        )
    if len(by_name) > len(names):
        there = set(names)
        gone = [name for name in by_name if name not in there]
        raise GenError(
            f"dataset.json of {where} has labels for {len(gone)} images that are not there, the first {gone[0]}; "
            "restore them, or take them out of dataset.json"
        )
    names_of = found.get("class_names")
    if names_of is not None and not (isinstance(names_of, list) and all(isinstance(n, str) for n in names_of)):
        raise GenError(f"class_names in dataset.json of {where} are no list of names; {advice}")
    if not names:
        return Classes()
    known: dict[str, Any] = dict(targets([by_name[name] for name in names], lambda row: f"{where}:{names[row]}"))
    if "text" in known:
        return Classes(**known, unlabelled=f" but vectors of {known['text'].shape[-1]} numbers")
    return Classes(**known, class_names=tuple(names_of) if names_of else None)


def of_folders(names: Sequence[str], where: str) -> Classes:
    """Gives classes of images by the folders that they lie in, as docs/data.md tabulates.

    Args:
      names: of the images, with "/" between folders.
      where: how messages call the data.

    Raises GenError for folders that are splits (train, val) and no classes.
    """
    parts = [tuple(part for part in name.split("/") if part not in ("", ".", "..")) for name in names]
    if not parts:
        return Classes()
    beside = [name for name, part in zip(names, parts, strict=True) if len(part) == 1]
    if beside:
        inside = len(names) - len(beside)
        reason = f": {len(beside)} images lie beside the class folders, the first {beside[0]}"
        return Classes(notes=(f"{where}: no classes{reason}",), unlabelled=reason) if inside else Classes()
    notes: tuple[str, ...] = ()
    while True:
        tops = sorted({part[0] for part in parts})
        if all(top.lower() in SPLITS for top in tops):
            raise GenError(
                f"{where} holds {', '.join(tops)}, which are splits and no classes; give one of them "
                f"({where}/{tops[0]}), unpacked where it is an archive"
            )
        if len(tops) > 1 or any(len(part) < 3 for part in parts):
            break
        notes = (f"{where}: all images lie in {tops[0]}/; the folders within it are the classes",)
        parts = [part[1:] for part in parts]
    if all(_by_thousands(part[0], part[-1]) for part in parts):
        return Classes(unlabelled=": its folders only number the files by thousands")
    if all(top.isdecimal() for top in tops):
        tops.sort(key=lambda top: (int(top), top))
        if [int(top) for top in tops] != list(range(len(tops))):
            notes += (
                f"{where}: the class folders {tops[0]} to {tops[-1]} have the labels 0 to {len(tops) - 1}, in the "
                "order of their numbers",
            )
    number = {top: i for i, top in enumerate(tops)}
    return Classes(label=np.array([number[part[0]] for part in parts], np.int32), class_names=tuple(tops), notes=notes)


def _by_thousands(folder: str, file: str) -> bool:
    """Whether a file lies in the folder of its thousand: 00001/img00001234.png or 01000/01234.png."""
    digits = re.fullmatch(r"(?:img)?(\d{5,})", PurePosixPath(file).stem)
    if digits is None or not re.fullmatch(r"\d{5}", folder):
        return False
    thousand = int(digits[1]) // 1000
    return int(folder) in (thousand, 1000 * thousand)


def renamed(classes: Classes, data: bytes, where: str) -> Classes:
    """`classes` with the names of a classes.txt: one name a line, in the order of the labels.

    Raises GenError for a file that is no text, or has another number of names than there are classes.
    """
    try:
        lines = [line.strip() for line in data.decode().split("\n")]
    except ValueError:
        raise GenError(f"classes.txt of {where} is no text; expected one name a line, in the order of labels") from None
    while lines and not lines[-1]:
        lines.pop()
    if classes.label is None:
        return classes
    count = len(classes.class_names) if classes.class_names else int(classes.label.max()) + 1
    if len(lines) < count or (classes.class_names and len(lines) != count) or not all(lines):
        raise GenError(
            f"classes.txt of {where} has {sum(map(bool, lines))} names for {count} classes; expected one name a line, "
            "in the order of the labels"
        )
    return dataclasses.replace(classes, class_names=tuple(lines))
