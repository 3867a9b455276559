"""Every method from every teacher: it trains, and its student makes images.

`make test` takes each method once in the conformance suite, and each network once in its own tests.
"""

from pathlib import Path

import numpy as np
import pytest

from gen.errors import GenError
from gen.experiments.compare_distillers import METHODS
from gen.kinds import KINDS
from gen.runs import load
from gen.training.engine import train
from tests.distill.matrix import TEACHERS, recipe, table, teacher

# (method, teacher) that are refused, with what the message says
REFUSED: dict[tuple[str, str], str] = {}
PAIRS = [(method, title) for method in METHODS for title in TEACHERS]


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "test-matrix", {"matrix-rows": "tests.distill.matrix:MatrixRows"})


def test_the_page_shows_the_matrix() -> None:
    page = (Path(__file__).parents[2] / "docs" / "distillers.md").read_text()
    expected = table(METHODS, REFUSED)
    assert expected in page, f"docs/distillers.md shows another matrix; put this there:\n{expected}"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "title"), PAIRS, ids=[f"{method} of {title}" for method, title in PAIRS])
def test_a_student_trains_and_makes_images(method: str, title: str, tmp_path: Path) -> None:
    loaded = teacher(title)
    if (method, title) in REFUSED:
        with pytest.raises(GenError, match=REFUSED[method, title]):
            recipe(method, loaded, tmp_path / "pairs")
        return
    found = recipe(method, loaded, tmp_path / "pairs")
    train(found.config, tmp_path / "run", frozen=found.frozen, artifacts=found.artifacts)
    student = load(tmp_path / "run")
    made = student.sample([0, 1])
    assert made.shape == (2, *loaded.denoiser.network.shape)
    assert not np.array_equal(made[0], made[1])
    assert student.config.frozen["teacher"] == loaded.origin
