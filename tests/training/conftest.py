import pytest

from gen.kinds import KINDS
from tests.training import scripts


@pytest.fixture(autouse=True)
def _toy_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys go through JSON like any task: registered for these tests only."""
    monkeypatch.setitem(KINDS, "toy", scripts.TOYS)
