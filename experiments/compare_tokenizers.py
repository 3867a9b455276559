"""Tokenizers side by side: how well each gives images back, and how well a flow on its latents generates.

Eight tokenizers of about 0.75 million parameters train for equal CPU time on 32x32 images; the same small flow then
trains on the latents of each (the code vectors of discrete ones); one page shows both ends of the trade-off that VA-VAE
is about (Yao et al. 2025, arXiv 2501.01423). Every step resumes where it was interrupted::

    python -m gen.experiments.compare_tokenizers cifar10-train.zip --heldout cifar10-test.zip

``--minutes`` is CPU time of all cores together for each tokenizer, so that other work on the machine does not decide
who trains longer; all of it takes about an hour on two cores with the default. How many steps fit is measured first and
kept, so that a run that goes on keeps its length; all flows have equally many steps. Scores are Fréchet distances in
features of the ``[lite]`` network: they rank these tokenizers and compare with no paper's.

Expected: see benchmarks/RESULTS.md.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gen.data.caches import Cache
from gen.data.images import Images
from gen.data.loader import gathered
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import Linear
from gen.diffusion.train import DenoiserTask
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._comparison import Calibrate, Codes, EncodeCodes, Real
from gen.experiments._tokenizers import keep_lite
from gen.features.efficientnet_lite import EfficientNetLite
from gen.metrics.evaluate import evaluate
from gen.metrics.protocol import Result
from gen.metrics.reference import Reference
from gen.metrics.report import Report
from gen.metrics.sources import ImageSet, from_arrays
from gen.nn.network import count, param_shapes
from gen.plan import Made, Plan
from gen.runs import Loaded
from gen.sampling.generator import Sampler
from gen.sampling.solvers import Heun
from gen.steps import Evaluate, Train
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.reconstruct import evaluate_reconstruction, reconstructions
from gen.tokenizers.titok import TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.var_vqvae import VARVQVAEConfig
from gen.tokenizers.vqgan import VQGANConfig
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.program import enable_compile_cache
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["HEAD", "SMOKE", "TOKENIZERS", "Budget", "run", "table"]

SIDE = 32
IMAGE = (SIDE, SIDE, 3)
_TOWER = Tower(96, 3, 4)
_FLAT: dict[str, Any] = {
    "image": IMAGE, "patch": 4, "tokens": 16, "encoder": _TOWER, "decoder": _TOWER, "scan": False,
}  # fmt: skip
_SHAPE: dict[str, Any] = {"image": IMAGE, "width": 16, "mult": (1, 2, 4), "blocks": 1, "groups": 8}


def _conv(quantizer: Any) -> VQGANConfig:
    """A convolutional autoencoder to 8x8 codes."""
    return VQGANConfig(**_SHAPE, quantizer=quantizer, inner=32)


# name -> tokenizer; all have 0.7 to 0.8 million parameters, and latents that a flow reads as 16 patches. No bits:
# after so few steps one is left that no image sets, and a flow has no scale for it
TOKENIZERS: dict[str, Any] = {
    "kl-8x8x4": KLVAEConfig(**_SHAPE, channels=4, inner=32),
    "kl-8x8x16": KLVAEConfig(**_SHAPE, channels=16, inner=32),
    "kl-1d": TiTokConfig(**_FLAT, channels=16),
    "vq": _conv(VQ(1024, 8, normalize=True)),
    "vq-averages": _conv(VQ(1024, 8, averages=True, restart="random")),
    "vq-1d": TiTokConfig(**_FLAT, channels=None, quantizer=VQ(1024, 8, normalize=True)),
    "fsq": _conv(FSQ((8, 5, 5, 5))),
    "residual": VARVQVAEConfig(
        **_SHAPE, quantizer=Residual(1024, 8, scales=(1, 2, 4, 8), convolutions=2), inner=32, quant_kernel=1
    ),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything runs.

    Attributes:
      minutes: of CPU time, all cores together, for the training of each tokenizer; compiling is not counted.
      batch: images per step of a tokenizer; a flow takes four times as many.
      images: how many are encoded for the flows; None for all.
      flow: steps of each flow.
      width, depth: of the flow transformer.
      count: images that are given back, and samples.
      probe: steps that are timed.
    """

    minutes: float = 5.0
    batch: int = 32
    images: int | None = 10_000
    flow: int = 500
    width: int = 128
    depth: int = 4
    count: int = 1_000
    probe: int = 45


SMOKE = Budget(0.02, batch=8, images=64, flow=4, width=16, depth=1, count=16, probe=3)
SAMPLER = Sampler(Heun(), steps=10)


