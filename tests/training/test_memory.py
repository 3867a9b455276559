"""What `gen info` says of memory, against XLA; and the refusal of what cannot fit."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gen.cli.train import prepare
from gen.data.caches import seal
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.errors import GenError
from gen.training import engine, memory
from gen.training.memory import Memory, batch_shapes, compiled_bytes, refuse, remat_choices, stage_memory
from gen.training.sharding import make_mesh
from tests.training.conformance import run
from tests.training.toy import ToyData, ToyTask, teacher

ROOT = Path(__file__).parents[2]
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def latents(folder: Path) -> str:
    """A cache of random latents of the size that ImageNet-256 has."""
    np.save(folder / "latent.npy", np.random.default_rng(0).normal(size=(32, 32, 32, 4)).astype(np.float32))
    np.save(folder / "label.npy", np.arange(32, dtype=np.int32))
    seal(folder, tokenizer="none", data="none")
    return str(folder)


def both(preset: str, data: str | None = None, overrides: Any = (), batch: int | None = None) -> tuple[int, int]:
    """(our estimate, XLA's figure) of the memory of a preset's step on one device, in bytes."""
    recipe = prepare(preset, {"data": data}, tuple(overrides), {"batch": batch})
    config = recipe.config
    frozen = jax.eval_shape(lambda: dict(recipe.frozen))
    stage, state = config.stages[0], engine.abstract_states(config, frozen)[0]
    mesh, shard_from = make_mesh(config.engine.mesh), config.engine.mesh.shard_from
    ours = stage_memory(stage, state, frozen, dict(mesh.shape), shard_from).total
    (program,) = stage.task.programs.values()
    return ours, compiled_bytes(program, state, frozen, batch_shapes(stage, stage.batch), mesh, shard_from)


def on_devices(data: str, *overrides: str) -> None:
    """In a process with several simulated devices: prints both figures."""
    print(*both("dit-b2", data, [tuple(text.split("=")) for text in overrides], batch=32))


def test_a_toy_transformer_within_fifteen_percent() -> None:
    ours, xla = both("dit-smoke")
    assert ours == pytest.approx(xla, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_dit_b2_within_fifteen_percent(tmp_path: Path, remat: str) -> None:
    ours, xla = both("dit-b2", latents(tmp_path), [("stages.0.task.denoiser.network.remat", remat)], batch=16)
    assert ours == pytest.approx(xla, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["edm-smoke", "lightningdit-smoke"])
def test_other_presets_within_fifteen_percent(preset: str) -> None:
    ours, xla = both(preset)
    assert ours == pytest.approx(xla, rel=0.15)


@pytest.mark.slow
def test_a_preset_on_a_mesh_within_fifteen_percent(tmp_path: Path) -> None:
    """Copies and parts: what one of eight devices holds and needs."""
    axes = ["engine.mesh.data=2", "engine.mesh.fsdp=4"]
    script = "import sys; from tests.training.test_memory import on_devices; on_devices(*sys.argv[1:])"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, latents(tmp_path), *axes]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, xla = map(int, done.stdout.split()[-2:])
    assert ours == pytest.approx(xla, rel=0.15)


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
