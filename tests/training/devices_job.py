"""Twenty steps of the demo's teacher in a process of its own, for any number of devices and processes."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from gen.data.caches import seal
from gen.data.images import Images
from gen.experiments import demo
from gen.kinds import KINDS
from gen.nn.network import Network
from gen.tokenizers.encode import tokenizer_identity
from gen.training.engine import Hook, train
from gen.training.run import RunConfig
from tests.data import files
from tests.training.conformance import compilations

STEPS, BATCH = 20, 32


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Latents, with augmented images beside them; every part of a batch that this process reads is kept."""

    latents: Any
    images: Any

    def batches(self, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        for a, b in zip(self.latents.batches(**options), self.images.batches(**options), strict=True):
            row = {**a, "image": b["image"]}
            ROWS.append(row)
            yield row

    def identity(self) -> str:
        return f"{self.latents.identity()} {self.images.identity()}"


ROWS: list[dict[str, np.ndarray]] = []


def prepare(folder: Path) -> None:
    """A cache of latents and a zip of images."""
    cache = folder / "cache"
    cache.mkdir()
    latents = np.random.default_rng(0).normal(size=(100, 4, 8)).astype(np.float32)
    np.save(cache / "latent.npy", latents)
    np.save(cache / "label.npy", np.arange(100, dtype=np.int32) % 10)
    seal(cache, tokenizer=tokenizer_identity(demo.TOKENIZER, _decoder()), data="none")
    names = [[f"00000/img{i:08d}.png", i % 3] for i in range(40)]
    files.edm_zip(folder / "images.zip", names, 40)


def _decoder() -> Any:
    return Network(demo.TOKENIZER).init(jax.random.key(0))


def recipe(folder: Path) -> Any:
    """The demo's teacher on those data; its decoder is not trained."""
    tokenizer = SimpleNamespace(tokenizer=demo.TOKENIZER, params={"tokenizer": _decoder()}, origin="none")
    made = demo.demo_teacher(tokenizer, str(folder / "cache"))
    (stage,) = made.config.stages
    # cut and mirrored anew for every step and row
    images = Images(str(folder / "images.zip"), size=8, crop="random", flip=True)
    stage = dataclasses.replace(stage, data=Recorded(stage.data, images), batch=BATCH)
    engine = dataclasses.replace(made.config.engine, log_every=1, quiet=True)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, stages=(stage,), engine=engine))


def main(folder: str, out: str, process: str, processes: str, port: str) -> None:
    """Trains; writes OUT/run, and what this process read and how often it compiled to OUT/PROCESS.npz."""
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    KINDS["recorded"] = {"recorded": f"{__name__}:Recorded"}
    made = recipe(Path(folder))
    marks: list[int] = []
    with compilations() as compiled:
        hook = Hook(1, lambda *_: marks.append(len(compiled)))
        config: RunConfig = made.config
        train(config, Path(out) / "run", artifacts=made.artifacts, hooks=(hook,), stop_after=STEPS)
    rows = {name: np.stack([row[name] for row in ROWS[:STEPS]]) for name in ROWS[0]}
    programs = np.asarray(sum("_step" in name for name in compiled))
    np.savez(Path(out) / f"{process}.npz", **rows, marks=np.asarray(marks), programs=programs)


if __name__ == "__main__":
    sys.modules["tests.training.devices_job"] = sys.modules["__main__"]
    main(*sys.argv[1:])
