"""Teachers of the combination matrix: one of every family of networks, tiny, with random weights; and its table."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gen.data import loader
from gen.data.sources import ArraySource
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.edm2_unet import EDM2Config
from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.backbones.lamamba import LaMambaConfig
from gen.diffusion.backbones.lightningdit import LightningDiTConfig
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.process import EDM, Linear
from gen.diffusion.train import DenoiserTask
from gen.experiments import find
from gen.nn.conditions import make_conditions
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.records import Solved, make_records
from gen.sampling.solvers import Euler
from gen.training.run import RunConfig
from gen.training.task import Stage

CLASSES, ROWS = 3, 16
_SMALL: dict[str, Any] = {"channels": 3, "num_classes": CLASSES}
_FLAT: dict[str, Any] = {"remat": "none", "scan": False, **_SMALL}
_VELOCITY = Predict("velocity", scale=10.0)  # slow features of time, for methods that differentiate in it

# title -> the teacher
TEACHERS: dict[str, Denoiser] = {
    "EDM U-Net, pixels": Denoiser(
        SongUNetConfig(8, width=8, mult=(1, 2), emb=2, blocks=1, attention=(4,), remat="none", **_SMALL),
        EDM(),
        EDMPrecondition(),
    ),
    "EDM2 U-Net, latents": Denoiser(
        EDM2Config(8, widths=(8, 16), blocks=1, attention=(4,), head_width=8, remat="none", **_SMALL),
        EDM(),
        EDMPrecondition(),
    ),
    "DiT, 1D latents": Denoiser(DiTConfig((4,), patch=1, width=16, depth=2, heads=2, **_FLAT), Linear(), _VELOCITY),
    "LightningDiT, latents": Denoiser(
        LightningDiTConfig((4, 4), patch=2, width=16, depth=2, heads=2, **_FLAT), Linear(), _VELOCITY
    ),
    "LaMamba, latents": Denoiser(
        LaMambaConfig((8, 8), 3, 1, 8, (1, 1, 1, 1), 1, False, (2,) * 4, window=4, num_classes=CLASSES, scan=False),
        Linear(),
        _VELOCITY,
    ),
}


@dataclasses.dataclass(frozen=True)
class MatrixRows:
    """Random latents with every class in turn, from (seed, step, row) alone."""

    shape: tuple[int, ...]

    def source(self) -> ArraySource:
        rng = np.random.default_rng(0)
        latent = rng.normal(size=(ROWS, *self.shape)).astype(np.float32)
        return ArraySource(latent=latent, label=np.arange(ROWS, dtype=np.int32) % CLASSES)

    def batches(
        self, *, batch: int, seed: int, start: int, process: int = 0, processes: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        given = {"batch": batch, "seed": seed, "start": start, "process": process, "processes": processes}
        return loader.batches(self.source(), **given)

    def identity(self) -> str:
        return f"matrix rows {self.shape}"


def teacher(title: str) -> Loaded:
    """A run of that teacher, as `gen.load` would give it; its weights are random."""
    denoiser = TEACHERS[title]
    data = MatrixRows(tuple(denoiser.network.shape))
    stage = Stage("teacher", DenoiserTask(denoiser), 1, 4, data)
    config = RunConfig("teacher", (stage,), sampler=Sampler(Euler(), steps=4))
    return Loaded(Path("teacher"), config, {"net": denoiser.net.init(jax.random.key(0))}, "ema", 1)


def pairs(loaded: Loaded, folder: Path) -> str:
    """Stored pairs of the teacher."""
    generator = loaded.generator
    make_records(
        Solved(generator),
        loaded.params,
        folder,
        count=ROWS,
        maker=loaded.origin,
        cond=make_conditions(generator.conditions, np.arange(ROWS)),
        batch=ROWS,
    )
    return str(folder)


def recipe(method: str, loaded: Loaded, folder: Path, steps: int = 2) -> Any:
    """The recipe of a method's preset for the teacher, cut to a few steps of four samples."""
    preset = find(method)
    given = {"teacher": loaded} | ({"data": pairs(loaded, folder)} if "data" in preset.required else {})
    found = getattr(preset.load(), preset.function)(**given)
    stages = tuple(dataclasses.replace(stage, steps=steps, batch=4) for stage in found.config.stages)
    engine = dataclasses.replace(found.config.engine, quiet=True, log_every=1, checkpoint_every=1)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, stages=stages, engine=engine))


def table(methods: Sequence[str], refused: Mapping[tuple[str, str], str]) -> str:
    """The matrix as docs/distillers.md shows it: what a teacher's student is trained with, and what is refused."""
    rows = [["method", *TEACHERS], ["---"] * (1 + len(TEACHERS))]
    rows += [[f"`{m}`", *("refused" if (m, title) in refused else "trains" for title in TEACHERS)] for m in methods]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
