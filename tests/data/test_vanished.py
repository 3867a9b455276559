"""Data that go away, stall or find no room in the middle of training and of encoding, through the commands.

Each is one line and another status than 0; the same command again, once all is well, ends as if nothing had happened.
"""

import errno
import itertools
import json
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import gen
from gen.cli import main
from gen.data import vanished
from gen.experiments import quickstart_cifar10
from gen.training.checkpoints import Checkpoints
from tests.data.conftest import STEPS, train
from tests.test_quickstart import TOY


@pytest.fixture
def place(toy_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The undisturbed: a folder with data, a run and its latents."""
    monkeypatch.setattr(quickstart_cifar10, "SMOKE", TOY)
    assert main(encode(toy_tokenizer, toy_tokenizer / "latents")) == 0  # which the first test makes
    return toy_tokenizer


def encode(place: Path, out: Path) -> list[str]:
    return ["encode", str(place / "run"), "--data", str(place / "a.zip"), "--out", str(out), "--batch", "8"]


def trained(run: Path) -> dict[str, bytes]:
    """Logged losses and the weights' bytes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {f"loss {row['step']}": str(row["loss"]).encode() for row in rows if "loss" in row}
    assert len(losses) == STEPS
    leaves = jax.tree_util.tree_leaves_with_path(gen.load(run).params)
    return losses | {jax.tree_util.keystr(name): np.asarray(leaf).tobytes() for name, leaf in leaves}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


COMMANDS: dict[str, tuple[Callable[[Path, Path], list[str]], Callable[[Path], dict[str, bytes]], str]] = {
    "train": (train, trained, "run"),
    "encode": (encode, files, "latents"),
}


def lost(after: int, reason: Callable[[], None]) -> Callable[[int, int, int], bytes]:
    """`os.pread`, by which zips are read, that does something else after so many reads."""
    numbers, read = itertools.count(), os.pread

    def pread(file: int, size: int, offset: int) -> bytes:
        if next(numbers) >= after:
            reason()
        return read(file, size, offset)

    return pread


def gone() -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_vanishes_is_named_and_the_work_goes_on_when_it_is_back(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, content, whole = COMMANDS[command]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lost(100, gone))  # two reads per image, and one for the labels
        assert main(arguments(place, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: cannot read {place / 'a.zip'} (Stale file handle); check that the disk or network")
    (place / "a.zip").rename(place / "b.zip")
    assert main(arguments(place, tmp_path / "out")) == 2
    assert "no data at" in capsys.readouterr().err
    (place / "b.zip").rename(place / "a.zip")
    kept = any((tmp_path / "out" / "checkpoints").glob("[0-9]*"))  # the reader is ahead of the steps, by chance of all
    assert main(arguments(place, tmp_path / "out")) == 0
    assert ("steps done" in "".join(capsys.readouterr())) == kept
    assert content(tmp_path / "out") == content(place / whole)


@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.slow), "encode"])
def test_a_read_that_never_returns_is_named(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, content, whole = COMMANDS[command]
    answer = threading.Event()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", lost(100, lambda: answer.wait() and None))
            patch.setattr(vanished, "STALL", 1.0)
            assert main(arguments(place, tmp_path / "out")) == 2
    finally:
        answer.set()  # lets the thread end
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: no data for 1 s, while reading {place / 'a.zip'}:00000/img")
    assert main(arguments(place, tmp_path / "out")) == 0
    assert content(tmp_path / "out") == content(place / whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop
def test_a_disk_that_fills_during_a_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system refuses every write beyond a few bytes per file, from the second checkpoint on."""
    before, check = resource.getrlimit(resource.RLIMIT_FSIZE), Checkpoints._check_room

    def full(self: Checkpoints, *args: object) -> None:
        check(self, *args)  # which sees room
        if self.steps():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "_check_room", full)
            status = main(train(place, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert said.startswith("error: cannot save checkpoint ")
    assert "earlier checkpoints stand, free space" in said
    assert main(train(place, tmp_path / "out")) == 0
    assert trained(tmp_path / "out") == trained(place / "run")


def test_a_disk_that_fills_during_encoding(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(encode(place, tmp_path / "out")) == 2
    assert "No space left on device; free space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(encode(place, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(place / "latents")