def run(
    data: str,
    outdir: str | Path = "runs/compare-tokenizers",
    *,
    heldout: str = "",
    budget: Budget = Budget(),
    tokenizers: Mapping[str, Any] = TOKENIZERS,
    seed: int = 0,
) -> Made:
    """The whole comparison; the same call again goes on where it was.

    Args:
      data: 32x32 images in colour with classes: an EDM zip, or anything `gen.data.stores.open_store` reads.
      outdir: gets a folder for each step, and report.html.
      heldout: images that are given back and compared with; "" for the last ones of `data`.
      budget: how much runs.
      tokenizers: by name.
      seed: of initial weights, data order and noise.

    Raises GenError for unfit data, and where the ``[lite]`` network is missing.
    """
    keep_lite()
    EfficientNetLite().fingerprint()
    images, held = _images(data), _images(heldout or data)
    for path, source, least in (
        (data, images.source(), 4 * budget.batch),
        (heldout or data, held.source(), budget.count),
    ):
        if len(source) < least:
            raise GenError(f"{path} has {len(source)} images; {least} are needed: add data, or lower the budget")
    enable_compile_cache()
    real = _real(held, budget.count)
    steps: list[Any] = [Real(real)]
    for name, tokenizer in tokenizers.items():
        recipe = functools.partial(_tokenizer, name, tokenizer, budget, seed, images)
        about = f"{count(param_shapes(tokenizer)) / 1e6:.2f} M parameters"
        steps += [
            Calibrate(f"{name}-pace", functools.partial(recipe, steps=budget.probe)),
            Train(name, functools.partial(_timed, recipe, budget), {"pace": f"{name}-pace"}, about=about),
            EncodeCodes(f"{name}-latents", name, images, budget.images, about="the images, encoded once"),
            Train(
                f"{name}-flow",
                functools.partial(_flow, name, budget, seed),
                {"tokenizer": name, "latents": f"{name}-latents"},
                about="a class-conditional flow over them",
            ),
            Evaluate(
                f"{name}-scores",
                functools.partial(_scores, budget, real),
                {"tokenizer": name, "flow": f"{name}-flow", "real": "real"},
                {"count": budget.count},
                about="reconstructions and samples against held-out images",
            ),
        ]
    page = functools.partial(_page, tuple(tokenizers), budget, real)
    return Plan(outdir, tuple(steps), page=page).run()


def _images(data: str) -> Images:
    return Images(data, size=SIDE)


