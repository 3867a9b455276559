"""No golden fixture lies unused: each folder is claimed by a test or stands in pending.txt."""

import fnmatch
import importlib

import numpy as np
import pytest

from tests.parity.conftest import CLAIMED, HERE, Fixture, listed, present


def _claimed() -> set[str]:
    for path in sorted(HERE.glob("test_*.py")):
        importlib.import_module(f"tests.parity.{path.stem}")
    return set(CLAIMED)


def _covered(name: str, patterns: set[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def test_every_folder_is_claimed_or_pending() -> None:
    patterns = _claimed() | listed("pending.txt")
    orphans = [p.name for p in present() if not _covered(p.name, patterns)]
    assert not orphans, f"no test claims {', '.join(orphans)}; write one or add to tests/parity/pending.txt"


def test_nothing_is_both_claimed_and_pending() -> None:
    claimed = _claimed()
    both = sorted(name for name in listed("pending.txt") if _covered(name, claimed))
    assert not both, f"claimed by a test and pending: {', '.join(both)}; remove from tests/parity/pending.txt"


def test_compact_set_has_every_claimed_system() -> None:
    """Without GEN_PARITY the tests run on one configuration of each, but for those left out: at most 20 MB in all."""
    folders = [p for p in (HERE / "fixtures").iterdir() if (p / "config.json").is_file()]
    left_out = listed("left_out.txt")
    names = [p.name for p in folders] + sorted(left_out)
    lacking = [c for c in sorted(_claimed()) if not any(fnmatch.fnmatchcase(name, c) for name in names)]
    assert not lacking, f"tests/parity/fixtures has nothing for {', '.join(lacking)}; add one configuration"
    assert not left_out & {p.name for p in folders}
    assert all((p / "README.md").is_file() for p in folders)
    assert sum(f.stat().st_size for p in folders for f in p.iterdir()) <= 20e6


def test_comparison_sees_what_it_should(tmp_path) -> None:
    fx = Fixture(tmp_path / "dit-forward")
    fx.io = {"a": np.array([1.0, 100.0]), "ids": np.array([1, 2]), "holes": np.array([np.nan, 1.0, -np.inf])}
    fx.close(np.array([1.005, 100.005], np.float32), "a")
    fx.close([np.nan, 1.0, -np.inf], "holes")
    fx.close([1, 2], "ids")
    for actual, name in (([1.0, 100.02], "a"), ([1.0], "a"), ([1, 3], "ids"), ([0.0, 1.0, -np.inf], "holes")):
        with pytest.raises(AssertionError):
            fx.close(np.array(actual), name)
    with pytest.raises(AssertionError):
        fx.close(np.array([np.nan, 100.0]), "a")
