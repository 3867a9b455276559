"""DiffFit: a trained diffusion transformer brought to new classes by its biases and a few factors (Xie et al. 2023).

arXiv 2304.06648. Trained are biases, norms, the label table and scale factors on the two branches of every block; the
rest is the frozen teacher's. Paper recipe: DiT-XL/2 of ImageNet-256, a new label table of the data's classes, DiT's own
loss, AdamW at 1e-3 without decay, 24,000 updates of 256, EMA and label dropout as in DiT. `lora` and `bitfit` stand
beside it, and `full_tuning`, all parameters at a tenth of the rate, which is what they are held against.

The data are encoded with the teacher's tokenizer (gen encode), whatever normaliser their cache has.

Expected (FID on the new data sets, mean of eight; recalled from the paper's table 1, a leaderboard confirms most of the
DiffFit row): full 16.59, BitFit 16.82, DiffFit 15.39 with 0.83M of 673.8M parameters. Not reproduced here yet.
"""

import dataclasses
from typing import Any

import numpy as np

from gen.data.random import RANDOM
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._students import latent_arrays, student_data
from gen.finetune.adapt import AdaptTask
from gen.finetune.difffit import DiffFit
from gen.finetune.lora import LoRA
from gen.runs import Loaded
from gen.tokenizers.encode import expect_maker
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Model, Stage

__all__ = ["ALL", "PRESETS", "adapted"]

ALL = DiffFit(train=("*",), scales=())  # every parameter learns


def adapted(
    name: str,
    teacher: Loaded,
    data: str,
    adapter: Any,
    *,
    optim: OptimConfig,
    average: Constant,
    updates: int,
    batch: int,
    engine: EngineConfig | None = None,
) -> Recipe:
    """Gives the recipe of a teacher adapted to the data.

    The network gets as many classes as the data have; it keeps the teacher's table where they are as many.

    Raises GenError for latents that another tokenizer made, and for a normaliser that differs from place to place.
    """
    source, denoiser = student_data(data, teacher), teacher.denoiser
    classes = source.source().num_classes if data != RANDOM else None
    if denoiser.network.num_classes and classes and classes != denoiser.network.num_classes:
        network = dataclasses.replace(denoiser.network, num_classes=classes)
        denoiser = dataclasses.replace(denoiser, network=network)
    settings: dict[str, Any] = {"optim": optim, "emas": (average,)}
    settings["dropout"] = 0.1 if denoiser.network.num_classes and denoiser.network.null_class else 0.0
    kept = latent_arrays(teacher)
    if "tokenizer" in kept and hasattr(source, "tokenizer"):
        expect_maker(source, teacher.tokenizer, kept["tokenizer"])
    scales = {} if data == RANDOM else _rescaled(source, teacher)
    task = AdaptTask(denoiser, adapter=adapter, **settings, **scales)
    frozen = {"teacher": teacher.params["net"]}
    config = RunConfig(
        name,
        (Stage("adapt", task, updates, batch, source),),
        {"teacher": teacher.origin},
        teacher.config.sampler,
        teacher.config.tokenizer,
        engine=engine or EngineConfig(checkpoint_every=100, log_every=20),
    )
    return Recipe(config, frozen=frozen, artifacts={**kept, **frozen})


def _rescaled(source: Any, teacher: Loaded) -> dict[str, tuple[float, ...]]:
    """The settings that bring the data's latents to the teacher's scale; {} where they are on it."""
    own = teacher.params.get("normalizer")
    if own is None or not hasattr(source, "normalizer"):
        return {}
    given = source.normalizer()
    wide = {key: np.asarray(value, np.float64) for key, value in own.items()}
    if wide["scale"].ndim > 1 or np.ndim(given["scale"]) > 1:
        raise GenError("latents normalised place by place cannot be brought to another scale; encode them as before")
    scale = np.asarray(given["scale"], np.float64) / wide["scale"]
    shift = (np.asarray(given["shift"], np.float64) - wide["shift"]) / wide["scale"]
    if np.allclose(scale, 1.0) and np.allclose(shift, 0.0):
        return {}
    return {"shift": tuple(shift.tolist()), "scale": tuple(scale.tolist())}


