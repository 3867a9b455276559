import pytest

from gen.config import KINDS


@pytest.fixture(autouse=True)
def _toy_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys go through JSON like any task: registered for these tests only."""
    rows = {"toy-task": "tests.training.toy:ToyTask", "toy-data": "tests.training.toy:ToyData"}
    monkeypatch.setitem(KINDS, "toy", rows)
