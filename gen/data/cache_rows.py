"""Rows of a cache of encoded images as training reads them: checked, and of the mirror image where that is held."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gen.data.loader import Record
from gen.data.sources import ArraySource
from gen.errors import GenError

__all__ = ["FLIP", "MAKE_AGAIN", "CacheSource"]

FLIP = "_flip"  # ends the names of arrays of mirror images
MAKE_AGAIN = "make it again with gen encode, in another folder"


class CacheSource:
    """Rows of a cache by index, as training reads them.

    Args:
      rows: what is stored.
      name: the encoded array's name.
      read: encoded rows (B, ...) as stored -> as training takes them.
      good: those -> whether each row is as `seal` let it in, (B,) bool. Reading another raises GenError: the file was
        damaged since.
    """

    def __init__(
        self,
        rows: ArraySource,
        name: str,
        read: Callable[[np.ndarray], np.ndarray],
        good: Callable[[np.ndarray], np.ndarray],
    ):
        held = rows.arrays
        self.flips = {n: held[n + FLIP] for n in held if n + FLIP in held}
        kept = {n: array for n, array in held.items() if n.removesuffix(FLIP) not in self.flips or n in self.flips}
        self.rows = ArraySource(rows.class_names, **kept) if self.flips else rows
        self.name, self._read, self._good = name, read, good
        self.label, self.class_names, self.num_classes = rows.label, rows.class_names, rows.num_classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        record = self.rows[index]
        return record | {self.name: self._checked(record[self.name][None], [index])[0]}

    def gather(self, indices: np.ndarray) -> Record:
        """Gives rows `indices` (B,) of every array."""
        record = self.rows.gather(indices)
        return record | {self.name: self._checked(record[self.name], indices)}

    def mirrored(self, indices: np.ndarray, which: np.ndarray) -> Record:
        """Gives rows `indices` (B,) of every array, of the mirror images where `which` (B,) bool says so."""
        record = self.rows.gather(indices)
        for name, array in self.flips.items():
            record[name][which] = array[indices[which]]
        return record | {self.name: self._checked(record[self.name], indices)}

    def title(self, index: int) -> str:
        """Tells how messages call record `index`: by the folder."""
        folders = sorted({str(Path(file).parent) for file in self.rows.files})
        return f"row {index} of {', '.join(folders) or 'arrays in memory'}"

    def _checked(self, stored: np.ndarray, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            values = self._read(stored)
        good = self._good(values)
        if not good.all():
            raise GenError(
                f"the {self.name} of {self.title(int(indices[int(np.argmin(good))]))} is NaN, infinite or out of "
                f"range; it was not when it was encoded, so the file is damaged: {MAKE_AGAIN}"
            )
        return values