def _laptop(lr: float) -> dict[str, Any]:
    return {
        "optim": OptimConfig(lr, betas=(0.9, 0.99), schedule="cosine", warmup=20, final=0.05, clip=1.0),
        "average": Constant(0.99, warmup=True),
    }


def difffit(teacher: Loaded, data: str, *, updates: int = 1500, batch: int = 128) -> Recipe:
    """Any DiT: DiffFit on new data, a minute on a laptop for the demo's teacher (data: its latents, or images)."""
    return adapted("difffit", teacher, data, DiffFit(), updates=updates, batch=batch, **_laptop(1e-2))


def bitfit(teacher: Loaded, data: str, *, updates: int = 1500, batch: int = 128) -> Recipe:
    """Any DiT: biases and the label table alone, the baseline of DiffFit (data: as for difffit)."""
    return adapted("bitfit", teacher, data, DiffFit(scales=()), updates=updates, batch=batch, **_laptop(1e-2))


def lora(teacher: Loaded, data: str, *, updates: int = 1500, batch: int = 128) -> Recipe:
    """Any DiT: low-rank changes of the attention's matrices, and the label table (data: as for difffit)."""
    return adapted("lora", teacher, data, LoRA(), updates=updates, batch=batch, **_laptop(5e-3))


def full_tuning(teacher: Loaded, data: str, *, updates: int = 1500, batch: int = 128) -> Recipe:
    """Any diffusion or flow model: all parameters on new data, the baseline of DiffFit (data: as for difffit)."""
    return adapted("full-tuning", teacher, data, ALL, updates=updates, batch=batch, **_laptop(1e-3))


def difffit_smoke(teacher: Loaded, data: str) -> Recipe:
    """Any DiT: a few steps of DiffFit, which check the path and not the quality (data: as for difffit)."""
    return adapted("difffit-smoke", teacher, data, DiffFit(), updates=20, batch=32, **_laptop(1e-2))


def _paper(name: str, teacher: Loaded, data: str, batch: int, updates: int) -> Recipe:
    settings: dict[str, Any] = {"optim": OptimConfig(1e-3), "average": Constant(0.9999)}
    engine = EngineConfig(checkpoint_every=1000, log_every=100)
    return adapted(name, teacher, data, DiffFit(), updates=updates, batch=batch, engine=engine, **settings)


def difffit_dit(teacher: Loaded, data: str) -> Recipe:
    """DiT-XL/2 on another class-conditional set, 24k updates of 256 on 8 GPUs (data: a latent cache of it)."""
    return _paper("difffit-dit", teacher, data, 256, 24_000)


def difffit_dit_gpu(teacher: Loaded, data: str) -> Recipe:
    """The same on one GPU, in batches of 64 and four times the updates (data: a latent cache of it)."""
    return _paper("difffit-dit-gpu", teacher, data, 64, 96_000)


def difffit_512(teacher: Loaded, data: str) -> Recipe:
    """DiT-XL/2 from 256 to 512 px: the new grid on the old coordinates (data: a latent cache of 512 px images)."""
    network = teacher.denoiser.network
    larger = dataclasses.replace(network, size=tuple(2 * n for n in network.size), spacing=network.spacing / 2)
    denoiser = dataclasses.replace(teacher.denoiser, network=larger)
    config = dataclasses.replace(teacher.config, stages=(), models={"net": Model(denoiser)})
    wide = dataclasses.replace(teacher, config=config)
    return _paper("difffit-512", wide, data, 256, 125_000)


PRESETS = {
    "difffit": difffit,
    "bitfit": bitfit,
    "lora": lora,
    "full-tuning": full_tuning,
    "difffit-smoke": difffit_smoke,
    "difffit-dit": difffit_dit,
    "difffit-dit-gpu": difffit_dit_gpu,
    "difffit-512": difffit_512,
}
