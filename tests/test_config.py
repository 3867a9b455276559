import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from gen import config
from gen.config import config_class, fingerprint, from_json, kind_of, kinds, to_json
from gen.data.sources import Digits
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.kinds import KINDS
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.guidance import ClassifierFree
from gen.training.checks import check_run
from gen.training.optim import OptimConfig
from gen.training.run import RunConfig
from gen.training.task import Stage

GENERATOR = DiffusionGenerator(
    Denoiser(network=None, process=Linear(), parameterization=Predict("velocity")),
    sampler=Sampler(steps=7, guidance=ClassifierFree(1.5, channels=3)),
)


def test_kinds_are_unique_over_families() -> None:
    names = [kind for family in KINDS.values() for kind in family]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", kinds())
def test_every_registered_kind_is_a_frozen_dataclass_that_finds_itself(kind: str) -> None:
    cls = config_class(kind)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert kind_of(cls) == kind


@pytest.mark.parametrize("kind", kinds())
def test_defaults_survive_json(kind: str) -> None:
    cls = config_class(kind)
    missing = dataclasses.MISSING
    if any(f.init and f.default is missing and f.default_factory is missing for f in dataclasses.fields(cls)):
        pytest.skip("has required fields; covered where it is used")
    value = cls()
    data = json.loads(json.dumps(to_json(value)))
    assert from_json(data, cls) == value
    assert data["kind"] == kind


def test_nested_configuration_survives_json() -> None:
    data = json.loads(json.dumps(to_json(GENERATOR)))
    assert from_json(data, DiffusionGenerator) == GENERATOR
    assert hash(from_json(data, DiffusionGenerator)) == hash(GENERATOR)


def test_fingerprint_tells_values_apart_and_nothing_else() -> None:
    assert fingerprint(Sampler(steps=7)) == fingerprint(Sampler(steps=7))
    assert fingerprint(Sampler(steps=7)) != fingerprint(Sampler(steps=8))
    assert fingerprint(DDPM()) != fingerprint(Linear())
    assert len(fingerprint(Linear())) == 16


@pytest.mark.parametrize(
    ("data", "expected", "message"),
    [
        ({"kind": "cgf"}, ClassifierFree, "unknown kind 'cgf' in a configuration; did you mean 'cfg'?"),
        ({"kind": "cfg", "scael": 2}, ClassifierFree, "unknown key 'scael' for ClassifierFree; did you mean 'scale'?"),
        ({"kind": "cfg", "scale": "2"}, ClassifierFree, "config.scale is '2'; expected float"),
        ({"kind": "cfg", "scale": True}, ClassifierFree, "config.scale is True; expected float"),
        ({"kind": "linear"}, ClassifierFree, "is a Linear; expected ClassifierFree"),
        ({"kind": "predict", "kind_": 1}, Predict, "unknown key 'kind_'"),
        ([1, 2, 3], tuple[int, int], "config has 3 entries; expected 2"),
        (3, tuple[int, ...], "config is 3; expected a list"),
        ("b", config.typing.Literal["a"], "config is 'b'; expected one of 'a'"),
    ],
)
def test_bad_values_are_refused_in_one_line(data: object, expected: object, message: str) -> None:
    with pytest.raises(GenError) as caught:
        from_json(data, expected)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needs:
        depth: int

    with pytest.raises(GenError, match="lacks the key 'depth' that Needs requires"):
        from_json({}, Needs)


def test_ints_become_floats_and_lists_tuples_where_expected() -> None:
    value = from_json({"kind": "cfg", "scale": 2}, ClassifierFree)
    assert isinstance(value.scale, float)
    assert from_json([1, 2], tuple[int, ...]) == (1, 2)
    assert from_json([[1], [2]], tuple[tuple[int, ...], ...]) == ((1,), (2,))


def test_arrays_do_not_belong_in_a_configuration() -> None:
    import numpy as np

    with pytest.raises(TypeError, match="does not belong in a configuration"):
        to_json({"a": np.zeros(2)})


def test_reading_the_table_imports_no_jax() -> None:
    code = "import sys, gen.config; gen.config.kinds(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_every_public_name_resolves() -> None:
    gen = importlib.import_module("gen")
    assert set(gen._HOME) == set(gen.__all__)
    for name in gen.__all__:
        assert getattr(gen, name) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Predict("velocty"), "Predict's output is 'velocty'; expected one of 'x', 'eps', 'v', 'velocity'"),
        (lambda: Predict(clock="tiem"), "Predict's clock is 'tiem'; expected one of 'time'"),
        (lambda: Predict(sign=0), "Predict's sign is 0; expected 1"),
        (lambda: Sampler(steps=0), "a sampler of 0 steps; expected at least 1"),
    ],
)
def test_nonsense_is_refused_at_construction(make: Callable[[], object], message: str) -> None:
    with pytest.raises(GenError, match=message):
        make()


def test_a_misspelt_choice_anywhere_in_a_run_is_refused_before_it_starts() -> None:
    task = DenoiserTask(denoiser=GENERATOR.denoiser, optim=OptimConfig(schedule="cosin"))
    run = RunConfig("x", (Stage("s", task, 1, 1, Digits()),))
    with pytest.raises(GenError, match=r"optim.schedule is 'cosin'; expected one of 'constant', 'cosine'"):
        check_run(run)
