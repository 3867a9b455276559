"""What `gen info` says of memory, against XLA; and the refusal of what cannot fit."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.memory import MESHES, NETWORK, figures
from gen.cli.train import prepare
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.errors import GenError
from gen.training import engine, memory
from gen.training.memory import Memory, refuse, remat_choices, stage_memory
from tests.training.conformance import run
from tests.training.toy import ToyData, ToyTask, teacher

ROOT = Path(__file__).parents[2]
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def test_a_toy_transformer_within_fifteen_percent() -> None:
    ours, xla, _ = figures("dit-smoke", 64, ())
    assert ours == pytest.approx(xla, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "batch", "overrides"),
    [
        *(("dit-b2", 16, ((f"{NETWORK}.remat", policy),)) for policy in ("none", "dots", "full")),
        ("edm-smoke", 64, ()),
        ("lightningdit-smoke", 64, ()),
    ],
)
def test_presets_within_fifteen_percent(preset: str, batch: int, overrides: Any) -> None:
    ours, xla, _ = figures(preset, batch, overrides)
    assert ours == pytest.approx(xla, rel=0.15)


@pytest.mark.slow
def test_presets_on_a_mesh_within_fifteen_percent() -> None:
    """Copies, and copies of parts: what one of eight devices holds and needs."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "meshes"]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = done.stdout.splitlines()
    errors = [float(row.split("|")[-2].strip(" %")) for row in rows]
    assert len(errors) == len(MESHES)
    assert max(map(abs, errors)) <= 15, rows


def test_policies_are_found_wherever_a_network_offers_them() -> None:
    task = prepare("dit-smoke", {}).config.stages[0].task
    choices = remat_choices(task)
    assert list(choices) == ["none", "dots", "full"]
    assert choices["none"] == task
    network: DiTConfig = choices["full"].denoiser.network
    assert network == dataclasses.replace(task.denoiser.network, remat="full")
    unet = remat_choices(prepare("edm-smoke", {}).config.stages[0].task)
    assert list(unet) == ["none", "full"]  # it has no other
    assert isinstance(unet["full"].denoiser.network, SongUNetConfig)
    assert remat_choices(ToyTask()) == {}


def test_recalculating_more_is_said_to_need_less() -> None:
    recipe = prepare("dit-smoke", {}, (("stages.0.task.denoiser.network.scan", "true"),))
    (stage,), (state,) = recipe.config.stages, engine.abstract_states(recipe.config, {})
    found = {}
    for policy, task in remat_choices(stage.task).items():
        found[policy] = stage_memory(dataclasses.replace(stage, task=task), state, {}, ONE, 1, platform="gpu")
    assert found["full"].activations < found["dots"].activations < found["none"].activations
    halves = stage_memory(stage, state, {}, ONE, 1, parts=2, platform="gpu")
    assert halves.activations < 0.7 * found["none"].activations
    assert halves.parameters == found["none"].parameters
    cut = stage_memory(stage, state, {}, ONE | {"fsdp": 4}, 1, platform="gpu")
    assert cut.parameters < 0.3 * halves.parameters
    assert cut.batch == pytest.approx(halves.batch / 4)


def test_refusal_names_the_largest_part_and_what_helps() -> None:
    gib = 2**30
    refuse("x", Memory(gib, gib, gib, 0, 0), None, ONE)
    refuse("x", Memory(gib, gib, gib, 0, 0), 3 * gib, ONE)
    with pytest.raises(GenError, match=re.escape("needs about 3 GiB per device, 2 GiB of it optimisers")) as caught:
        refuse("x", Memory(gib, 2 * gib, 0, 0, 0), 2 * gib, ONE)
    assert "--engine.mesh.fsdp, now 1" in str(caught.value)
    with pytest.raises(GenError, match="--batch-gpu N"):
        refuse("x", Memory(gib, 0, 0, 0, 0, 0, 5 * gib), 2 * gib, ONE)


def test_a_size_of_memory_that_is_none() -> None:
    with pytest.raises(GenError, match="memory_gib is -1"):
        engine.EngineConfig(memory_gib=-1)


def test_training_refuses_before_anything_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(GenError, match=r"stage 'only' needs about .* GiB per device"):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "a", batch=8, steps=2, memory_gib=1e-6)
    # the state fits, the step does not
    state = memory.held(jax.eval_shape(ToyTask().init, jax.random.key(0), teacher(), None), teacher(), ONE, 1)
    room = (state.total + 8) / 2**30
    with pytest.raises(GenError, match=r"a step of '.*' needs about"):
        run(ToyTask(), ToyData(), teacher(), tmp_path / "b", batch=4096, steps=2, memory_gib=room)
    assert not list((tmp_path / "b" / "checkpoints").glob("[0-9]*"))


def test_the_machine_has_memory() -> None:
    assert memory.device_bytes(2.0) == 2**31
    found = memory.device_bytes()
    assert found is not None
    assert 2**26 < found < 2**44
