import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.files import RunLock
from gen.nn.network import tree_copy
from gen.training import engine, meter
from gen.training.checkpoints import load_weights
from gen.training.checks import dry_run
from gen.training.engine import Hook, Interrupted, _Leg, train
from gen.training.logging import read_metrics
from gen.training.run import EngineConfig, RunConfig, load_run
from gen.training.sharding import MeshConfig
from gen.training.task import Stage, State
from tests.processes import devices, ended, free_port
from tests.training import scripts
from tests.training.conformance import check_devices, check_task, run, same
from tests.training.toy import OPTIM, SIZE, ToyData, ToyTask, teacher

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """The two-stage toy run from start to end."""
    scripts.register()
    outdir = tmp_path_factory.mktemp("undisturbed")
    state = train(scripts.config(), outdir, frozen=teacher(), artifacts={"normalizer": {"scale": np.ones(2)}})
    return outdir, state


def _script(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.scripts", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {})
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def test_the_toy_conforms(tmp_path: Path) -> None:
    check_task(ToyTask(), ToyData(), teacher(), tmp_path)


def test_run_folder(undisturbed: tuple[Path, State]) -> None:
    outdir, state = undisturbed
    names = {path.name for path in outdir.iterdir()}
    assert {"config.json", "checkpoints", "artifacts", "metrics.jsonl", "previews"} <= names
    records = read_metrics(outdir)
    assert [r["step"] for r in records] == [30, 50]
    assert records[-1]["images"] == 50 * 16
    assert {"student/loss", "fake_score/grad_norm", "images_per_second"} <= set(records[0])
    assert records[0]["student/lr"] == pytest.approx(0.01 * (0 + 0.5 + 4) / 6)  # 6 updates, a warm-up over 2
    assert records[1]["fake_score/lr"] == pytest.approx(5e-3 * (0 + 0.5 + 14) / 16)
    assert sorted(p.name for p in (outdir / "previews").iterdir()) == [
        "one-0000030-weights.png",
        "two-0000050-weights.png",
    ]
    config, stage, weights = load_run(outdir)
    assert config == scripts.config()
    assert stage.name == "two"
    assert weights.opt == {}
    assert same(weights.params, state.params)
    assert same(weights.ema, state.ema)


def test_a_finished_run_returns_at_once(undisturbed: tuple[Path, State]) -> None:
    outdir, state = undisturbed
    calls: list[int] = []
    hook = Hook(1, lambda stage, step, state, frozen: calls.append(step))
    again = train(scripts.config(), outdir, frozen=teacher(), hooks=(hook,))
    assert same(again, state)
    assert calls == []


@pytest.mark.parametrize("step", [3, 30, 41])
def test_stopped_in_either_stage_and_gone_on(undisturbed: tuple[Path, State], tmp_path: Path, step: int) -> None:
    train(scripts.config(), tmp_path, frozen=teacher(), stop_after=step)
    state = train(scripts.config(), tmp_path, frozen=teacher())
    assert same(state, undisturbed[1])


def test_sigterm_saves_and_leaves(undisturbed: tuple[Path, State], tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="SIGTERM after step 33") as caught:
        train(scripts.config(), tmp_path, frozen=teacher(), hooks=(scripts.killed_at(33, signal.SIGTERM),))
    assert caught.value.signal == signal.SIGTERM
    assert int(load_weights(tmp_path).step) == 3
    assert same(train(scripts.config(), tmp_path, frozen=teacher()), undisturbed[1])


def test_sigkill(undisturbed: tuple[Path, State], tmp_path: Path) -> None:
    """Killed four steps after a checkpoint in the second stage; its steps are made again."""
    ((status, text),) = ended(_script("main", tmp_path / "run", 39, tmp_path / "cache"))
    assert status == -signal.SIGKILL, text
    state = train(scripts.config(), tmp_path / "run", frozen=teacher())
    assert same(state, undisturbed[1])
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_sigkill_at_random_moments(undisturbed: tuple[Path, State], tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(6):
        process = _script("main", tmp_path / "run", 0, tmp_path / "cache")
        time.sleep(draw.uniform(2.0, 9.0))
        process.kill()
        process.wait()
    ((status, text),) = ended(_script("main", tmp_path / "run", 0, tmp_path / "cache"))
    assert status == 0, text
    assert same(train(scripts.config(), tmp_path / "run", frozen=teacher()), undisturbed[1])


def test_eight_devices_train_as_one(tmp_path: Path) -> None:
    check_devices("tests.training.scripts:build", tmp_path, steps=6)
    # a checkpoint cut over eight devices goes on on one
    task, data, frozen = scripts.build()
    wider = run(task, data, frozen, tmp_path / "run1", batch=8, steps=10)
    straight = run(task, data, frozen, tmp_path / "straight", batch=8, steps=10)
    for a, b in zip(jax.tree.leaves(wider), jax.tree.leaves(straight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def _two_processes(outdir: Path, *options: object) -> list[tuple[int, str]]:
    port = free_port()
    return ended(*(_script("two_processes", outdir, port, i, *options, env=devices(2)) for i in (0, 1)))


@pytest.mark.slow
def test_two_processes_train_as_one_and_leave_together(undisturbed: tuple[Path, State], tmp_path: Path) -> None:
    """A notice of preemption to one of the processes makes both save at one step; the next start goes on."""
    pair = _two_processes(tmp_path, 6)
    assert [status for status, _ in pair] == [3, 3], pair
    stops = [re.findall("stopped by SIGTERM after step ([0-9]+)", text) for _, text in pair]
    assert len(stops[0]) == 1
    assert stops[0] == stops[1]
    assert 6 <= int(load_weights(tmp_path).step) == int(stops[0][0]) < 30
    pair = _two_processes(tmp_path)
    assert [status for status, _ in pair] == [0, 0], pair
    state = load_weights(tmp_path)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(undisturbed[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_microbatches_train_alike(undisturbed: tuple[Path, State], tmp_path: Path) -> None:
    state = train(scripts.config(), tmp_path, frozen=teacher(), batch_gpu=4)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(undisturbed[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_few_bad_batches_are_skipped(tmp_path: Path) -> None:
    state = run(ToyTask(), ToyData(bad_from=5, bad_to=8), teacher(), tmp_path, batch=8, steps=12)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    skipped = {r["step"]: r.get("fake_score/skipped", r.get("student/skipped")) for r in read_metrics(tmp_path)}
    assert [step for step, value in skipped.items() if value] == [6, 7, 8]
    assert int(state.opt["fake_score"]["updates"]) == 10 - 3


def test_too_many_bad_batches_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(GenError, match=r"not finite for 3 steps in a row, up to step 8; .*step-8.npz; checkpoint 4 is"):
        run(ToyTask(), ToyData(bad_from=5), teacher(), tmp_path, batch=8, steps=50, nan_patience=3, checkpoint_every=4)
    with np.load(tmp_path / "nonfinite-step-8.npz") as dump:
        assert np.isnan(dump["x"]).any()
        assert int(dump["step"]) == 8
    weights = load_weights(tmp_path)
    assert int(weights.step) >= 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))


def test_a_task_that_forgets_to_copy_does_not_delete_the_teacher(tmp_path: Path) -> None:
    frozen = teacher()
    run(ToyTask(alias=True), ToyData(), frozen, tmp_path, batch=8, steps=2)
    assert same(frozen, teacher())


def test_frozen_arrays_outlive_the_run(undisturbed: tuple[Path, State]) -> None:
    frozen = teacher()
    before = jax.device_get(tree_copy(frozen))
    train(scripts.config(), undisturbed[0], frozen=frozen)
    assert same(frozen, before)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(GenError, match=f"in use by pid {os.getpid()}"):
        run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=2)


def test_another_configuration_is_refused(undisturbed: tuple[Path, State]) -> None:
    outdir, _ = undisturbed
    config = scripts.config()
    one, two = config.stages
    for other, text in [
        (
            dataclasses.replace(
                config, stages=(dataclasses.replace(one, task=ToyTask(optim=dataclasses.replace(OPTIM, lr=0.5))), two)
            ),
            r"task\.optim\.lr = 0\.01",
        ),
        (dataclasses.replace(config, stages=(dataclasses.replace(one, batch=8), two)), r"stages\[0\]\.batch = 16"),
        (dataclasses.replace(config, engine=dataclasses.replace(config.engine, seed=1)), "seed = 0, this run has 1"),
        (dataclasses.replace(config, frozen={"teacher": "other"}), r"frozen\.teacher = toy"),
        (dataclasses.replace(config, stages=(one,)), "stages"),
        (dataclasses.replace(config, stages=(one, dataclasses.replace(two, steps=5))), "50 already done"),
    ]:
        with pytest.raises(GenError, match=text):
            train(other, outdir, frozen=teacher())
    assert json.loads((outdir / "config.json").read_text())["engine"]["seed"] == 0


def test_a_run_may_be_made_longer_and_logged_otherwise(tmp_path: Path) -> None:
    run(ToyTask(), ToyData(), teacher(), tmp_path / "grown", batch=8, steps=6)
    grown = run(ToyTask(), ToyData(), teacher(), tmp_path / "grown", batch=8, steps=11, log_every=5)
    straight = run(ToyTask(), ToyData(), teacher(), tmp_path / "straight", batch=8, steps=11)
    assert same(grown, straight)


def test_changed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=6, stop_after=3)
    monkeypatch.setattr(ToyData, "identity", lambda self: "other")
    with pytest.raises(GenError, match=r"data of stage 'only' changed .*was toy-0, is other"):
        run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": 0}, "batch 0 does not divide"),
        ({"batch": 8, "batch_gpu": 3}, "batch-gpu 3"),
        ({"batch": 8, "mesh": MeshConfig(data=3)}, "mesh data=3 .* does not fit"),
    ],
)
def test_bad_layouts_are_refused_before_anything_is_written(tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(GenError, match=text):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "run", steps=2, **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GenError, match=r"cannot write .*; free space or choose another output folder"):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "file" / "run", batch=8, steps=2)


def test_bad_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GenError, match="data 'x' of stage 'only' holds NaN"):
        run(ToyTask(), ToyData(bad_from=0), teacher(), tmp_path / "nan", batch=8, steps=2)
    monkeypatch.setattr(ToyData, "batches", lambda self, **_: iter([{"x": np.zeros((3, 8), np.float32)}]))
    with pytest.raises(GenError, match="expected 8 rows"):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "rows", batch=8, steps=2)


