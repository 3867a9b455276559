"""``gen info PRESET``: a mesh on the command line, and what fits."""

import re

import pytest

from gen.cli import main
from gen.cli.overrides import mesh_overrides
from gen.errors import GenError


def test_a_mesh_is_four_settings() -> None:
    assert mesh_overrides(None) == ()
    assert dict(mesh_overrides("fsdp=4, data=8")) == {
        "engine.mesh.data": "8",
        "engine.mesh.fsdp": "4",
        "engine.mesh.tensor": "1",
        "engine.mesh.student": "1",
    }


@pytest.mark.parametrize("text", ["", "data", "data=x", "rows=2", "data=8;fsdp=4"])
def test_a_mesh_that_cannot_be_read(text: str) -> None:
    with pytest.raises(GenError, match="is not like data=8,fsdp=4; axes are data, fsdp, tensor"):
        mesh_overrides(text)


def test_memory_on_a_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--mesh", "data=2,fsdp=4", "--batch", "128", "--batch-gpu", "4"]
    assert main(["info", "demo-tokenizer", *plan]) == 0
    said = capsys.readouterr().out
    assert re.search(r"per device: parameters \S+ kB, optimisers \S+ kB, averages \S+ kB", said)
    assert "mesh data=2 x fsdp=4 x tensor=1" in said
    assert main(["info", "demo-tokenizer", *plan, "--engine.memory_gib", "0.001"]) == 2
    assert "stage 'tokenizer' needs " in capsys.readouterr().err
    assert main(["info", "demo-tokenizer", "--mesh", "data=3"]) == 2
    assert "batch 64 does not divide over 3 devices" in capsys.readouterr().err


def test_training_that_cannot_fit_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert main(["train", "demo-tokenizer", "--outdir", f"{tmp_path}/run", "--engine.memory_gib", "0.0001"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: stage 'tokenizer' needs ")
    assert "choose a smaller network" in said


def test_a_preset_without_its_inputs_says_what_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "dit-xl2", "--mesh", "data=8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dit-xl2: DiT-XL/2 on ImageNet-256 latents")
    assert "Expected (ImageNet-256, FID-50k" in said
    assert "takes --tokenizer RUN as well\nparameters, memory and settings: gen info dit-xl2 --data DATA" in said
    assert main(["info", "demo-student"]) == 0
    assert "gen info demo-student --teacher RUN --data DATA" in capsys.readouterr().out
