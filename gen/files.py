"""Files that are whole or absent, one writer per folder, and errors a person can act on."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gen.errors import GenError

__all__ = ["RunLock", "atomic", "read_json", "reading", "settle", "write_json", "writing"]


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns an OSError of the block (lost disk, missing permission ...) into a GenError that names `path`."""
    try:
        yield
    except OSError as error:
        raise GenError(
            f"cannot read {path} ({error.strerror or error}); check that the disk or network folder is there, then "
            "start again"
        ) from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError of the block (full disk, read-only folder ...) into a GenError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise GenError(f"cannot write {path}: {reason}; free space or choose another output folder") from error


def atomic(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that a crash at any moment leaves the old content or the new, never a part.

    Args:
      path: the final name; its folder is made.
      write: called with a binary file open for writing, in the same folder.

    Raises:
      GenError: the folder or the disk does not take it; the temporary file is removed.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # mkstemp makes 0600; a run folder is meant to be read by others
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def settle(partial: str | Path, path: str | Path) -> None:
    """Gives a file, or a folder of whole files, that was written under the name `partial` its final name `path`.

    A file's bytes are on the disk before it has that name. Raises GenError when the disk does not take them.
    """
    with writing(path):
        if os.path.isfile(partial):
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: str | Path) -> Any:
    """Gives the content of a JSON file. Raises GenError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise GenError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise GenError(f"{path} is not valid JSON ({error}); restore it or start in another folder") from error


class RunLock:
    """One process trains in a folder: an advisory `flock`, which the system drops when the holder dies.

    Use as a context manager. Raises GenError when another process holds the folder, naming its pid.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise GenError(
                f"run folder {self.path.parent} is in use by pid {holder}; wait for it or choose another folder"
            ) from None
        with writing(self.path):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        self._file = file
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