def test_bad_configurations_are_refused() -> None:
    stage = Stage("one", ToyTask(), 1, 8, ToyData())
    with pytest.raises(GenError, match="different names"):
        RunConfig("run", (stage, stage))
    with pytest.raises(GenError, match="0 steps"):
        RunConfig("run", (dataclasses.replace(stage, steps=0),))
    with pytest.raises(GenError, match="at least 1"):
        EngineConfig(log_every=0)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    """Something takes the place of the checkpoint folder: the file system refuses to write there."""
    folder = tmp_path / "checkpoints"

    def break_it(stage: str, step: int, state: Any, frozen: Any) -> None:
        if step == 6:
            deadline = time.monotonic() + 30
            while not (folder / "4" / "meta" / "metadata").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            folder.rename(tmp_path / "kept")
            folder.write_text("")

    with pytest.raises(GenError, match=r"cannot write .*checkpoints: Not a directory") as caught:
        run(
            ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=20, checkpoint_every=4, hooks=(Hook(1, break_it),)
        )
    assert "\n" not in str(caught.value)
    folder.unlink()
    (tmp_path / "kept").rename(folder)
    straight = run(ToyTask(), ToyData(), teacher(), tmp_path / "straight", batch=8, steps=20)
    assert same(run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=20), straight)


def test_dry_run_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = jax.eval_shape(teacher)
    lines = dry_run(scripts.config(), frozen=shapes, devices=4)
    assert capsys.readouterr().out.splitlines() == lines
    assert "student 72, fake_score 72" in lines[0] or "fake_score 72, student 72" in lines[0]
    assert "data=4" in lines[0]
    with pytest.raises(GenError, match="does not divide"):
        dry_run(scripts.config(), frozen=shapes, devices=3)


