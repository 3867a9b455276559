"""The comparison of distillers, at toy size, from a teacher of the demo's."""

from pathlib import Path

import pytest

from gen.errors import GenError
from gen.experiments import compare_distillers, demo
from gen.experiments.compare_distillers import HEAD, SMOKE, run, table


def test_methods_take_a_teacher_and_its_pairs() -> None:
    for name in compare_distillers.METHODS:
        compare_distillers._method(name)
    with pytest.raises(GenError, match="'demo-teacher' takes tokenizer and data; a method takes a teacher"):
        compare_distillers._method("demo-teacher")


def test_the_front_keeps_what_no_other_beats() -> None:
    rows = [["a", 0, 0, 10.0, 2.0], ["b", 0, 0, 20.0, 3.0], ["c", 0, 0, 30.0, 1.0], ["d", 0, 0, 5.0, None]]
    assert compare_distillers._front(rows) == ["a", "c"]


@pytest.mark.slow
def test_a_comparison_makes_a_page_and_goes_on(tmp_path: Path) -> None:
    demo.run(tmp_path / "demo", smoke=True)
    teacher = tmp_path / "demo" / "teacher"
    methods = ("kd", "dmd2", "multi-student")
    made = run(teacher, tmp_path / "out", methods=methods, budget=SMOKE)
    rows = table(methods, made)
    assert {row[0] for row in rows} == set(methods)
    assert all(len(row) == len(HEAD) and row[HEAD.index("distance, 1 call ↓")] > 0 for row in rows)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The same noise throughout" in page
    before = {p: p.stat().st_mtime for p in (tmp_path / "out").rglob("*.safetensors")}
    run(teacher, tmp_path / "out", methods=methods, budget=SMOKE)
    assert before == {p: p.stat().st_mtime for p in (tmp_path / "out").rglob("*.safetensors")}
