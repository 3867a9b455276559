"""Overrides by path are typed by the configuration they change."""

import pytest

from gen.cli.overrides import override
from gen.config import to_json
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import VP, Linear
from gen.errors import GenError
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Karras
from gen.sampling.guidance import ClassifierFree
from gen.sampling.solvers import Euler

CONFIG = DiffusionGenerator(Denoiser(None, Linear(), Predict("velocity")), (4, 8), Sampler(steps=7))


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
            ("shape.0", "5"),
        ],
    )
    assert changed == DiffusionGenerator(
        Denoiser(None, VP(), Predict("eps")),
        (5, 8),
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
        ("shape.2", "5", "--shape.2: no entry '2'; known: 0, 1"),
        ("sampler.guidance.chanels", "3", "did you mean 'channels'?"),
    ],
)
def test_bad_overrides_are_explained(path: str, text: str, message: str) -> None:
    with pytest.raises(GenError) as caught:
        override(CONFIG, [(path, text)])
    assert message in str(caught.value)
