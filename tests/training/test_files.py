import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gen import files
from gen.errors import GenError
from gen.files import RunLock, atomic, read_json, settle, write_json
from tests.processes import ended


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "deep" / "a.json") == {"x": [1, 2.5, None]}


def test_missing_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(GenError, match="cannot read"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(GenError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    atomic(path, lambda file: file.write(b"old"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(GenError, match=r"cannot write .*a\.bin: No space left on device; free space"):
        atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GenError, match="cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from gen.files import RunLock; RunLock(sys.argv[1]).__enter__()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with RunLock(tmp_path):
        ((status, said),) = ended(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    assert status == 1
    assert f"GenError: run folder {tmp_path} is in use by pid {os.getpid()}" in said
    with RunLock(tmp_path):
        pass


def test_a_finished_file_or_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "a.partial").write_bytes(b"whole")
    settle(tmp_path / "folder.partial", tmp_path / "folder")
    settle(tmp_path / "a.partial", tmp_path / "a")
    assert (tmp_path / "folder").is_dir()
    assert (tmp_path / "a").read_bytes() == b"whole"

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(GenError, match=r"cannot write .*b: No space left on device; free space"):
        settle(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
