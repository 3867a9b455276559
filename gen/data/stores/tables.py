"""Hugging Face data sets: tables with a column of images.

Of several columns of images, one must be named, since the others may be masks or edits; likewise of several columns of
classes (ClassLabel). Without such a column, whole numbers under "label" or "labels" are the classes, and lists of
numbers (or of lists of numbers, one for each token) under "text" or "embedding" the text.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen.data.stores.base import Store, targets
from gen.errors import GenError
from gen.files import reading

__all__ = ["open_table"]


def open_table(place: str) -> Store:
    """Gives the images of hf:NAME, hf:NAME:SPLIT, hf:NAME:SPLIT:IMAGES or hf:NAME:SPLIT:IMAGES:LABELS (two columns).

    Raises GenError for a name that cannot be read, a data set that cannot be loaded or has no images, and a missing
    package.
    """
    parts = re.fullmatch(r"hf:([^:]+)(?::([^:]+))?(?::([^:]+))?(?::([^:]+))?", place)
    if not parts:
        raise GenError(
            f"'{place}' names no data set; write hf:NAME, hf:NAME:SPLIT, or hf:NAME:SPLIT:IMAGES:LABELS with the names "
            "of columns"
        )
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise GenError(f"{place} needs an extra package; pip install 'gen-image[hf-datasets]'") from None
    name, split, images, labels = parts[1], parts[2] or "train", parts[3], parts[4]
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, names, permissions: the library has its own errors for each
        raise GenError(f"cannot load {place} ({' '.join(str(error).split())[:160]}); check name and network") from None
    kinds = {column: type(kind).__name__ for column, kind in rows.features.items()}
    column = _column(place, "images", images, kinds, [c for c, kind in kinds.items() if kind == "Image"])
    if column is None:
        raise GenError(f"{place} has no column of images; it has {', '.join(kinds)}")
    of_classes = _column(place, "classes", labels, kinds, [c for c, kind in kinds.items() if kind == "ClassLabel"])
    return _store(place, rows.cast_column(column, datasets.Image(decode=False)), column, of_classes, kinds)


def _column(place: str, what: str, named: str | None, kinds: dict[str, str], fitting: Sequence[str]) -> str | None:
    """The column that is named, or the only one that fits; None where none does."""
    if named is not None:
        if named not in kinds:
            raise GenError(f"{place} has no column '{named}'; it has {', '.join(kinds)}")
        return named
    if len(fitting) > 1:
        raise GenError(
            f"{place} has several columns of {what}: {', '.join(fitting)}; name the one that is meant, "
            "hf:NAME:SPLIT:IMAGES:LABELS"
        )
    return fitting[0] if fitting else None


def _store(place: str, rows: Any, column: str, of_classes: str | None, kinds: dict[str, str]) -> Store:
    names = [f"{i:08d}" for i in range(len(rows))]

    def title(index: int) -> str:
        return f"{place}:{names[index]}"

    def read(index: int) -> bytes:
        with reading(place):
            cell = rows[index][column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise GenError(f"{title(index)} has no image; leave it out")
        with reading(cell["path"]):
            return Path(cell["path"]).read_bytes()

    known: dict[str, Any] = {}
    class_names = None
    if of_classes is not None:
        if kinds[of_classes] == "ClassLabel":
            class_names = tuple(rows.features[of_classes].names)
        known = targets(list(rows[of_classes]), title) if names else {}
    else:
        plain = [c for c in ("label", "labels", "text", "embedding") if kinds.get(c) in ("Value", "Sequence", "List")]
        values = next((v for v in (list(rows[c]) for c in plain) if v and not isinstance(v[0], str)), None)
        known = targets(values, title) if values else {}
    fingerprint = f"{getattr(rows, '_fingerprint', '')}"
    return Store(place, names, read, **known, class_names=class_names, content=fingerprint)
