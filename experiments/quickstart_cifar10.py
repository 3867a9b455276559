"""CIFAR-scale quick start: the demo's pipeline on any EDM zip of 32x32 images with classes.

Tokenizer, latents, class-conditional flow transformer, stored pairs, one-step student; every stage resumes where it
was interrupted. ``gen data convert`` makes the zip::

    python -m gen.experiments.quickstart_cifar10 cifar10.zip --smoke      seconds to minutes on a CPU: checks the path
    python -m gen.experiments.quickstart_cifar10 cifar10.zip              sized for 20 minutes of one H100-class GPU

Each stage is a preset as well (``gen list``), with ``-smoke`` at its end for the small one::

    gen train cifar10-tokenizer --data cifar10.zip
    gen encode runs/cifar10-tokenizer --data cifar10.zip --out runs/cifar10-latents
    gen train cifar10-teacher --tokenizer runs/cifar10-tokenizer --data runs/cifar10-latents
    gen distill cifar10-student --teacher runs/cifar10-teacher --pairs 50000

Expected: the smoke preset's pictures are blurs; the large preset has not been timed on its GPU. Measured figures are
in benchmarks/RESULTS.md.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from gen.data.augment import RandomAffine
from gen.data.caches import Cache
from gen.data.images import Images
from gen.data.loader import expect
from gen.data.random import RANDOM, Random
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.distill.dmd2 import DMD2Task
from gen.distill.kd import KDTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._latents import small_images
from gen.metrics.image import psnr
from gen.metrics.report import Report
from gen.plan import Made, Plan
from gen.runs import Loaded
from gen.sampling.generator import FewSteps, Sampler
from gen.sampling.guidance import ClassifierFree
from gen.sampling.records import Records
from gen.sampling.solvers import Heun
from gen.steps import Encode, MakeRecords, Train
from gen.tokenizers.encode import expect_maker
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["GPU", "PRESETS", "SMOKE", "Budget", "run"]

SIZE = 32


@dataclasses.dataclass(frozen=True)
class Budget:
    """Sizes of the networks and how long everything runs.

    Attributes:
      images: how many images are used; None for all.
      tokens, channels: of the latents; patches are 4x4 pixels.
      tower: width, depth and heads of the tokenizer's encoder and decoder.
      width, depth, heads: of the flow transformer.
      tokenizer, teacher, regression, matching: training steps.
      batch: images per step.
      pairs: stored teacher pairs.
      dtype: compute type of the matrix products.
    """

    images: int | None = None
    tokens: int = 64
    channels: int = 16
    tower: Tower = Tower(384, 6, 6)
    width: int = 512
    depth: int = 12
    heads: int = 8
    tokenizer: int = 12_000
    teacher: int = 30_000
    regression: int = 2_000
    matching: int = 1_500
    batch: int = 256
    pairs: int = 50_000
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


GPU = Budget()
SMOKE = Budget(
    images=2048, tokens=16, channels=8, tower=Tower(64, 1, 4), width=64, depth=2, heads=4, tokenizer=300, teacher=300,
    regression=40, matching=8, batch=32, pairs=256, dtype="float32",
)  # fmt: skip


def cifar10_tokenizer(data: str) -> Recipe:
    """32x32 images: a 1D tokenizer, 64 latent tokens of 16 channels (data: images, with classes or without)."""
    return _tokenizer(GPU, 0, _images(data))


def cifar10_teacher(tokenizer: Loaded, data: str) -> Recipe:
    """32x32 images: a class-conditional flow transformer over the tokenizer's latents (data: a latent cache)."""
    return _teacher(GPU, 0, tokenizer, _latents(data, tokenizer))


def cifar10_student(teacher: Loaded, data: str) -> Recipe:
    """32x32 images: a one-step student by regression and DMD2 (data: stored pairs of the teacher)."""
    return _student(GPU, 0, teacher, _pairs(data, teacher))


def cifar10_tokenizer_smoke(data: str) -> Recipe:
    """A toy of cifar10-tokenizer, a minute on a CPU (data: images, with classes or without)."""
    return _tokenizer(SMOKE, 0, _images(data))


def cifar10_teacher_smoke(tokenizer: Loaded, data: str) -> Recipe:
    """A toy of cifar10-teacher, a minute on a CPU (data: a latent cache)."""
    return _teacher(SMOKE, 0, tokenizer, _latents(data, tokenizer))


def cifar10_student_smoke(teacher: Loaded, data: str) -> Recipe:
    """A toy of cifar10-student, a minute on a CPU (data: stored pairs of the teacher)."""
    return _student(SMOKE, 0, teacher, _pairs(data, teacher))


