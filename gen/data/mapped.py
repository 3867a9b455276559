"""Memory-mapped files that may go away: looked at before they are read."""

import os
from collections.abc import Mapping

import numpy as np

from gen.errors import GenError

__all__ = ["mapped_files", "still_there"]


def mapped_files(*arrays: np.ndarray) -> dict[str, int]:
    """Files that memory-mapped arrays lie in, with the bytes that each must have."""
    files: dict[str, int] = {}
    for array in arrays:
        base = array if isinstance(array, np.memmap) else array.base
        if isinstance(base, np.memmap) and base.filename is not None:
            path = str(base.filename)
            files[path] = max(files.get(path, 0), base.offset + base.nbytes)
    return files


def still_there(files: Mapping[str, int]) -> None:
    """Raises GenError where a mapped file is gone or shorter: reading what is missing would kill the process."""
    for path, length in files.items():
        try:
            found = os.stat(path).st_size
        except OSError as error:
            reason = error.strerror or error
            raise GenError(
                f"cannot read {path} ({reason}); check that the disk or network folder is there, then start again"
            ) from None
        if found < length:
            raise GenError(f"{path} has {found} bytes, {length} when it was opened; restore it, then start again")