def test_profile(tmp_path: Path) -> None:
    run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=6, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_status_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=6, quiet=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage 'only': ")
    assert sum(line.startswith("compiled '") for line in lines) == 2
    assert re.fullmatch(r"only 6/6  [\d,]+ img/s  0s left  fake score loss \S+  student loss \S+", lines[-1])


def test_checkpoints_are_not_closer_than_asked(tmp_path: Path) -> None:
    options = {"checkpoint_every": 1, "checkpoint_seconds": 1e6, "keep": 9}
    run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=4, **options)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_previews_on_the_way(tmp_path: Path) -> None:
    run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=5, preview_every=2)
    names = sorted(p.name for p in (tmp_path / "previews").iterdir())
    assert names == [f"only-000000{step}-weights.png" for step in (2, 4, 5)]


def test_hooks_are_logged_and_choose_the_best(tmp_path: Path) -> None:
    scores = {2: 5.0, 4: 1.0, 6: 3.0, 8: 4.0}
    hook = Hook(2, lambda stage, step, state, frozen: {"score": scores[step]})
    run(
        ToyTask(),
        ToyData(),
        teacher(),
        tmp_path,
        batch=8,
        steps=8,
        hooks=(hook,),
        best="score",
        keep=1,
        checkpoint_every=2,
    )
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()} == {4, 8}
    assert [r["score"] for r in read_metrics(tmp_path) if "score" in r] == list(scores.values())


