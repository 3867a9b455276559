"""Plans: done steps are left alone, interrupted ones go on, changed ones are refused or redone."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from gen.data.sources import Digits
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.metrics.protocol import Protocol, Result
from gen.metrics.report import Report
from gen.plan import Plan, Step
from gen.steps import Encode, Evaluate, MakeRecords, Train
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.engine import Hook
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage
from tests.processes import ended, free_port

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Sum:
    """Adds a number to what it takes, in two files of which the second is interrupted on demand."""

    name: str
    number: int
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)
    about: str = ""

    def settings(self, given):
        return {"number": self.number}

    def run(self, given, out):
        self.calls.append("went on" if (out / "half").exists() else "began")
        out.mkdir(parents=True, exist_ok=True)
        (out / "half").write_text("")
        if self.number < 0:
            raise KeyboardInterrupt
        (out / "sum").write_text(str(self.number + sum(given.values())))

    def open(self, out):
        return int((out / "sum").read_text())


def chain(first=1, second=10, third=100):
    return (
        Sum("a", first),
        Sum("b", second, {"x": "a"}, about="adds ten"),
        Sum("c", third, {"x": "a", "y": "b"}),
    )


def ran(steps) -> str:
    return "".join(step.name for step in steps for _ in step.calls)


def test_steps_run_once_in_order_and_give_what_they_made(tmp_path, capsys):
    steps = chain()
    made = Plan(tmp_path, steps).run()
    assert dict(made) == {"a": 1, "b": 11, "c": 112}
    assert set(made.seconds) == {"a", "b", "c"}
    assert capsys.readouterr().out.splitlines() == ["[1/3] a: begins", "[2/3] b: adds ten", "[3/3] c: begins"]
    again = chain()
    assert dict(Plan(tmp_path, again).run()) == dict(made)
    assert ran(again) == ""
    assert capsys.readouterr().out.splitlines()[1] == "[2/3] b: done before"
    longer = (*chain(), Sum("d", 5, {"z": "c"}))
    assert Plan(tmp_path, longer).run()["d"] == 117
    assert ran(longer) == "d"


def test_an_interrupted_step_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Plan(tmp_path, (Sum("a", -1),)).run()
    assert "seconds" not in json.loads((tmp_path / "plan.json").read_text())["a"]
    step = dataclasses.replace(Sum("a", -1), calls=[])
    with pytest.raises(KeyboardInterrupt):
        Plan(tmp_path, (step,)).run()
    assert step.calls == ["went on"]


def test_a_changed_step_is_refused_and_redone_on_purpose_with_all_that_follow(tmp_path):
    Plan(tmp_path, chain()).run()
    with pytest.raises(GenError, match=r"step 'b' in .* was made before its settings changed; .*run\(redo=\['b'\]\)"):
        Plan(tmp_path, chain(second=20)).run()
    steps = chain(second=20)
    made = Plan(tmp_path, steps).run(redo=["b"])
    assert (made["b"], made["c"], ran(steps)) == (21, 122, "bc")
    assert steps[1].calls == ["began"]  # in a folder of its own, without what was there
    (tmp_path / "plan.json").write_text(json.dumps(json.loads((tmp_path / "plan.json").read_text()) | {"b": {}}))
    with pytest.raises(GenError, match="no step is called 'bb'; did you mean 'b'"):
        Plan(tmp_path, chain()).run(redo=["bb"])


def test_a_changed_input_is_named(tmp_path):
    Plan(tmp_path, chain()).run()
    state = json.loads((tmp_path / "plan.json").read_text())
    del state["a"]  # as if made by hand
    (tmp_path / "plan.json").write_text(json.dumps(state))
    with pytest.raises(GenError, match="a exists and is not of this plan"):
        Plan(tmp_path, chain()).run()
    (tmp_path / "a" / "sum").unlink()
    (tmp_path / "a" / "half").unlink()
    (tmp_path / "a").rmdir()
    with pytest.raises(GenError, match=r"step 'b' in .* was made before 'a' changed"):
        Plan(tmp_path, chain(first=2)).run()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Sum("a", 1), Sum("a", 2)), "step 'a'; expected a name of its own"),
        ((Sum("a/b", 1),), "step 'a/b'; expected a name of its own made of letters"),
        ((Sum("b", 1, {"x": "a"}), Sum("a", 1)), "step 'b' takes 'a', which no step before it makes; put it first"),
    ],
)
def test_plans_that_cannot_run(tmp_path, steps, message):
    with pytest.raises(GenError, match=message):
        Plan(tmp_path, steps)


def test_rounds_are_written_as_a_loop(tmp_path):
    def recipe(**given):
        raise AssertionError("not called before it runs")

    steps: list[Step] = [Train("flow-0", recipe)]
    for k in range(2):
        steps += [
            MakeRecords(f"pairs-{k}", f"flow-{k}", count=8),
            Train(f"flow-{k + 1}", recipe, {"teacher": f"flow-{k}", "pairs": f"pairs-{k}"}),
        ]
    steps += [Encode("latents", "flow-0", data=None), Evaluate("scores", recipe, {"of": "flow-2"})]
    assert len(Plan(tmp_path, tuple(steps)).steps) == 7
    assert not list(tmp_path.iterdir())


def small(out, seed=0):
    """A tokenizer of which the second of three steps is the best, its latents, their scores, and a page."""
    tower = Tower(width=8, depth=1, heads=2)
    task = TokenizerTask(
        TiTokConfig((8, 8, 1), patch=4, tokens=2, channels=4, encoder=tower, decoder=tower, scan=False)
    )
    engine = EngineConfig(seed=seed, keep=1, best="score", log_every=1, quiet=True)
    config = RunConfig("small", (Stage("tokenizer", task, steps=3, batch=16, data=Digits("test")),), engine=engine)

    def score(latents):
        protocol = Protocol("none", "none", count=len(latents.source()))
        return {"mean, of all": Result({"mean": float(latents.normalizer()["shift"].mean())}, protocol)}

    steps = (
        Train(
            "tokenizer",
            lambda: Recipe(config),
            hooks=lambda recipe: [Hook(1, lambda stage, step, state, frozen: {"score": abs(step - 2.0)})],
            best=True,
        ),
        Encode("latents", "tokenizer", Digits("test"), count=32, batch=16),
        Evaluate("scores", score, {"latents": "latents"}),
    )
    return Plan(out, steps, page=lambda made: Report("small").results(made["scores"]))


def test_a_run_its_best_checkpoint_its_latents_their_scores_and_the_page(tmp_path, capsys):
    made = small(tmp_path / "first").run()
    assert made["tokenizer"].step == 2
    assert len(made["latents"].source()) == 32
    assert set(made["scores"]["mean, of all"].values) == {"mean"}
    assert (tmp_path / "first" / "scores" / "mean-of-all.json").exists()
    assert "mean, of all" in (tmp_path / "first" / "report.html").read_text()

    def flow(latents):
        task = DenoiserTask(Denoiser(DiTConfig((2,), 4, patch=1, width=8, depth=1, heads=1), Linear()))
        return Recipe(RunConfig("flow", (Stage("flow", task, steps=1, batch=16, data=latents),)))

    scores, student = made["scores"], Train("flow", flow, {"latents": "latents"})
    before = student.settings({"latents": made["latents"]})
    moved = shutil.move(tmp_path / "first", tmp_path / "moved")
    (moved / "report.html").unlink()
    capsys.readouterr()
    again = small(moved).run()
    assert capsys.readouterr().out.count("done before") == 3
    assert student.settings({"latents": again["latents"]}) == before
    assert again["scores"] == scores
    assert (moved / "report.html").exists()
    with pytest.raises(GenError, match=r"step 'tokenizer' in .* was made before its settings changed"):
        small(moved, seed=1).run()


def test_what_steps_cannot_give_is_refused(tmp_path):
    recipe = Recipe(RunConfig("r"))
    with pytest.raises(GenError, match=r"its recipe does not say by which metric; set engine.best"):
        Plan(tmp_path, (Train("a", lambda: recipe, best=True),)).run()
    result = Result({}, Protocol("none", "none", count=1))
    with pytest.raises(GenError, match="step 'b' scores x, y, x-y; their files would share a name"):
        Plan(tmp_path / "2", (Evaluate("b", lambda: {"x, y": result, "x-y": result}, {}),)).run()


def join(out, port, process):
    """One of two processes that run the small plan."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    made = small(out).run()
    assert (made["tokenizer"].step, len(made["latents"].source())) == (2, 32)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path):
    script = "import sys; from tests.test_plan import join; join(*sys.argv[1:])"
    options = {"cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu"}, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script, str(tmp_path / "two"), free_port()]
    started = [subprocess.Popen([*command, number], **options) for number in "01"]
    found = ended(*started)
    assert [status for status, _ in found] == [0, 0], found
    one, two = (small(tmp_path / name).run() for name in ("one", "two"))
    for name in ("latents", "scores"):
        assert len(list((tmp_path / "two" / name).iterdir())) == len(list((tmp_path / "one" / name).iterdir()))
    rows = [np.asarray(made["latents"].source().gather(np.arange(32))["latent"]) for made in (one, two)]
    np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-4)
