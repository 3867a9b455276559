"""Presets compile for a TPU slice and for an H200, fit there, and send no more than their layout asks for."""

from typing import Any

import pytest

from gen.cli.overrides import mesh_overrides
from gen.training.targets import find_target
from tests.targets.cases import CASES, Case, expected_traffic
from tests.targets.record import compile_case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_preset_on_a_target(case: Case, recorded: dict[str, Any]) -> None:
    """Against what was recorded; a row that is not recorded is named, and no claim is made of it."""
    if case.name not in recorded:
        pytest.skip("not recorded")
    target, found = find_target(case.target), compile_case(case)
    sizes = {path.rpartition(".")[2]: int(size) for path, size in mesh_overrides(case.mesh)}
    assert found.keys() == recorded[case.name].keys()
    for name, now in found.items():
        before = recorded[case.name][name]
        assert now["arguments"] + now["temporaries"] <= target.chip.memory, name
        assert now["temporaries"] <= 1.05 * before["temporaries"], name
        assert "all-to-all" not in now["collectives"], name
        assert now["sent"] <= 1.15 * expected_traffic(now["parameters"], 0, sizes, now["width"]) + 1e6, name
        assert sum(now["attention"].values()) >= sum(before["attention"].values()), name
        assert now["attention"] or not case.fused, name
        if before["step_ms"] is not None:
            assert now["step_ms"] <= 1.05 * before["step_ms"], name
