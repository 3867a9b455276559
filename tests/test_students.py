"""What presets of students take from their teacher and from the command line."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest

from gen.data.images import Images
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.process import EDM, Linear
from gen.errors import GenError
from gen.experiments._students import student_data, student_network, student_times
from gen.experiments.demo import TEACHER

DIGITS = dataclasses.replace(TEACHER.network, size=(8, 8), channels=1)


def teacher(network: Any, process: Any = Linear(), stages: tuple[Any, ...] = ()) -> Any:
    rule = EDMPrecondition() if isinstance(process, EDM) else Predict("velocity")
    config = types.SimpleNamespace(stages=stages)
    return types.SimpleNamespace(denoiser=Denoiser(network, process, rule), config=config, path="runs/t", origin="t")


@pytest.mark.parametrize("preset", ["sit-smoke", "edm-smoke", "ascan-smoke"])
def test_a_student_has_another_network_and_the_teachers_inputs(preset: str) -> None:
    fitted = student_network(preset, teacher(DIGITS))
    assert fitted.shape == DIGITS.shape
    assert fitted.conditions == DIGITS.conditions


def test_students_that_cannot_be_are_refused() -> None:
    with pytest.raises(GenError, match="unknown preset 'sit-smok'; did you mean"):
        student_network("sit-smok", teacher(DIGITS))
    with pytest.raises(GenError, match="needs teacher and data; give a student that trains on data alone"):
        student_network("demo-student", teacher(DIGITS))
    with pytest.raises(GenError, match="'demo-tokenizer' trains no denoiser"):
        student_network("demo-tokenizer", teacher(DIGITS))
    with pytest.raises(GenError, match=r"'edm-smoke' takes square images, the teacher \(4, 8\)"):
        student_network("edm-smoke", teacher(TEACHER.network))
    with pytest.raises(GenError, match=r"'sit-smoke' cannot have the teacher's \(5, 5, 1\)"):
        student_network("sit-smoke", teacher(dataclasses.replace(DIGITS, size=(5, 5), patch=1)))


def test_times_of_several_calls_lie_evenly_on_the_process() -> None:
    assert student_times(Linear(), 1) == (1.0,)
    assert student_times(Linear(), 4) == (1.0, 0.75, 0.5, 0.25)
    first, second = student_times(EDM(), 2)
    assert first == pytest.approx(80.0)
    assert 1.0 < second < 10.0
    with pytest.raises(GenError, match="in 0 calls; expected at least 1"):
        student_times(Linear(), 0)


def test_data_are_the_teachers_own_unless_given(tmp_path: Path) -> None:
    stage = types.SimpleNamespace(data="what it learned from")
    assert student_data(None, teacher(DIGITS, stages=(stage,))) == "what it learned from"
    with pytest.raises(GenError, match="runs/t does not say what it was trained on; add --data"):
        student_data(None, teacher(DIGITS))
    for head, kind in (("records.json", "Records"), ("cache.json", "Cache")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / head).touch()
        assert type(student_data(str(folder), teacher(DIGITS))).__name__ == kind
    images = student_data(str(tmp_path / "images"), teacher(DIGITS))
    assert isinstance(images, Images)
    assert (images.size, images.channels, images.labels) == (8, 1, "class")
