"""The quick start's sibling: digits by tokens, written one after the other or unmasked in rounds.

A codebook of patches turns each 8x8 digit into 4x4 tokens; a small RAR writes them one by one, a small MaskGIT unmasks
them in rounds. Both are scored on balanced samples against the training images, as ``gen demo`` scores its flow,
whose figures stand beside where that demo has run. Bits per image are those of held-out digits, beside tokens that are
each drawn by itself (unigram).

Expected: see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.likelihood import bits_of_rows, unigram_bits
from gen.autoregressive.maskgit import MaskGITConfig
from gen.autoregressive.rar import RARConfig
from gen.autoregressive.sampler import TokenSampler
from gen.autoregressive.unmasking import MaskedSampler
from gen.data.caches import TokenCache
from gen.data.sources import Digits, digits
from gen.experiments import Recipe
from gen.experiments._tokens import token_recipe
from gen.experiments.demo import CLASSES, COUNT, score_images
from gen.features.digits import DigitsExtractor
from gen.files import read_json
from gen.metrics.curves import logged
from gen.metrics.image import psnr
from gen.metrics.protocol import Result, combine
from gen.metrics.reference import make_reference
from gen.metrics.report import Report
from gen.metrics.sources import from_arrays
from gen.plan import Made, Plan
from gen.runs import Loaded
from gen.steps import Encode, Evaluate, Train
from gen.tokenizers.patch_vq import PatchVQConfig
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.train import TokenizerTask
from gen.training.ema import Constant
from gen.training.logging import read_metrics
from gen.training.optim import OptimConfig
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["SMOKE", "Budget", "plan", "run"]

WRITER, UNMASKER, KEPT = "RAR, token by token", "MaskGIT, sixteen rounds", "tokenizer alone"


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything the demo runs.

    Attributes:
      tokenizer, writer, unmasker: training steps.
      count: samples per evaluation.
      sets: evaluations with different seeds; scores are their mean.
    """

    tokenizer: int = 800
    writer: int = 400
    unmasker: int = 3000
    count: int = COUNT
    sets: int = 3


SMOKE = Budget(tokenizer=60, writer=40, unmasker=40, count=300, sets=1)

# 1,438 images are few: tokens of an encoder that mixes patches are learned by heart, those of single patches less so
TOKENIZER = PatchVQConfig((8, 8, 1), 2, VQ(256, 4, averages=True, restart="random", decay=0.97))
# in raster order from the second step on
MODEL = RARConfig((4, 4), 256, 64, 2, 4, 192, num_classes=CLASSES, anneal=(0, 0), scan=False)
# one token a round, so all numbers of masked tokens are trained alike; smoothed targets would leave a tenth of the
# probability on tokens that do not fit
MASKED = MaskGITConfig(
    shape=(4, 4),
    vocabulary=256,
    num_classes=CLASSES,
    schedule="linear",
    smoothing=0.0,
    unmasked=0.0,
    dropout=0.0,
    width=128,
    depth=2,
    heads=4,
    hidden=512,
    scan=False,
)


def _engine(seed: int) -> EngineConfig:
    return EngineConfig(seed=seed, checkpoint_every=250, checkpoint_seconds=5.0, log_every=25, keep=1)


