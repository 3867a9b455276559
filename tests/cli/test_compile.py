"""``gen compile PRESET --target``: what is wrong is said in a line; with compilers that are not asked for anything."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from gen.cli import main
from gen.cli.compile import as_json, rows
from gen.cli.estimates import planned
from gen.programs import KINDS, Traced, programs
from gen.training import ahead
from gen.training.ahead import Estimate, estimate
from gen.training.budget import Memory
from gen.training.flops import Flops
from gen.training.hlo import Traffic
from gen.training.sharding import make_mesh
from gen.training.targets import Target, find_target

TARGET = find_target("v5e:2x2")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["dit-b2", "--target", "v9e:8x8"], "unknown target 'v9e:8x8'; did you mean 'v6e'?"),
        (["dit-b2", "--target", "v5e:8"], "target 'v5e:8' is no slice of TPU v5e; expected 2 axes, such as v5e:8x8"),
        (["dit-b2", "--target", "h200"], "is not installed (no module jax_cuda12_plugin); install it beside gen: pip"),
        (["dit-b9", "--target", "v5e:2x2"], "unknown preset 'dit-b9'"),
        (["dit-b2", "--target", "v5e:2x2", "--programs", "trian"], "unknown program 'trian'; did you mean 'train'?"),
        (["dit-xl2", "--target", "v5e:2x2"], "mesh data=-1 x fsdp=8 x tensor=1 does not fit 4 devices"),
        (["dit-b2", "--target", "v5e:2x2", "--mesh", "data=3"], "mesh data=3 x fsdp=1 x tensor=1 does not fit 4 dev"),
        (["dit-b2", "--target", "v5e:2x2", "--batch", "6"], "batch 6 does not divide over 4 devices"),
        (
            ["dit-b2", "--target", "v5e:2x2", "--engine.memory_gib", "1"],
            "'train teacher/net' needs 1.94 GiB per device",
        ),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_compiled(
    args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gen.training.targets.prepare", lambda: None)
    monkeypatch.setattr("gen.training.ahead.estimate", lambda *_, **__: pytest.fail("compiled"))
    if "h200" in args:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[:1] * self.count)
    assert main(["compile", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


class Refusing:
    """A traced program that the compiler does not take."""

    def __init__(self, text: str) -> None:
        self.text = text

    def lower(self) -> "Refusing":
        return self

    def compile(self) -> Any:
        raise jax.errors.JaxRuntimeError(self.text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 36.21G "
            "of 15.75G hbm. Exceeded hbm capacity by 20.46G.\n\nTotal hbm usage >= 36.46G:\n",
            "'train net' needs 36.21GiB per device and a TPU v5e has 16 GiB: take fewer samples at a time",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (35.76G) "
            "exceeds available HBM (15.75G).",
            "'train net' needs 35.76GiB per device and a TPU v5e has 16 GiB",
        ),
        ("INTERNAL: no tile\nfound", "the compiler of TPU v5e refuses 'train net': INTERNAL: no tile"),
    ],
)
def test_a_program_that_does_not_fit_memory_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ahead.GenError, match="^" + said.replace("(", r"\(")):
        estimate("train net", Refusing(text), TARGET)


def made() -> list[tuple[Traced, Estimate]]:
    """A training program as the compiler of a TPU might describe it."""
    held = Memory(4 * 10**9, 0, 0, 0, 0)
    found = Estimate(
        "train net",
        61.4,
        4 * 2**30,
        6 * 2**30,
        Flops(2e12, 5e11),
        {"tpu_custom_call flash": 12},
        {"all-reduce": Traffic(3, 1.5e9)},
        0.05,
        (("backward dot_general", 0.02, 12),),
        0.2,
    )
    return [(Traced("train", "train net", 256, 10**9, held, lambda: None), found)]


def test_the_table_says_what_was_asked_for() -> None:
    table = dict(rows(TARGET, made()))
    assert table["of 16 GiB"] == "62 %"
    assert table["products"] == "2.00 TFLOP"
    assert table["fused attention"] == "12 x tpu_custom_call flash"
    assert table["all-reduce, sent"] == "3 x, 1.50 GB"
    assert table["sent / parameters"] == "0.75 of 2 bytes"
    assert table["estimated time"] == "50.0 ms"
    assert table["of 197 TFLOP/s"] == "20 %"
    written = as_json(planned("dit-smoke", {}).config, TARGET, made())
    assert json.loads(json.dumps(written))["programs"][0]["traffic"] == {"all-reduce": {"count": 3, "sent": 1.5e9}}


def test_a_preset_is_planned_without_data_and_without_trained_runs() -> None:
    """A student's shapes come from its teacher's preset, and the teacher's latents from its tokenizer's."""
    recipe = planned("cifar10-student", {"teacher": "cifar10-teacher", "tokenizer": "cifar10-tokenizer"})
    assert [stage.name for stage in recipe.config.stages] == ["regression", "matching"]
    shapes = jax.tree.leaves((recipe.frozen, recipe.artifacts["tokenizer"]))
    assert shapes
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in shapes)


@pytest.mark.slow
def test_every_kind_of_program_compiles_for_the_devices_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gen.training.targets.prepare", lambda: None)
    monkeypatch.setattr(Target, "devices", lambda self: jax.devices()[:1])
    flags = ["--target", "v5e:1x1", "--programs", ",".join(KINDS), "--batch", "4", "--sampler.steps", "2"]
    assert main(["compile", "dit-smoke", *flags, "--json", str(tmp_path / "a.json"), "--hlo", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "compiler's estimates for comparing programs, not measurements" in said
    found = {program["program"]: program for program in json.loads((tmp_path / "a.json").read_text())["programs"]}
    assert len(found) == len(KINDS)
    assert all(program["arguments"] > 0 for program in found.values())
    assert len(list(tmp_path.glob("*.hlo.txt"))) == len(KINDS)


@pytest.mark.parametrize(("batch_gpu", "images"), [(None, 64), (4, 4), (100, 64)])
def test_a_device_samples_no_more_at_a_time_than_it_is_told(batch_gpu: int | None, images: int) -> None:
    recipe = planned("dit-b2", {}, (), {})
    mesh = make_mesh(recipe.config.engine.mesh, jax.devices()[:1])
    (found,) = programs(
        recipe.config, mesh, frozen={}, artifacts=recipe.artifacts, kinds=("sample",), batch_gpu=batch_gpu
    )
    assert found.images == images
