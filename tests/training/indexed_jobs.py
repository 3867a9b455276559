"""Indexed jobs in their own process, for tests that kill them or need several devices or processes."""

import os
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.training.indexed import ArrayWriter, run_indexed, sample_keys
from gen.training.sharding import MeshConfig, make_mesh

COUNT, START = 101, 1000
ARGUMENTS = {"scale": np.linspace(0.5, 2.0, 3, dtype=np.float32)}


def function(arguments: Any, indices: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
    noise = jax.vmap(lambda key: jax.random.normal(key, (4, 3)))(sample_keys(7, indices))
    return {"latent": jnp.tanh(noise * arguments["scale"]), "index": indices}


def run(out: str, batch: int = 16, mesh: Any = None, identity: str = "", **options: Any) -> None:
    writer = ArrayWriter(out, COUNT, identity)
    samples = range(START, START + COUNT)
    run_indexed(function, samples, batch=batch, writer=writer, arguments=ARGUMENTS, mesh=mesh, **options)


def killed(out: str, rows: str) -> None:
    """Slow enough for rows to become safe on disk; killed once `rows` are done."""

    def pause(done: int, count: int) -> None:
        time.sleep(0.4)
        if done >= int(rows):
            os.kill(os.getpid(), signal.SIGKILL)

    run(out, on_batch=pause)


def devices(out: str, data: str, fsdp: str) -> None:
    mesh = make_mesh(MeshConfig(data=int(data), fsdp=int(fsdp)))
    with pytest.raises(GenError, match="batch 12 does not divide over 8 devices"):
        run(out, batch=12, mesh=mesh)
    run(out, mesh=mesh)


def two_processes(out: str, port: str, process: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    run(out, mesh=make_mesh(MeshConfig()))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
