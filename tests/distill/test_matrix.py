"""Every method from every teacher: it trains, and its student makes images.

``docs/combinations.md`` shows the matrix. `make test` takes each method once and each network once, along a diagonal.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen.errors import GenError
from gen.experiments.compare_distillers import METHODS
from gen.runs import load
from gen.training.engine import train
from tests.distill.matrix import TEACHERS, recipe, teacher

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
# (method, teacher) that are refused, with what the message says
REFUSED: dict[tuple[str, str], str] = {}
PAIRS = [(method, title) for method in METHODS for title in TEACHERS]
DIAGONAL = {(method, list(TEACHERS)[i % len(TEACHERS)]) for i, method in enumerate(METHODS)}


def cases() -> list[Any]:
    marks = {pair: () if pair in DIAGONAL else (pytest.mark.slow,) for pair in PAIRS}
    return [pytest.param(*pair, marks=marks[pair], id=f"{pair[0]} of {pair[1]}") for pair in PAIRS]


@pytest.mark.parametrize(("method", "title"), cases())
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


def test_the_page_shows_the_matrix() -> None:
    rows = [f"| {' | '.join(['method', *TEACHERS])} |", "|---" * (1 + len(TEACHERS)) + "|"]
    for method in METHODS:
        cells = ["refused" if (method, title) in REFUSED else "yes" for title in TEACHERS]
        rows.append(f"| `{method}` | {' | '.join(cells)} |")
    table = "\n".join(rows)
    assert table in PAGE.read_text(), f"docs/combinations.md is behind the tests; its table is:\n{table}"
