"""Encoding and reconstructing in processes of their own, for tests that kill them or need several devices."""

import dataclasses
import os
import signal
import sys
from typing import Any

import jax
import numpy as np

from gen.data.sources import ArraySource, digits
from gen.metrics.sources import from_arrays
from gen.nn.network import Network
from gen.tokenizers.encode import encode_images
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.reconstruct import evaluate_reconstruction, reconstructions
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.training.indexed import ArrayWriter
from gen.training.sharding import MeshConfig, batch_sharding, make_mesh

COUNT = 120
LATENTS = TiTokConfig((8, 8, 1), 4, 4, 3, Tower(16, 1, 4), Tower(16, 1, 4), scan=False)
TOKENS = dataclasses.replace(LATENTS, channels=None, quantizer=VQ(32, 3))
BOTH = {"latents": LATENTS, "tokens": TOKENS}


def images() -> ArraySource:
    rows = digits("train").gather(np.arange(COUNT))
    return ArraySource(**rows)


def params(tokenizer: TiTokConfig) -> Any:
    """Random weights, the codes as far apart as the vectors, so that ids vary."""
    found = jax.jit(Network(tokenizer).init)(jax.random.key(3))
    if tokenizer.quantizer is not None:
        found["quantizer"]["embedding"] = jax.random.normal(jax.random.key(4), (32, 3))
    return jax.device_get(found)


def encode(out: str, mesh: Any = None, names: tuple[str, ...] = ("latents", "tokens")) -> None:
    """Caches of latents and of tokens, with mirror images, in OUT/latents and OUT/tokens."""
    for name in names:
        tokenizer, own = BOTH[name], params(BOTH[name])
        encode_images(tokenizer, own, images(), f"{out}/{name}", batch=16, mesh=mesh, label="", flip=True)


def reconstruct(out: str, mesh: Any = None) -> None:
    """The images after both tokenizers with their scores, in OUT/latents.npz and OUT/tokens.npz."""
    rows = images().gather(np.arange(COUNT))
    source = from_arrays(rows["image"], rows["label"], quantiser="round")
    for name, tokenizer in BOTH.items():
        made = reconstructions(tokenizer, params(tokenizer), source, identity=name)
        found = evaluate_reconstruction(
            made, source, None, name="digits", tokenizer=tokenizer, keep=True, batch=16, mesh=mesh
        )
        if jax.process_index() == 0:
            np.savez(f"{out}/{name}.npz", images=found.images, labels=found.labels, **found.result.values)


def encode_and_reconstruct(out: str, mesh: Any = None) -> None:
    """The caches, then the reconstructions."""
    encode(out, mesh)
    reconstruct(out, mesh)


def codebooks(out: str) -> None:
    """What vector quantizers make of one batch that all devices share, in OUT."""
    mesh, z = make_mesh(MeshConfig()), 3.0 * jax.random.normal(jax.random.key(0), (16, 4, 3))
    found = {}
    with jax.set_mesh(mesh):
        z, keys = jax.device_put((z, jax.random.split(jax.random.key(1), 16)), batch_sharding(mesh))
        for restart in ("none", "closest", "random"):
            for averages in (False, True):
                net = Network(VQ(8, 3, averages=averages, restart=restart))
                made = jax.jit(net)(net.init(jax.random.key(2)), z, keys)
                named = {**made.statistics, "ids": made.ids, "codes": made.codes, **made.losses}
                found |= {f"{restart} {averages} {name}": np.asarray(value) for name, value in named.items()}
    np.savez(out, **found)


def killed(out: str, rows: str) -> None:
    """Every batch is made safe on the disk; the process is killed once `rows` are written but not yet safe."""
    write = ArrayWriter.write

    def writing(self: ArrayWriter, first: int, arrays: Any) -> None:
        write(self, first, arrays)
        if first + len(arrays["label"]) >= int(rows):
            os.kill(os.getpid(), signal.SIGKILL)
        self._sync()

    ArrayWriter.write = writing
    encode(out)


def devices(out: str) -> None:
    encode_and_reconstruct(out, mesh=make_mesh(MeshConfig()))


def two_processes(out: str, port: str, process: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    encode_and_reconstruct(out, mesh=make_mesh(MeshConfig()))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
