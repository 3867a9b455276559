"""Overrides by path are typed by the configuration they change."""

import pytest

from gen.cli import main
from gen.cli.overrides import override
from gen.config import to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import VP, Linear
from gen.distill.kd import KDTask
from gen.errors import GenError
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Karras
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Euler
from gen.training.run import RunConfig
from gen.training.task import Stage

CONFIG = DiffusionGenerator(Denoiser(None, Linear(), Predict("velocity")), Sampler(steps=7))


def test_values_components_and_lists_are_replaced() -> None:
    changed = override(
        CONFIG,
        [
            ("sampler.steps", "9"),
            ("sampler.guidance.scale", "2"),
            ("sampler.solver", "euler"),
            ("sampler.grid", '{"kind": "karras", "rho": 3}'),
            ("denoiser.process", "vp"),
            ("denoiser.parameterization.output", "eps"),
        ],
    )
    assert changed == DiffusionGenerator(
        Denoiser(None, VP(), Predict("eps")),
        Sampler(Euler(), Karras(rho=3.0), 9, ClassifierFree(2.0)),
    )


def test_no_override_changes_nothing() -> None:
    assert override(CONFIG, []) == CONFIG
    assert to_json(override(CONFIG, [("sampler.guidance.channels", "None")])) == to_json(CONFIG)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("sampler.stpes", "3", "--sampler.stpes: unknown key 'stpes'; did you mean 'steps'?"),
        ("sampler.steps.x", "3", "nothing lies under 'x': the value before it is 7; shorten the path"),
        ("sampler.steps", "many", "sampler.steps is 'many'; expected int"),
        ("sampler.steps", "1.5", "sampler.steps is 1.5; expected int"),
        ("denoiser.parameterization.output", "epsilon", "is 'epsilon'; expected one of"),
        ("sampler.guidance.chanels", "3", "did you mean 'channels'?"),
    ],
)
def test_bad_overrides_are_explained(path: str, text: str, message: str) -> None:
    with pytest.raises(GenError) as caught:
        override(CONFIG, [(path, text)])
    assert message in str(caught.value)


def test_lists_are_indexed() -> None:
    assert override(DiTConfig((4, 4)), [("size.0", "6")]).size == (6, 4)
    with pytest.raises(GenError, match=r"--size\.2: no entry '2'; known: 0, 1"):
        override(DiTConfig((4, 4)), [("size.2", "5")])


def test_what_another_run_says_is_not_overridden() -> None:
    """Student and teacher would differ from the teacher's own run, without a word."""
    student = KDTask(teacher=Denoiser(DiTConfig(), Linear()))
    config = RunConfig("student", (Stage("first", student, 1, 1, None),))
    for path in ("stages.0.task.teacher.process", "stages.first.task.teacher"):
        with pytest.raises(GenError, match=f"--{path}: the teacher is what its own run says"):
            override(config, [(path, "vp")])
    with pytest.raises(GenError, match="the tokenizer is what its own run says"):
        override(config, [("tokenizer.channels", "3")])
    assert override(config, [("stages.0.task.times", "[0.5]")]).stages[0].task.times == (0.5,)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "dit-smoke", "--lr", "1e-3"], "a setting is called by its path: --stages.0.task.optim.lr;"),
        (["info", "dit-smoke", "--num-classes=3"], "by its path: --stages.0.task.denoiser.network.num_classes;"),
        (
            ["distill", "demo-student", "--teacher", "/none", "--lr", "3"],
            "by its path, such as --stages.0.steps; gen info",
        ),
        (["train", "dit-smoke", "--btach", "3"], "did you mean '--batch'?"),
        (["list", "--modul"], "did you mean '--module'?"),
    ],
)
def test_an_unknown_flag_names_the_settings_path(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(args) == 2
    assert message in capsys.readouterr().err
