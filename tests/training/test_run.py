"""What the configuration of a run refuses, before anything is trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gen.data.images import Arrays
from gen.errors import GenError
from gen.training.run import RunConfig, load_config, semantic, settle_config
from gen.training.task import Stage
from tests.training import scripts
from tests.training.conformance import run
from tests.training.toy import OPTIM, SIZE, LinearConfig, ToyData, ToyTask, teacher


def test_a_stage_that_goes_on_with_another_model_is_refused() -> None:
    config = scripts.config()
    one, two = config.stages
    other = dataclasses.replace(two, task=ToyTask(network=LinearConfig(SIZE + 1)))
    text = r"stage 'two' goes on with the 'net' of stage 'one', but its network\.width is 9 and not 8; change both"
    with pytest.raises(GenError, match=text):
        dataclasses.replace(config, stages=(one, other))
    both = dataclasses.replace(one, task=ToyTask(network=LinearConfig(SIZE + 1)))
    dataclasses.replace(config, stages=(both, other))


def test_a_schedule_over_the_stage_cannot_be_extended(tmp_path: Path) -> None:
    """Its end is part of what was computed; a run without such a schedule may grow (test_engine)."""
    task = ToyTask(optim=dataclasses.replace(OPTIM, schedule="cosine"))
    run(task, ToyData(), teacher(), tmp_path, batch=8, steps=4)
    text = r"was trained with a schedule over 4 steps of stage 'only', which cannot become 6: .*--from"
    with pytest.raises(GenError, match=text):
        run(task, ToyData(), teacher(), tmp_path, batch=8, steps=6)
    assert load_config(tmp_path).steps == 4
    run(task, ToyData(), teacher(), tmp_path, batch=8, steps=4)


def test_a_run_that_has_no_checkpoint_may_still_become_longer(tmp_path: Path) -> None:
    for steps in (4, 6):
        task = ToyTask(optim=dataclasses.replace(OPTIM, schedule="linear"))
        settle_config(RunConfig("run", (Stage("only", task, steps, 8, ToyData()),)), tmp_path, write=True)
    assert load_config(tmp_path).steps == 6


def test_how_a_run_is_sampled_is_no_part_of_what_was_computed() -> None:
    config = scripts.config()
    changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, log_every=3, quiet=False))
    assert semantic(changed) == semantic(config)
    assert semantic(dataclasses.replace(config, engine=dataclasses.replace(config.engine, seed=3))) != semantic(config)


def test_folders_of_the_first_version_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"name": "old", "generator": {}}))
    with pytest.raises(GenError, match=r"written by gen 0\.1.*pip install gen-image==0\.1\.0"):
        load_config(tmp_path)
    with pytest.raises(GenError, match="is not a run folder"):
        load_config(tmp_path / "nothing")


def test_a_trained_run_takes_its_models_from_its_task() -> None:
    stage = Stage("one", ToyTask(), 1, 8, ToyData())
    with pytest.raises(GenError, match="has stages and models"):
        RunConfig("run", (stage,), models=ToyTask().models())
    assert RunConfig("run", (stage,)).exported() == ToyTask().models()
    assert RunConfig("run", (stage,)).generator() is None


def test_the_data_of_a_run_may_move_but_not_change(tmp_path: Path) -> None:
    def once(data: Arrays) -> None:
        run(ToyTask(), data, teacher(), tmp_path / "run", batch=8, steps=1)

    rows = {"x": np.ones((16, SIZE), np.float32)}
    np.savez(tmp_path / "a.npz", **rows)
    once(Arrays(str(tmp_path / "a.npz")))
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    once(Arrays(str(tmp_path / "b.npz")))
    assert load_config(tmp_path / "run").stages[0].data.path == str(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", **{name: array + 1 for name, array in rows.items()})
    with pytest.raises(GenError, match=r"not those it was trained on, which lay at .*b\.npz .*c\.npz holds"):
        once(Arrays(str(tmp_path / "c.npz")))
