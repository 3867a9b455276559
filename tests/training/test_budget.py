"""What a run needs on a device, and the refusal of what cannot fit."""

import re
from pathlib import Path

import jax
import pytest

from gen.errors import GenError
from gen.training.budget import Memory, abstract_states, describe, device_bytes, held, refuse
from gen.training.run import EngineConfig
from tests.training import scripts
from tests.training.conformance import run
from tests.training.toy import ToyData, ToyTask, teacher

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
NETWORK = 4 * 72  # bytes of one network of the toy


def test_state_and_frozen_arrays_are_counted() -> None:
    (stage, _), (state, _) = scripts.config().stages, abstract_states(scripts.config().stages, jax.eval_shape(teacher))
    found = held(state, jax.eval_shape(teacher), ONE, 1)
    assert (found.parameters, found.averages, found.frozen) == (2 * NETWORK, 2 * NETWORK, NETWORK)
    assert found.optimisers == pytest.approx(4 * NETWORK, abs=20)  # two moments of two networks, two counts of each
    assert found.total == sum((found.parameters, found.averages, found.frozen, found.optimisers))
    cut = held(state, {}, ONE | {"fsdp": 4}, 1)
    assert cut.parameters == pytest.approx(found.parameters / 4, abs=16)
    line = describe(stage, state, jax.eval_shape(teacher), ONE, 1)
    assert line.startswith("stage 'one': ")
    assert "parameters 576 B" in line


def test_refusal_names_the_largest_part_and_what_helps() -> None:
    gib = 2**30
    refuse("x", Memory(gib, gib, gib, 0, 0), None, ONE)
    refuse("x", Memory(gib, gib, gib, 0, 0), 3 * gib, ONE)
    with pytest.raises(GenError, match=re.escape("needs 3 GiB per device, 2 GiB of it optimisers")) as caught:
        refuse("x", Memory(gib, 2 * gib, 0, 0, 0), 2 * gib, ONE)
    assert "--engine.mesh.fsdp, now 1" in str(caught.value)
    with pytest.raises(GenError, match="--batch-gpu N"):
        refuse("x", Memory(gib, 0, 0, 0, 0, 5 * gib), 2 * gib, ONE)


def test_a_size_of_memory_that_is_none() -> None:
    with pytest.raises(GenError, match="memory_gib is -1"):
        EngineConfig(memory_gib=-1)


def test_training_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(GenError, match=r"stage 'only' needs .* GiB per device"):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "a", batch=8, steps=2, memory_gib=1e-6)
    # the state fits, the compiled step does not
    state = jax.eval_shape(ToyTask().init, jax.random.key(0), teacher(), None)
    room = (held(state, teacher(), ONE, 1).total + 8) / 2**30
    with pytest.raises(GenError, match=r"a step of '.*' needs .* GiB of it temporaries"):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "b", batch=4096, steps=2, memory_gib=room)
    assert not list((tmp_path / "b" / "checkpoints").glob("[0-9]*"))


def test_the_machine_has_memory() -> None:
    assert device_bytes(2.0) == 2**31
    found = device_bytes()
    assert found is not None
    assert 2**26 < found < 2**44