PRESETS = {
    "cifar10-tokenizer": cifar10_tokenizer,
    "cifar10-teacher": cifar10_teacher,
    "cifar10-student": cifar10_student,
    "cifar10-tokenizer-smoke": cifar10_tokenizer_smoke,
    "cifar10-teacher-smoke": cifar10_teacher_smoke,
    "cifar10-student-smoke": cifar10_student_smoke,
}


def run(data: str, outdir: str | Path = "runs/cifar10", *, smoke: bool = False, seed: int = 0) -> None:
    """The whole path; the same call again goes on where it was.

    Args:
      data: 32x32 images with classes: an EDM zip, or anything `gen.data.stores.open_store` reads.
      outdir: gets tokenizer/, teacher/, student/ (run folders), latents/ (a cache), pairs/ (records) and report.html.
      smoke: seconds to minutes on a CPU.
      seed: of initial weights, data order and noise.
    """
    budget, images = SMOKE if smoke else GPU, _images(data)
    count = min(len(images.source()), budget.images or len(images.source()))
    if count < budget.batch:
        raise GenError(f"{data} has {count} images, fewer than the batch of {budget.batch}; add data")
    shown = images.source().gather(np.arange(min(count, 64)))["image"]
    enable_compile_cache()
    steps = (
        Train("tokenizer", functools.partial(_tokenizer, budget, seed, images), about="images to latent tokens"),
        Encode("latents", "tokenizer", images, budget.images, about="the images, encoded once"),
        Train(
            "teacher",
            functools.partial(_teacher, budget, seed),
            {"tokenizer": "tokenizer", "latents": "latents"},
            about="a class-conditional flow transformer over the latents",
        ),
        MakeRecords("pairs", "teacher", budget.pairs, about="noise and what the teacher's solver makes of it"),
        Train(
            "student",
            functools.partial(_student, budget, seed),
            {"teacher": "teacher", "pairs": "pairs"},
            about="regression on the pairs, then DMD2: one network call",
        ),
    )
    Plan(outdir, steps, page=functools.partial(report, shown)).run()
    out = Path(outdir)
    print(f"open {out / 'report.html'}; more samples: gen sample {out / 'student'} --seeds 0-63 --out grid.png")


def report(shown: Any, made: Made) -> Report:
    """One page: images `shown` and their reconstructions, teacher and student from the same noise."""
    tokenizer, teacher, student = (made[name] for name in ("tokenizer", "teacher", "student"))
    reconstructions = tokenizer.decode(tokenizer.encode(shown))
    classes = teacher.denoiser.network.num_classes or 10
    seeds = range(8 * classes)
    page = Report("32x32 images in one step", "A tokenizer, a flow transformer over its latents, its one-call student.")
    page.figures(
        {
            "network calls, teacher": teacher.generator.nfe,
            "network calls, student": student.generator.nfe,
            "reconstruction PSNR": f"{psnr(reconstructions, shown).mean():.1f} dB",
            "minutes in all": f"{sum(made.seconds.values()) / 60:.1f}",
        }
    )
    page.section("Data and reconstructions").pictures({"data": shown, "reconstructions": reconstructions})
    page.section("Teacher and student", "From the same noise; the classes from left to right.")
    return page.pictures({"teacher": teacher.sample(seeds), "student": student.sample(seeds)}, columns=classes)


def _images(data: str) -> Images:
    images, _ = small_images(data)
    return dataclasses.replace(images, flip=True)


def _latents(data: str, tokenizer: Loaded) -> Cache | Random:
    return Random({"latent": tokenizer.tokenizer.spec.shape, "label": ()}) if data == RANDOM else Cache(data)


def _pairs(data: str, teacher: Loaded) -> Records | Random:
    shape = teacher.denoiser.network.shape
    pairs = Random({"latent": shape, "noise": shape, "label": ()})
    return pairs if data == RANDOM else Records(data, teacher.origin)


def _name(what: str, budget: Budget) -> str:
    """The preset's."""
    return f"cifar10-{what}-smoke" if budget == SMOKE else f"cifar10-{what}"


