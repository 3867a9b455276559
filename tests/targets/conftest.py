"""Presets compiled for TPUs and GPUs that are not here; ``make test-targets`` runs them, minutes for each.

Elsewhere, where the compilers' wheels are not installed, only what needs none of them is collected.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).with_name("recorded.json")
INSTALLED = all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))
if not INSTALLED:
    collect_ignore = ["test_attention.py", "test_compiled.py"]
else:
    from gen.training.targets import prepare

    prepare()  # before a test imports jax


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names the rows of the table that nobody has recorded yet: nothing is known of them."""
    if not INSTALLED:
        return
    from tests.targets.cases import CASES

    missing = [case.name for case in CASES if case.name not in json.loads(RECORDED.read_text())]
    terminalreporter.section(f"not recorded: {len(missing)} of {len(CASES)} rows (python -m tests.targets.record)")
    for name in missing:
        terminalreporter.line(name)


@pytest.fixture(scope="session")
def recorded() -> dict[str, dict[str, Any]]:
    """What was recorded, by the case's name."""
    found: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text())
    return found