def test_scores_and_pictures_are_left_out_of_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def passes(seconds: float, answer: Any) -> Any:
        clock[0] += seconds
        return answer

    for module in (engine, meter):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(ToyTask, "select", lambda task, step: passes(2.0, "student"))
    monkeypatch.setattr(_Leg, "_write_preview", lambda leg, step, state: passes(100.0, None))
    hook = Hook(1, lambda *_: passes(30.0, None))
    run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=4, preview_every=2, hooks=(hook,))
    rates = [record["images_per_second"] for record in read_metrics(tmp_path)]
    assert rates[0] is None, "the first step compiles"
    assert rates[1:] == [4.0, 4.0, 4.0]


def test_a_run_of_skipped_steps_alone_does_not_end_as_finished(tmp_path: Path) -> None:
    """Fewer steps than the patience: nothing was learned, and no checkpoint says that it was."""
    broken = {"teacher": {"w": jnp.full((SIZE, SIZE), jnp.nan), "b": jnp.zeros(SIZE)}}
    with pytest.raises(GenError, match=r"'student' were not finite for 3 steps in a row, up to step 3") as caught:
        run(ToyTask(ratio=1), ToyData(), broken, tmp_path, batch=8, steps=3, nan_patience=10)
    assert "checkpoint" not in str(caught.value)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_hooks_and_pictures_that_fail_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is said in a line; the hooks after it are called, checkpoints are written, the run ends."""

    def fails(*_: Any) -> Any:
        raise ValueError("\nno weights\nmore")

    monkeypatch.setattr(ToyTask, "preview", fails)
    hooks = (Hook(2, fails), Hook(2, lambda stage, step, state, frozen: {"score": float(step)}))
    state = run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=4, preview_every=2, hooks=hooks, quiet=False)
    assert int(state.step) == 4
    assert [r["score"] for r in read_metrics(tmp_path) if "score" in r] == [2.0, 4.0]
    assert int(load_weights(tmp_path).step) == 4
    lines = capsys.readouterr().out.splitlines()
    for step in (2, 4):
        assert f"step {step}: a hook failed: ValueError: no weights" in lines
        assert f"step {step}: no pictures: ValueError: no weights" in lines


def test_arrays_to_start_from_are_taken_where_they_fit(tmp_path: Path) -> None:
    """The role "start": the first stage's first part begins there; programs do not get it."""
    start = {"w": jnp.full((SIZE, SIZE), 0.25), "b": jnp.ones(3)}
    task = ToyTask(optim=dataclasses.replace(OPTIM, lr=0.0))
    state = run(task, ToyData(), {**teacher(), "start": start}, tmp_path, batch=8, steps=2)
    np.testing.assert_array_equal(state.params["student"]["w"], start["w"])
    np.testing.assert_array_equal(state.params["student"]["b"], np.zeros(SIZE))
    assert np.abs(state.params["fake_score"]["w"] - 0.25).max() > 0.1


def test_a_program_that_changes_types_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halves(task: Any, state: Any, *_: Any) -> Any:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
        return dataclasses.replace(state, params=params), {"loss": jnp.zeros(())}

    monkeypatch.setattr(ToyTask, "fake_score", halves)
    with pytest.raises(TypeError, match=r"'fake_score' changes the types of the state: .*float32.* became bfloat16"):
        run(ToyTask(), ToyData(), teacher(), tmp_path, batch=8, steps=2)
