from pathlib import Path

import pytest

from scripts.kill_evaluate import check


@pytest.mark.slow
def test_killed_evaluations_end_with_the_same_scores(tmp_path: Path) -> None:
    found, moments = check(kills=4, seed=1, folder=tmp_path, count=8_000)
    assert len(moments) == 4
    assert found == []
