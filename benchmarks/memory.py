"""Memory of a training step: what ``gen info`` estimates against what XLA reports for the compiled step.

    python benchmarks/memory.py

Latents and images are random: only their shapes count. Nothing is allocated, the steps are compiled for CPU.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gen.cli.train import prepare
from gen.data.caches import seal
from gen.training import engine
from gen.training.memory import batch_shapes, compiled_bytes, held, stage_memory
from gen.training.sharding import make_mesh

NETWORK = "stages.0.task.denoiser.network"
# preset, batch, overrides
CASES: tuple[tuple[str, int, tuple[tuple[str, str], ...]], ...] = (
    *(("dit-b2", 16, ((f"{NETWORK}.remat", policy),)) for policy in ("none", "dots", "full")),
    ("dit-b2", 16, ((f"{NETWORK}.remat", "dots"), (f"{NETWORK}.dtype", "float32"))),
    ("edm-cifar10", 8, ()),
    ("edm-cifar10", 8, ((f"{NETWORK}.remat", "full"),)),
    ("dit-smoke", 64, ()),
    ("edm-smoke", 64, ()),
    ("lightningdit-smoke", 64, ()),
)
MESHES: tuple[tuple[str, int, tuple[tuple[str, str], ...]], ...] = (
    ("dit-b2", 32, (("engine.mesh.data", "8"),)),
    ("dit-b2", 32, (("engine.mesh.data", "2"), ("engine.mesh.fsdp", "4"))),
)


def data(folder: Path, preset: str) -> str | None:
    """What a preset reads: random latents of ImageNet-256's size, or images of CIFAR-10's; None for the digits."""
    rng, count = np.random.default_rng(0), 32
    if "smoke" in preset:
        return None
    if preset.startswith("edm"):
        np.savez(folder / "images.npz", image=rng.integers(0, 256, (count, 32, 32, 3), np.uint8))
        return str(folder / "images.npz")
    np.save(folder / "latent.npy", rng.normal(size=(count, 32, 32, 4)).astype(np.float32))
    np.save(folder / "label.npy", np.arange(count, dtype=np.int32))
    seal(folder, tokenizer="none", data="none")
    return str(folder)


def figures(preset: str, batch: int, overrides: Any) -> tuple[int, int, int]:
    """Bytes of one step on one device: our estimate, XLA's figure, and what of both the state and the batch are."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(preset, {"data": data(Path(folder), preset)}, tuple(overrides), {"batch": batch})
        config = recipe.config
        frozen = jax.eval_shape(lambda: dict(recipe.frozen))
        stage, state = config.stages[0], engine.abstract_states(config, frozen)[0]
        mesh, shard_from = make_mesh(config.engine.mesh), config.engine.mesh.shard_from
        ours = stage_memory(stage, state, frozen, dict(mesh.shape), shard_from)
        (program,) = stage.task.programs.values()
        xla = compiled_bytes(program, state, frozen, batch_shapes(stage, stage.batch), mesh, shard_from)
    return ours.total, xla, held(state, frozen, dict(mesh.shape), shard_from).total + ours.batch


def main(which: str = "all") -> None:
    """Prints one row per case; those on a mesh in a process with eight simulated devices."""
    for preset, batch, overrides in MESHES if which == "meshes" else CASES:
        ours, xla, fixed = figures(preset, batch, overrides)
        setting = ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in overrides) or "as it is"
        print(
            f"| {preset}, batch {batch}, {setting} | {fixed / 1e6:,.0f} | {(ours - fixed) / 1e6:,.0f} | "
            f"{(xla - fixed) / 1e6:,.0f} | {ours / xla - 1:+.1%} |",
            flush=True,
        )
    if which == "all":
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, __file__, "meshes"], env=os.environ | flags, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