def _tokenizer(name: str, tokenizer: Any, budget: Budget, seed: int, images: Images, *, steps: int) -> Recipe:
    """L1 and L2 on pixels; no discriminator and no perceptual term, which would favour what they look at."""
    optim = OptimConfig(2e-3, betas=(0.9, 0.99), schedule="cosine", final=0.05, warmup=min(50, steps // 4), clip=1.0)
    task = TokenizerTask(tokenizer, optim=optim, emas=(_average(steps),), kl=1e-6, l1=0.2)
    stage = Stage("tokenizer", task, steps, budget.batch, dataclasses.replace(images, flip=True))
    return Recipe(RunConfig(name, (stage,), engine=_engine(seed, steps)))


def _timed(recipe: Any, budget: Budget, pace: float) -> Recipe:
    """As many steps as the CPU time suffices for."""
    made: Recipe = recipe(steps=max(2, round(60.0 * budget.minutes * pace / budget.batch)))
    return made


def _flow(name: str, budget: Budget, seed: int, tokenizer: Loaded, latents: Cache) -> Recipe:
    """A diffusion transformer on 16 patches, whatever the latents are."""
    view, label = Codes(tokenizer).tokenizer, latents.source().label
    *sides, channels = view.spec.shape
    patch = round((math.prod(sides) / 16) ** (1 / len(sides)))
    classes = 0 if label is None else int(label.max()) + 1
    network = DiTConfig(
        tuple(sides), channels, patch, budget.width, budget.depth, 4, num_classes=classes, remat="none", scan=False
    )
    optim = OptimConfig(1e-3, betas=(0.9, 0.99), schedule="cosine", final=0.05, warmup=min(50, budget.flow), clip=1.0)
    denoiser = Denoiser(network, Linear(), Predict("velocity", scale=10.0))
    task = DenoiserTask(denoiser, optim=optim, emas=(_average(budget.flow),))
    stage = Stage("flow", task, budget.flow, 4 * budget.batch, latents)
    config = RunConfig(
        f"{name}-flow", (stage,), {"tokenizer": tokenizer.origin}, SAMPLER, view, engine=_engine(seed, budget.flow)
    )
    return Recipe(config, artifacts={"tokenizer": tokenizer.params["tokenizer"], "normalizer": latents.normalizer()})


def _average(steps: int) -> Constant:
    """Over the last tenth of a run."""
    return Constant(1 - 1 / max(10.0, steps / 10), warmup=True)


def _engine(seed: int, steps: int) -> EngineConfig:
    every = max(1, steps // 10)
    return EngineConfig(seed=seed, checkpoint_every=every, checkpoint_seconds=30.0, log_every=every, keep=1)


def _last(images: Images, number: int) -> dict[str, np.ndarray]:
    source = images.source()
    return gathered(source, np.arange(len(source) - number, len(source)))


def _real(images: Images, number: int) -> ImageSet:
    rows = _last(images, number)
    return from_arrays(rows["image"], rows.get("label"), identity=f"the last {number} of {images.identity()}")


def _scores(budget: Budget, held: ImageSet, tokenizer: Loaded, flow: Loaded, real: Reference) -> dict[str, Result]:
    """What the tokenizer gives back, and what the flow makes: of equal number, against the same images."""
    network, origin = EfficientNetLite(), tokenizer.origin
    made = reconstructions(tokenizer.tokenizer, tokenizer.params["tokenizer"], held, identity=origin)
    pairs = evaluate_reconstruction(
        made, held, None, tokenizer=tokenizer.tokenizer, name="held-out images", keep=True, batch=100
    )
    assert pairs.images is not None
    back = evaluate(from_arrays(pairs.images, identity=f"{origin} of {held.identity}"), real, network, batch=64)
    samples = flow.sample(range(budget.count), batch=100)
    source = from_arrays(samples, identity=f"{flow.origin} seeds 0-{budget.count - 1}")
    return {
        "reconstructions": dataclasses.replace(back, values={**pairs.result.values, **back.values}),
        "samples": evaluate(source, real, network, batch=64),
    }


def _bits(tokenizer: Any) -> tuple[int, float]:
    """(latent positions, bits) of one image; 32 bits for a continuous number."""
    spec = tokenizer.spec
    match spec.kind:
        case "tokens":
            tokens = math.prod(spec.shape)
            return tokens, tokens * math.log2(spec.vocabulary)
        case "bits":
            return math.prod(spec.shape[:-1]), math.prod(spec.shape)
    return math.prod(spec.shape[:-1]), 32 * math.prod(spec.shape)


HEAD = (
    "tokenizer", "M parameters", "latents", "bits per image", "share of codes used", "images per CPU-second", "steps",
    "PSNR ↑", "SSIM ↑", "distance of reconstructions ↓", "distance of samples ↓",
)  # fmt: skip


def table(names: Sequence[str], made: Made) -> list[list[Any]]:
    """The page's rows under `HEAD`, one for each tokenizer."""
    rows = []
    for name in names:
        tokenizer, scores = made[name], made[f"{name}-scores"]
        again, generated = scores["reconstructions"].values, scores["samples"].values
        tokens, bits = _bits(tokenizer.tokenizer)
        sizes = [count(tokenizer.params["tokenizer"]) / 1e6, tokens, round(bits), again.get("codebook_usage")]
        quality = [again["psnr"], again["ssim_original"], again["frechet_distance"], generated["frechet_distance"]]
        rows.append([name, *sizes, made[f"{name}-pace"], tokenizer.step, *quality])
    return rows


def _page(names: tuple[str, ...], budget: Budget, held: ImageSet, made: Made) -> Report:
    """The table, both distances as a picture, reconstructions and samples."""
    assert held.read is not None
    shown = held.read(np.arange(min(16, held.count)))["image"]
    rows = table(names, made)
    back = {name: made[name].decode(made[name].encode(shown)) for name in names}
    samples = {name: made[f"{name}-flow"].sample(range(16)) for name in names}
    page = Report(
        "Tokenizers side by side",
        f"{len(names)} tokenizers of about equal size, trained for {budget.minutes:g} minutes of CPU time each; on the "
        f"latents of each the same flow, trained for {budget.flow:,} steps.",
    )
    page.section(
        "Reconstruction and generation",
        "A tokenizer that gives images back better need not have latents that are easier to generate. Fréchet "
        f"distances of {budget.count:,} images in features of EfficientNet-Lite0: they rank these rows and compare "
        "with no other table.",
    )
    page.table(
        HEAD,
        rows,
        "Bits: 32 for a continuous number, log2 of the vocabulary for a token. Codes used: by the held-out images; of "
        "bits, the share that take both values.",
    )
    page.points(
        {row[0]: (row[-2], row[-1]) for row in rows},
        "Each tokenizer's two distances; both are better towards the lower left.",
        x="distance of reconstructions",
        y="distance of samples",
    )
    page.section("Reconstructions").pictures(
        {"held-out images": shown, **back}, "Held-out images, and what each tokenizer makes of them."
    )
    page.section("Samples").pictures(samples, "The same seeds and classes throughout.")
    page.section("Protocol").protocol(made[f"{names[0]}-scores"]["samples"].protocol)
    minutes = sum(made.seconds.values()) / 60
    return page.text(f"All steps together took {minutes:.0f} minutes by the clock.")


def main(
    data: Annotated[str, tyro.conf.Positional],
    /,
    outdir: str = "runs/compare-tokenizers",
    heldout: str = "",
    minutes: float = Budget.minutes,
    seed: int = 0,
) -> None:
    """Compares tokenizers on a data set of 32x32 images, MINUTES of CPU time for the training of each."""
    try:
        made = run(data, outdir, heldout=heldout, budget=Budget(minutes, flow=round(100 * minutes)), seed=seed)
    except GenError as error:
        raise SystemExit(f"error: {error}") from None
    for row in [HEAD, ["---"] * len(HEAD), *table(tuple(TOKENIZERS), made)]:
        print("|", " | ".join(_text(cell) for cell in row), "|")
    print(f"open {Path(outdir) / 'report.html'}")


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


if __name__ == "__main__":
    tyro.cli(main)