def _tokenizer(budget: Budget, seed: int, images: Images) -> Recipe:
    tokenizer = TiTokConfig(
        (SIZE, SIZE, 3),
        patch=4,
        tokens=budget.tokens,
        channels=budget.channels,
        encoder=budget.tower,
        decoder=budget.tower,
        dtype=budget.dtype,
    )
    task = TokenizerTask(
        tokenizer,
        optim=_cosine(0.32 / budget.tower.width, budget.tokenizer),
        emas=(_average(budget.tokenizer),),
        kl=1e-6,
        l1=0.1,
        augment=RandomAffine(shift=1.0, rotate=0.0, scale=0.0),
        augmented=0.25,
    )
    stage = Stage("tokenizer", task, steps=budget.tokenizer, batch=budget.batch, data=images)
    return Recipe(RunConfig(_name("tokenizer", budget), (stage,), engine=_engine(seed)))


SAMPLER = Sampler(Heun(), steps=9, guidance=ClassifierFree(1.5))


def _teacher(budget: Budget, seed: int, tokenizer: Loaded, latents: Cache | Random) -> Recipe:
    """The network takes its classes from the labels that lie beside the latents; without them it has none."""
    label = latents.source().label
    spec = tokenizer.tokenizer.spec
    expect(latents.path, latents.source(), latent=spec.shape)
    expect_maker(latents, tokenizer.tokenizer, tokenizer.params["tokenizer"])
    network = DiTConfig(
        (spec.shape[0],),
        channels=spec.shape[1],
        patch=1,
        width=budget.width,
        depth=budget.depth,
        heads=budget.heads,
        num_classes=0 if label is None else int(label.max()) + 1,
        dtype=budget.dtype,
    )
    denoiser = Denoiser(network, Linear(), Predict("velocity", scale=10.0))
    optim = _cosine(0.128 / budget.width, budget.teacher)
    task = DenoiserTask(denoiser, optim=optim, emas=(_average(budget.teacher),))
    decoder = {"tokenizer": tokenizer.params["tokenizer"], "normalizer": latents.normalizer()}
    stage = Stage("teacher", task, steps=budget.teacher, batch=budget.batch, data=latents)
    origins = {"tokenizer": tokenizer.origin}
    sampler = SAMPLER if network.num_classes else dataclasses.replace(SAMPLER, guidance=ClassifierFree())
    config = RunConfig(_name("teacher", budget), (stage,), origins, sampler, tokenizer.tokenizer, engine=_engine(seed))
    return Recipe(config, artifacts=decoder)


def _student(budget: Budget, seed: int, teacher: Loaded, pairs: Records | Random) -> Recipe:
    """Of the teacher's network, tokenizer and guidance, whatever they are."""
    denoiser = teacher.denoiser
    shape = denoiser.network.shape
    expect(pairs.path, pairs.source(), latent=shape, noise=shape)
    regression = KDTask(teacher=denoiser, optim=_cosine(0.128 / denoiser.network.width, budget.regression))
    matching = DMD2Task(
        teacher=denoiser,
        guidance=teacher.config.sampler.guidance,
        ratio=2,
        optim=OptimConfig(5e-5, betas=(0.0, 0.99), clip=10.0),
        fake_optim=OptimConfig(1e-4, betas=(0.0, 0.99), clip=10.0),
        emas=(Constant(0.99, warmup=True),),
    )
    stages = (
        Stage("regression", regression, steps=budget.regression, batch=budget.batch, data=pairs),
        Stage("matching", matching, steps=budget.matching, batch=budget.batch, data=pairs),
    )
    origins = {"teacher": teacher.origin}
    config = RunConfig(
        _name("student", budget), stages, origins, FewSteps(), teacher.config.tokenizer, engine=_engine(seed)
    )
    artifacts = {role: teacher.params[role] for role in ("tokenizer", "normalizer")}
    return Recipe(config, frozen={"teacher": teacher.params["net"]}, artifacts=artifacts)


def _cosine(lr: float, steps: int) -> OptimConfig:
    return OptimConfig(lr, betas=(0.9, 0.99), schedule="cosine", warmup=min(500, steps // 4), final=0.01, clip=1.0)


def _average(steps: int) -> Constant:
    """Over the last percent of a long run, the last tenth of a short one."""
    return Constant(1 - 1 / max(10.0, steps / 100), warmup=True)


def _engine(seed: int) -> EngineConfig:
    return EngineConfig(seed=seed, checkpoint_every=500, checkpoint_seconds=30.0, log_every=50, keep=1)


def main(
    data: Annotated[str, tyro.conf.Positional], /, outdir: str = "runs/cifar10", smoke: bool = False, seed: int = 0
) -> None:
    """Runs the quick start on a data set of 32x32 images."""
    try:
        run(data, outdir, smoke=smoke, seed=seed)
    except GenError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    tyro.cli(main)
