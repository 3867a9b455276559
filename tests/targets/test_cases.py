"""The table of presets and targets, without any compiler."""

import json

import pytest

from gen.cli.estimates import planned
from gen.training.targets import find_target
from tests.targets.cases import CASES, expected_traffic, sized
from tests.targets.conftest import RECORDED


def test_every_preset_for_accelerators_has_a_slice_and_an_h200() -> None:
    for name in sized():
        platforms = sorted(find_target(case.target).chip.platform for case in CASES if case.preset == name)
        assert platforms == ["cuda", "tpu"], name
    assert {case.preset for case in CASES} == set(sized())


def test_what_is_recorded_is_of_cases_that_there_are() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert set(recorded) <= {case.name for case in CASES}
    for programs in recorded.values():
        assert all(figures["arguments"] > 0 for figures in programs.values())


def test_traffic_of_the_layouts() -> None:
    assert expected_traffic(100, 0, {"data": 4}) == 300.0
    assert expected_traffic(100, 0, {"data": 4}, width=4) == 600.0
    assert expected_traffic(100, 0, {"fsdp": 8}) == 525.0
    assert expected_traffic(100, 0, {"data": 8, "fsdp": 8}) == pytest.approx(525.0 + 2 * 25 * 7 / 8)
    assert expected_traffic(100, 1000, {"data": 2, "tensor": 2}) == 100.0 + 4000.0
    assert expected_traffic(100, 1000, {}) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({case.preset for case in CASES}))
def test_every_case_can_be_planned(name: str) -> None:
    case = next(case for case in CASES if case.preset == name)
    recipe = planned(name, {"data": None, "teacher": case.teacher, "tokenizer": case.tokenizer})
    assert recipe.config.stages
