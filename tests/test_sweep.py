"""Sweeps: products, what is chosen, the front, the page, refusals; averages of other widths from a run."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gen import cli
from gen.config import to_json
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.experiments import _sweep
from gen.experiments._sweep import Point, changed, chosen, front, page, points
from gen.experiments.demo import SAMPLER, TEACHER
from gen.files import write_json
from gen.kinds import KINDS
from gen.metrics.protocol import Protocol, Result
from gen.runs import averaged, load
from gen.sampling.guidance import ClassifierFree, Interval
from gen.training.ema import PowerFunction
from gen.training.engine import train
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig, load_run
from gen.training.task import Model, Stage
from tests.conformance import examples
from tests.distill.tiny import Tiny
from tests.test_matching_presets import loaded


def result(distance: float, calls: int, seeds: str = "0-9") -> Result:
    return Result({"frechet_distance": distance}, Protocol("x", "y", 10, seeds=seeds), {"nfe": str(calls)})


def test_products_and_what_is_chosen() -> None:
    wanted = points(steps=[2, 4], guidance=[1.0, 1.5], ema=[])
    assert [str(p) for p in wanted][:2] == ["steps 2, guidance 1.0", "steps 2, guidance 1.5"]
    scores = dict(zip(wanted, (result(5.0, 2), result(4.0, 2), result(4.5, 4), result(3.0, 4)), strict=True))
    assert chosen(scores) == Point(steps=4, guidance=1.5)
    assert front(scores) == [Point(steps=2, guidance=1.5), Point(steps=4, guidance=1.5)]
    html = page("toy", scores, result(3.1, 4, "10-19"), chosen(scores)).html()
    assert "3.1000 on seeds 10-19" in html
    assert html.count("<svg") == 3  # over guidance, over steps, over calls
    with pytest.raises(GenError, match="a sweep over nothing"):
        points(steps=[], guidance=[])


def test_settings_of_a_point() -> None:
    base = loaded(TEACHER, SAMPLER)
    found = changed(lambda width: base, Point(4, "euler", "karras", 2.0, (0.1, 0.8))).config.sampler
    assert (found.steps, type(found.solver).__name__, type(found.grid).__name__) == (4, "Euler", "Karras")
    assert found.guidance == Interval(ClassifierFree(2.0), 0.1, 0.8)
    plain = base.with_sampler(SAMPLER.changed(guidance=1.0))
    with pytest.raises(GenError, match="without guidance changes nothing"):
        changed(lambda width: plain, Point(interval=(0.1, 0.8)))


def test_every_point_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, calls = loaded(TEACHER, SAMPLER), []

    def scored(run, reference, extractor, seeds, **placed):
        calls.append(run.config.sampler.steps)
        return result(10.0 / run.config.sampler.steps, run.config.sampler.steps)

    monkeypatch.setattr(_sweep, "scored", scored)

    def run(wanted):
        return _sweep.run_sweep(lambda width: base, wanted, None, None, tmp_path, seeds=range(10))

    first = run(points(steps=[2, 4]))
    assert run(points(steps=[2, 4, 5])) == {**first, Point(steps=5): result(2.0, 5)}
    assert calls == [2, 4, 5]
    other = Result({"frechet_distance": 1.0}, Protocol("z", "y", 10), {"nfe": "1"})
    monkeypatch.setattr(_sweep, "scored", lambda *a, **k: other)
    with pytest.raises(GenError, match="whose extractor is another"):
        run(points(steps=[2, 6]))


def test_commands_refuse_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_json(run / "config.json", to_json(RunConfig("toy", models={"net": Model(TEACHER)}, sampler=SAMPLER)))
    for args, message in (
        (["sweep", str(run)], "a sweep over nothing"),
        (["sweep", str(run), "--guidance", "1,2"], "unknown flag '--guidance'; it is called --cfg-scale"),
        (["sweep", str(run), "--cfg-scale", "much"], "--cfg-scale 'much' is not a list of numbers"),
        (["sweep", str(run), "--steps", "few"], "is not a list of numbers"),
        (["sweep", str(run), "--solver", "hune"], "unknown solver 'hune'"),
        (["sweep", str(run), "--interval", "0.9:0.1"], "low before high"),
        (["ema", str(run)], "keeps no power-function averages"),
        (["ema", str(run), "--sigma-rel", "0.2..0.1"], "is not like 0.05..0.25"),
    ):
        assert cli.main(args) == 2
        assert message in capsys.readouterr().err


def test_averages_of_other_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored widths come back as they are; others lie elsewhere."""
    monkeypatch.setitem(KINDS, "sweep-toys", {"tiny": "tests.distill.tiny:Tiny", **examples.KINDS_HERE})
    emas = (PowerFunction(0.05), PowerFunction(0.10))
    task = DenoiserTask(Denoiser(Tiny(), Linear(), Predict("velocity")), optim=OptimConfig(1e-2), emas=emas)
    engine = EngineConfig(checkpoint_every=4, keep=9, quiet=True)
    config = RunConfig("toy", (Stage("only", task, 12, 8, examples.Rows()),), engine=engine)
    train(config, tmp_path / "run")
    state = load_run(tmp_path / "run")[2]
    for key, width in (("net", 0.05), ("net@1", 0.10)):
        found = averaged(tmp_path / "run", width).params["net"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), dict(found), dict(state.ema[key]))
    wide = averaged(tmp_path / "run", 0.2).params["net"]["outer"]["kernel"]
    assert np.abs(np.asarray(wide) - np.asarray(load(tmp_path / "run").params["net"]["outer"]["kernel"])).max() > 1e-5
    with pytest.raises(GenError, match="relative width"):
        averaged(tmp_path / "run", 0.5)
