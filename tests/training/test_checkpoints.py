import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.training.checkpoints import Checkpoints, best_step, latest_step, load_meta, load_weights
from gen.training.optim import OptimConfig
from gen.training.task import State


def _state(value: float = 1.0) -> State:
    params = {"net": {"blocks": {"w": jnp.full((2, 3, 4), value)}, "b": jnp.zeros(3)}, "other": {"w": jnp.ones(2)}}
    return State(jnp.int32(0), params, _optimiser(params["net"]), {}, {"count": jnp.int32(7)})


def _optimiser(params: Any) -> dict[str, Any]:
    return {"net": {"updates": jnp.int32(0), "state": OptimConfig(warmup=3, clip=1.0).transform().init(params)}}


def _target(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_round_trip_and_weights_alone(tmp_path: Path) -> None:
    state = _state()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {"stage_index": 0})
        checkpoints.wait()
        back = checkpoints.restore(3, _target(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, state))
    weights = load_weights(tmp_path)
    assert weights.opt == {}
    assert jax.tree.all(jax.tree.map(np.array_equal, weights.params, state.params))
    assert load_meta(tmp_path)["stage_index"] == 0
    assert latest_step(tmp_path) == 3


def test_which_are_kept(tmp_path: Path) -> None:
    scores = [5.0, 1.0, 4.0, 3.0, 2.0, 6.0, 7.0]
    with Checkpoints(tmp_path, keep=2, keep_every=4, best=True) as checkpoints:
        for step, score in enumerate(scores, start=1):
            checkpoints.save(step, _state(), {}, score)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 6, 7]  # best, multiple of 4, the newest two


def test_the_best_is_remembered_by_a_run_that_goes_on(tmp_path: Path) -> None:
    for scores in ({1: 5.0, 2: 1.0, 3: None}, {4: 3.0, 5: 2.0}):
        with Checkpoints(tmp_path / "checkpoints", keep=1, best=True) as checkpoints:
            for step, score in scores.items():
                checkpoints.save(step, _state(), {}, score)
            checkpoints.wait()
    assert checkpoints.steps() == [2, 5]
    assert best_step(tmp_path) == 2
    with pytest.raises(GenError, match=r"has no checkpoint with a score; train it with engine.best"):
        best_step(tmp_path / "elsewhere")


def test_other_structure_is_refused(tmp_path: Path) -> None:
    state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        with pytest.raises(GenError, match="but this task has"):
            checkpoints.restore(1, _target(State(jnp.int32(0), {"net": {"w": jnp.ones(2)}})))
        params = {"net": {"w": jnp.ones(2)}}
        other = State(jnp.int32(0), params, _optimiser(params["net"]), {}, {"count": jnp.int32(0)})
        with pytest.raises(GenError, match="cannot restore checkpoint"):
            checkpoints.restore(1, _target(other))


def test_half_written_does_not_count(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, _state(), {})
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert latest_step(tmp_path) == 1
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 1


def test_a_full_disk_is_seen_before_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, _state(), {})
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(GenError, match=r"a checkpoint takes .* free space"):
            checkpoints.save(2, _state(), {})
    assert latest_step(tmp_path) == 1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(GenError, match="no finished checkpoint"):
        load_weights(tmp_path)
