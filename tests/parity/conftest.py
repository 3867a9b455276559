"""Golden fixtures: folders `<system>-<what>` with README.md, config.json, io.npz and often weights.safetensors.

The folder is named by the environment variable GEN_PARITY; without it the compact set beside this file is used.
Everything a test needs to know about a configuration comes from the fixture's config.json: the same tests run on
other configurations of the same systems.
"""

import fnmatch
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity.tolerances import tolerance

HERE = Path(__file__).parent
CLAIMED: set[str] = set()  # patterns for which a test has asked, see test_claims.py


def folder() -> Path:
    """Where the fixtures lie."""
    return Path(os.environ.get("GEN_PARITY") or HERE / "fixtures")


class Fixture:
    """One fixture folder; arrays are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return json.loads((self.path / "config.json").read_text())

    @functools.cached_property
    def io(self) -> dict[str, np.ndarray]:
        """Inputs and expected outputs by name."""
        with np.load(self.path / "io.npz") as file:
            return {name: file[name] for name in file.files}

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The official state dict."""
        return load_file(self.path / "weights.safetensors")

    def close(
        self, actual: Any, expected: str | np.ndarray, *, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Asserts ``|actual - expected| <= atol + rtol max|expected|``; integers and booleans must be equal.

        `expected` is an array or the name of one in `io`. Tolerances come from the table in tolerances.py (by
        fixture and array name) unless given. Non-finite entries must be the same on both sides.
        """
        name = expected if isinstance(expected, str) else ""
        expected = self.io[expected] if isinstance(expected, str) else np.asarray(expected)
        actual = np.asarray(actual)
        where = f"{self.name}:{name}"
        assert actual.shape == expected.shape, f"{where} has shape {actual.shape}; expected {expected.shape}"
        if expected.dtype.kind in "biu":
            wrong = int((actual != expected).sum())
            assert wrong == 0, f"{where}: {wrong} of {expected.size} entries differ"
            return
        own_rtol, own_atol = tolerance(self.name, name)
        rtol, atol = own_rtol if rtol is None else rtol, own_atol if atol is None else atol
        kind = np.promote_types(np.promote_types(actual.dtype, expected.dtype), np.float64)
        actual, expected = actual.astype(kind), expected.astype(kind)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=where)
        scale = float(np.abs(expected[finite]).max(initial=0.0))
        error = float(np.abs(actual[finite] - expected[finite]).max(initial=0.0))
        limit = atol + rtol * scale
        assert error <= limit, f"{where}: largest error {error:.3g} > {limit:.3g} (largest magnitude {scale:.3g})"


@functools.cache
def _fixture(path: Path) -> Fixture:
    return Fixture(path)


def fixtures(*patterns: str) -> list[Fixture]:
    """All fixtures whose folder name matches one of the patterns (fnmatch); records the claim."""
    CLAIMED.update(patterns)
    return [_fixture(p) for p in present() if any(fnmatch.fnmatchcase(p.name, pattern) for pattern in patterns)]


def present() -> list[Path]:
    """Every fixture folder."""
    root = folder()
    return sorted(p for p in root.iterdir() if (p / "config.json").is_file()) if root.is_dir() else []


def listed(name: str) -> set[str]:
    """Folders named in pending.txt (no test covers them yet) or left_out.txt (too large for the compact set)."""
    lines = (HERE / name).read_text().splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


@pytest.fixture(autouse=True)
def _highest_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield
