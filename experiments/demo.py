"""The quick start: from 1,438 handwritten digits to a one-step generator, in minutes on a laptop.

A TiTok-like 1D tokenizer with KL latents turns each 8x8 image into 4 tokens of 8 channels; a class-conditional
flow transformer learns those latents; DMD2, after a short regression on stored teacher pairs, distils it into a
generator that needs one network call. Teacher and student are scored on the same noise against the training images.

Expected (UCI digits, N = 1797, Frechet distance in the 64 features of the digits classifier, mean of three noise
seeds; measured with ``benchmarks/demo_quality.py``): see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from gen.data.augment import RandomAffine
from gen.data.caches import Cache
from gen.data.loader import expect
from gen.data.sources import Digits, digits
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.distill.dmd2 import DMD2Task
from gen.distill.kd import KDTask
from gen.experiments import Recipe
from gen.features.digits import DigitsExtractor
from gen.metrics.curves import logged
from gen.metrics.evaluate import evaluate
from gen.metrics.image import psnr
from gen.metrics.memorisation import memorisation
from gen.metrics.protocol import Result, combine
from gen.metrics.reference import Reference, make_reference
from gen.metrics.report import Report
from gen.metrics.sources import from_arrays
from gen.plan import Made, Plan
from gen.runs import Loaded
from gen.sampling.generator import FewSteps, Sampler
from gen.sampling.guidance import ClassifierFree
from gen.sampling.records import Records
from gen.sampling.solvers import Euler, Heun
from gen.steps import Encode, Evaluate, MakeRecords, Train
from gen.tokenizers.encode import expect_maker
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.ema import Constant
from gen.training.logging import read_metrics
from gen.training.optim import OptimConfig
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "SMOKE", "Budget", "baselines", "run", "score_images"]

TEACHER_NAME, STUDENT, CONTROL = "teacher, Heun", "student, one call", "teacher, one Euler step"
CLASSES = 10
COUNT = 1797  # samples per evaluation, as many as there are digits
STEP_COUNTS = (1, 2, 6, 12, 25)  # the teacher's solver steps shown beside the student


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything a demo runs.

    Attributes:
      tokenizer, teacher, regression, matching: training steps of the four stages.
      pairs: stored teacher pairs.
      count: samples per evaluation.
      sets: evaluations with different noise; scores are their mean.
    """

    tokenizer: int = 2000
    teacher: int = 4500
    regression: int = 500
    matching: int = 240
    pairs: int = 8192
    count: int = COUNT
    sets: int = 3


SMOKE = Budget(tokenizer=60, teacher=60, regression=20, matching=20, pairs=512, count=300, sets=1)

TOWER = Tower(width=64, depth=1, heads=8)
TOKENIZER = TiTokConfig((8, 8, 1), patch=4, tokens=4, channels=8, encoder=TOWER, decoder=TOWER, scan=False)
TEACHER = Denoiser(
    DiTConfig((4,), channels=8, patch=1, width=64, depth=3, heads=4, num_classes=CLASSES, remat="none", scan=False),
    Linear(),
    Predict("velocity", scale=10.0),  # slow time features, so that methods which differentiate in time work too
)
SAMPLER = Sampler(Heun(), steps=6, guidance=ClassifierFree(1.15))


def demo_tokenizer() -> Recipe:
    """Digits: a 1D tokenizer, 8x8 pixels to 4 latent tokens of 8 channels."""
    return _tokenizer(Budget(), 0)


def demo_teacher(tokenizer: Loaded, data: str) -> Recipe:
    """Digits: a class-conditional flow transformer over the tokenizer's latents (data: a latent cache)."""
    return _teacher(Budget(), 0, tokenizer, Cache(data))


def demo_student(teacher: Loaded, data: str) -> Recipe:
    """Digits: a one-step student by regression and DMD2 (data: stored pairs of the teacher)."""
    return _student(Budget(), 0, teacher, Records(data, teacher.origin))


PRESETS = {"demo-tokenizer": demo_tokenizer, "demo-teacher": demo_teacher, "demo-student": demo_student}


def _tokenizer(budget: Budget, seed: int) -> Recipe:
    task = TokenizerTask(
        TOKENIZER,
        optim=_cosine(5e-3, budget.tokenizer),
        emas=(Constant(0.99, warmup=True),),
        kl=5e-5,
        augment=RandomAffine(),
        augmented=0.5,
    )
    stage = Stage("tokenizer", task, steps=budget.tokenizer, batch=64, data=Digits("train"))
    return Recipe(RunConfig("demo-tokenizer", (stage,), engine=_engine(seed)))