def _optim(lr: float, steps: int, decay: float = 0.0) -> OptimConfig:
    warmup = min(50, steps // 2)
    return OptimConfig(
        lr, betas=(0.9, 0.99), weight_decay=decay, schedule="cosine", warmup=warmup, final=0.01, clip=1.0
    )


def _tokenizer(budget: Budget, seed: int) -> Recipe:
    task = TokenizerTask(TOKENIZER, optim=_optim(2e-3, budget.tokenizer), emas=(Constant(0.99, warmup=True),))
    stage = Stage("tokenizer", task, steps=budget.tokenizer, batch=128, data=Digits("train"))
    return Recipe(RunConfig("demo-tokens-tokenizer", (stage,), engine=_engine(seed)))


def _model(
    name: str,
    model: Any,
    sampler: Any,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    tokenizer: Loaded,
    tokens: TokenCache,
) -> Recipe:
    return token_recipe(
        name,
        model,
        tokens.path,
        tokenizer,
        sampler=sampler,
        steps=steps,
        batch=batch,
        optim=_optim(lr, steps, 0.05),
        emas=(Constant(0.99, warmup=True),),
        engine=_engine(seed),
    )


def run(outdir: str | Path = "runs/demo-tokens", *, smoke: bool = False, seed: int = 0) -> None:
    """The whole path, written to `outdir`; started again it goes on where it was, or says that all is done.

    Args:
      outdir: gets tokenizer/, writer/ and unmasker/ (run folders), tokens/ and heldout/ (caches), scores/ and
        report.html. Scores of a ``gen demo`` are read from a folder ``demo`` beside it.
      smoke: a run of seconds that checks the path, not the quality.
      seed: of initial weights, data order and noise.
    """
    enable_compile_cache()
    made = plan(outdir, SMOKE if smoke else Budget(), seed).run()
    print(f"  {'':<26}{'Frechet':>9}{'recall':>9}{'bits':>9}")
    for name, result in _beside(made, Path(outdir)).items():
        bits = result.values.get("bits_per_image")
        shown = "" if bits is None else f"{bits:>9.1f}"
        values = (f"{result.values[v]:>9.3f}" if v in result.values else " " * 9 for v in _SHOWN)
        print(f"  {name:<26}{''.join(values)}{shown}")
    print(f"open {Path(outdir) / 'report.html'}; more samples: gen sample {Path(outdir) / 'writer'} --out grid.png")


_SHOWN = ("frechet_distance", "recall")


def plan(outdir: str | Path, budget: Budget, seed: int) -> Plan:
    """The demo's steps."""
    takes = {"tokenizer": "tokenizer", "tokens": "tokens"}
    written = TokenSampler(ConstantScale(1.2), top_p=0.95)
    # one token a round at almost random places: the surest first would make the likeliest digits alone
    masked = MaskedSampler(16, 100.0, annealed=False, token_temperature=0.7, guidance=ConstantScale(1.2))
    writer = functools.partial(_model, "demo-writer", MODEL, written, budget.writer, 64, 3e-3, seed)
    unmasker = functools.partial(_model, "demo-unmasker", MASKED, masked, budget.unmasker, 32, 2e-3, seed)
    steps = (
        Train("tokenizer", functools.partial(_tokenizer, budget, seed), about="8x8 pixels to 4x4 tokens of 256"),
        Encode("tokens", "tokenizer", Digits("train"), about="the training images, encoded once"),
        Encode("heldout", "tokenizer", Digits("test"), about="the held-out images, for bits per image"),
        Train("writer", writer, takes, about="a decoder that writes token by token"),
        Train("unmasker", unmasker, takes, about="a MaskGIT that unmasks them in rounds"),
        Evaluate(
            "scores",
            functools.partial(score, budget),
            {name: name for name in ("tokenizer", "writer", "unmasker", "tokens", "heldout")},
            {"count": budget.count, "sets": budget.sets},
            about="both against the training images, and bits of held-out ones",
        ),
    )
    return Plan(outdir, steps, page=functools.partial(report, Path(outdir)))


def score(
    budget: Budget, tokenizer: Loaded, writer: Loaded, unmasker: Loaded, tokens: TokenCache, heldout: TokenCache
) -> dict[str, Result]:
    """Scores of both generators, means over several sets of seeds, and of the training images through the tokenizer.

    The writer's result holds ``bits_per_image`` of the held-out tokens and ``unigram_bits_per_image``.
    """
    extractor, real = DigitsExtractor(), digits("train").arrays
    reference = make_reference(
        "digits", from_arrays(real["image"], real["label"]), extractor, split="train", batch=1024
    )
    results = {}
    for name, model in {WRITER: writer, UNMASKER: unmasker}.items():
        print(f"{name}: {budget.sets} x {budget.count} samples", flush=True)
        sets = [range(k * budget.count, (k + 1) * budget.count) for k in range(budget.sets)]
        made = ((seeds, model.sample(seeds, batch=600)) for seeds in sets)
        results[name] = combine([score_images(i, np.asarray(s) % CLASSES, reference, extractor, s) for s, i in made])
    kept = tokenizer.decode(tokens.source().rows.arrays["tokens"])
    results[KEPT] = score_images(kept, real["label"], reference, extractor)
    model = writer.generator.subject
    bits = float(bits_of_rows(model, writer.params, heldout.source()).mean())
    trained, kept_back = (c.source().rows.arrays["tokens"] for c in (tokens, heldout))
    alone = unigram_bits(trained, kept_back, model.vocabulary)
    values = {"bits_per_image": bits, "unigram_bits_per_image": float(alone.mean())}
    results[WRITER] = dataclasses.replace(results[WRITER], values={**results[WRITER].values, **values})
    return results


def _beside(made: Made, outdir: Path) -> dict[str, Result]:
    """The scores, and those of the flow of a demo in the folder ``demo`` beside `outdir`, where it has run."""
    files = outdir.parent / "demo" / "scores"
    flow: dict[str, Result] = {}
    if (files / "subjects.json").exists():
        named = read_json(files / "subjects.json")
        flow = {f"flow of gen demo, {k}": Result.load(files / named[k]) for k in list(named)[:1]}
    return {**made["scores"], **flow}


def report(outdir: Path, made: Made) -> Report:
    """One page: reconstructions, samples of both, curves, scores."""
    tokenizer, writer, unmasker = (made[name] for name in ("tokenizer", "writer", "unmasker"))
    heldout: Any = digits("test").arrays["image"]
    back = tokenizer.decode(tokenizer.encode(heldout))
    scores = _beside(made, outdir)
    values = scores[WRITER].values
    page = Report(
        "Handwritten digits by tokens",
        "A codebook of patches, a decoder that writes tokens, and a model that unmasks them.",
    )
    page.figures(
        {
            "reconstruction PSNR": f"{psnr(back, heldout).mean():.1f} dB",
            "bits per held-out image": f"{values['bits_per_image']:.1f}",
            "the same, tokens by themselves": f"{values['unigram_bits_per_image']:.1f}",
            "network calls, RAR": writer.generator.nfe,
            "network calls, MaskGIT": unmasker.generator.nfe,
            "minutes in all": f"{sum(made.seconds.values()) / 60:.1f}",
        }
    )
    page.section("Data and reconstructions", "Held-out images, and what the tokenizer keeps of them in 16 tokens.")
    page.pictures({"held-out images": heldout[:16], "reconstructions": back[:16]})
    page.section("Samples", "Classes 0 to 9 from left to right, twice.")
    page.pictures({WRITER: writer.sample(range(20)), UNMASKER: unmasker.sample(range(20))}, columns=20)
    page.section(
        "Scores",
        "Against the training images, in the 64 features of a small classifier of these digits: mean and standard "
        "deviation over sets of seeds. The tokenizer alone gives back the training images.",
    )
    page.results(scores)
    page.section("Training")
    for name in ("tokenizer", "writer", "unmasker"):
        page.curves(logged(read_metrics(made[name].path))["loss"], f"{name}: loss", log=True)
    seconds = [[name, value] for name, value in made.seconds.items()]
    return page.table(["step", "seconds"], seconds, "Time per step on this machine.")