def _teacher(budget: Budget, seed: int, tokenizer: Loaded, latents: Cache) -> Recipe:
    expect(latents.path, latents.source(), latent=TOKENIZER.spec.shape, label=())
    expect_maker(latents, tokenizer.tokenizer, tokenizer.params["tokenizer"])
    task = DenoiserTask(TEACHER, optim=_cosine(2e-3, budget.teacher), emas=(Constant(0.998, warmup=True),))
    decoder = {"tokenizer": tokenizer.params["tokenizer"], "normalizer": latents.normalizer()}
    stage = Stage("teacher", task, steps=budget.teacher, batch=128, data=latents)
    origins = {"tokenizer": tokenizer.origin}
    config = RunConfig("demo-teacher", (stage,), origins, SAMPLER, tokenizer.tokenizer, engine=_engine(seed))
    return Recipe(config, artifacts=decoder)


def _student(budget: Budget, seed: int, teacher: Loaded, pairs: Records) -> Recipe:
    expect(pairs.path, pairs.source(), latent=TOKENIZER.spec.shape, noise=TOKENIZER.spec.shape, label=())
    warmup = min(20, budget.regression // 2)
    regression = KDTask(
        teacher=teacher.denoiser,
        optim=OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", warmup=warmup, final=0.05, clip=1.0),
    )
    falling = OptimConfig(5e-4, betas=(0.0, 0.99), schedule="cosine", final=0.05, clip=10.0)
    matching = DMD2Task(
        teacher=teacher.denoiser,
        guidance=teacher.config.sampler.guidance,
        ratio=2,
        optim=falling,
        fake_optim=dataclasses.replace(falling, lr=1e-3),
        emas=(Constant(0.95, warmup=True),),
    )
    stages = (
        Stage("regression", regression, steps=budget.regression, batch=128, data=pairs),
        Stage("matching", matching, steps=budget.matching, batch=128, data=pairs),
    )
    origins = {"teacher": teacher.origin}
    return Recipe(
        RunConfig("demo-student", stages, origins, FewSteps(), teacher.config.tokenizer, engine=_engine(seed)),
        frozen={"teacher": teacher.params["net"]},
        artifacts={role: teacher.params[role] for role in ("tokenizer", "normalizer")},
    )


def _cosine(lr: float, steps: int) -> OptimConfig:
    return OptimConfig(lr, betas=(0.9, 0.99), schedule="cosine", warmup=min(50, steps // 2), final=0.01, clip=1.0)


def _engine(seed: int) -> EngineConfig:
    return EngineConfig(seed=seed, checkpoint_every=250, checkpoint_seconds=5.0, log_every=25, keep=1)


def run(outdir: str | Path = "runs/demo", *, smoke: bool = False, seed: int = 0) -> None:
    """The whole path, written to `outdir`; started again it goes on where it was, or says that all is done.

    Args:
      outdir: gets tokenizer/, teacher/ and student/ (run folders), latents/ (a cache), pairs/ (records), scores/ and
        report.html.
      smoke: a run of seconds that checks the path, not the quality.
      seed: of initial weights, data order and noise.
    """
    enable_compile_cache()
    made = plan(outdir, SMOKE if smoke else Budget(), seed).run()
    print(f"  {'':<26}{'Frechet':>9}{'recall':>9}")
    for name, result in made["scores"].items():
        print(f"  {name:<26}{result.values['frechet_distance']:>9.3f}{result.values['recall']:>9.3f}")
    out = Path(outdir)
    print(f"open {out / 'report.html'}; more samples: gen sample {out / 'student'} --seeds 0-63 --out grid.png")


def plan(outdir: str | Path, budget: Budget, seed: int) -> Plan:
    """The demo's steps."""
    steps = (
        Train(
            "tokenizer",
            functools.partial(_tokenizer, budget, seed),
            about="8x8 pixels to 4 latent tokens of 8 channels",
        ),
        Encode("latents", "tokenizer", Digits("train"), about="the training images, encoded once"),
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
        Evaluate(
            "scores",
            functools.partial(score, budget),
            {"teacher": "teacher", "student": "student"},
            {"count": budget.count, "sets": budget.sets},
            about="teacher, student and baselines against the training images",
        ),
    )
    return Plan(outdir, steps, page=functools.partial(report, budget))


def score(budget: Budget, teacher: Loaded, student: Loaded) -> dict[str, Result]:
    """Scores of teacher, student (same noise) and the baselines against the training images.

    Those of generators are the mean over several sets of noise.
    """
    extractor, real = DigitsExtractor(), digits("train").arrays
    reference = make_reference(
        "digits", from_arrays(real["image"], real["label"]), extractor, split="train", batch=1024
    )
    results = {}
    for name, model in generators(teacher, student).items():
        print(f"{name}: {budget.sets} x {budget.count} samples", flush=True)
        sets = [range(k * budget.count, (k + 1) * budget.count) for k in range(budget.sets)]
        made = ((seeds, model.sample(seeds, batch=1024)) for seeds in sets)
        results[name] = combine([score_images(i, np.asarray(s) % CLASSES, reference, extractor, s) for s, i in made])
    for name, (images, labels) in baselines(budget.count).items():
        results[name] = score_images(images, labels, reference, extractor)
    return results


def generators(teacher: Loaded, student: Loaded) -> dict[str, Loaded]:
    """The generators that are scored, by the name they have in the report."""
    control = teacher.with_sampler(Sampler(Euler(), steps=1, guidance=SAMPLER.guidance))
    return {TEACHER_NAME: teacher, STUDENT: student, CONTROL: control}


def score_images(
    images: np.ndarray, labels: np.ndarray, reference: Reference, extractor: Any, seeds: range | None = None
) -> Result:
    """Scores stored uint8 images; the label rule and the quantiser are those of ``gen sample``."""
    source = from_arrays(images, labels.astype(np.int32), quantiser="round", rule="seed mod classes")
    named = "" if seeds is None else f"{seeds.start}-{seeds[-1]}"
    return evaluate(dataclasses.replace(source, seeds=named), reference, extractor, batch=1024)


def baselines(count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What scores mean: (images uint8, labels) of the held-out images, of a Gaussian over the pixels of each class,
    of blurred training images and of class means.
    """
    train_set, heldout = digits("train").arrays, digits("test").arrays
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    gaussian = np.zeros((count, 64))
    means = np.zeros((count, 64))
    for c in range(CLASSES):
        pixels = train_set["image"][train_set["label"] == c].reshape(-1, 64).astype(np.float64)
        of_class = labels == c
        means[of_class] = pixels.mean(axis=0)
        gaussian[of_class] = rng.multivariate_normal(
            pixels.mean(axis=0), np.cov(pixels, rowvar=False), size=int(of_class.sum()), method="eigh"
        )
    rows = np.arange(count) % len(train_set["image"])
    blurred = ndimage.gaussian_filter(train_set["image"].astype(np.float64), (0, 0.7, 0.7, 0))[rows]

    def integers(pixels: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8).reshape(-1, 8, 8, 1)

    return {
        "held-out images": (heldout["image"], heldout["label"]),
        "Gaussian of each class": (integers(gaussian), labels),
        "blurred training images": (integers(blurred), train_set["label"][rows]),
        "class means": (integers(means), labels),
    }


def report(budget: Budget, made: Made) -> Report:
    """One page: data, reconstructions, teacher and student from the same noise, curves, scores."""
    tokenizer, teacher, student, scores = (made[name] for name in ("tokenizer", "teacher", "student", "scores"))
    heldout: Any = digits("test").arrays["image"]
    reconstructions = tokenizer.decode(tokenizer.encode(heldout))
    distance = {name: result.values["frechet_distance"] for name, result in scores.items()}
    samples = student.sample(range((budget.sets - 1) * budget.count, budget.sets * budget.count), batch=1024)
    copies = memorisation(samples, digits("train").arrays["image"], heldout).share
    page = Report(
        "Handwritten digits in one step",
        "A 1D tokenizer, a flow transformer over its latents, and a student that needs one network call.",
    )
    page.figures(
        {
            "student's Fréchet distance over its teacher's": f"{distance[STUDENT] / distance[TEACHER_NAME]:.2f}",
            "network calls, teacher": teacher.generator.nfe,
            "network calls, student": student.generator.nfe,
            "reconstruction PSNR": f"{psnr(reconstructions, heldout).mean():.1f} dB",
            "near-copies of training images": f"{100 * copies:.1f} %",
            "minutes in all": f"{sum(made.seconds.values()) / 60:.1f}",
        }
    )
    page.section("Data and reconstructions", "Held-out images, and what the tokenizer keeps of them in 32 numbers.")
    page.pictures({"held-out images": heldout[:16], "reconstructions": reconstructions[:16]})
    page.section(
        "The same noise through teacher and student",
        f"Every column starts from the same noise and class. The teacher is sampled with Heun's method at guidance "
        f"{SAMPLER.guidance.scale}; the last row is the student's single call.",
    )
    seeds = range(20)
    rows = {
        f"teacher, {steps} step{'s' * (steps > 1)}": teacher.sample(seeds, steps=steps, solver=solver)
        for steps, solver in ((n, Heun() if n > 1 else Euler()) for n in STEP_COUNTS)
    }
    page.pictures(rows | {"student, 1 call": student.sample(seeds)}, columns=20)
    page.section("More of the student", "Classes 0 to 9 from left to right.")
    page.pictures({"": student.sample(range(80))}, columns=10)
    page.section(
        "Scores",
        "Against the training images, in the 64 features of a small classifier of these digits. Generators: mean and "
        "standard deviation over noise seeds, teacher and student from the same noise. Baselines say what a score "
        "means; behind their ± stands the standard error over images.",
    )
    page.results(scores)
    page.section("Training")
    for name in ("tokenizer", "teacher", "student"):
        page.curves(logged(read_metrics(made[name].path))["loss"], f"{name}: loss", log=True)
    seconds = [[name, value] for name, value in made.seconds.items()]
    return page.table(["step", "seconds"], seconds, "Time per step on this machine.")
