"""MAR: masked autoregression over continuous tokens, each drawn by a diffusion head (Li et al. 2024, arXiv 2406.11838).

Data: a latent cache of ImageNet-1k at 256 px, 16 x 16 x 16: by l-DeTok (preset `detok-bb`) or by the KL-16 autoencoder
of the original; ``gen encode TOKENIZER --data IMAGENET --flip --out LATENTS``. Official runs draw each latent afresh
from its posterior; a cache keeps its mean.

Recipe (l-DeTok's code, arXiv 2507.15856): 800 epochs (100 for comparisons) of batches of 1024, AdamW (0.9, 0.95) at
2e-4, constant, without warm-up, decay and clipping; average of decay 0.9999; masks of 70 % and more, class dropout 0.1,
four times for each token; dropout 0.1 in attention's output and weights, of which ours has the first. Sampled in 256
steps with guidance that grows to 3.9 (B) or 3.4 (L), 100 steps of the head.

Expected (FID-50k of ImageNet 256, ADM's evaluator):

| | parameters | on l-DeTok BB (its README) | on KL-16 (paper) |
|---|---|---|---|
| `mar-b` | 208M | 1.61, with the tuned decoder 1.55 | 2.31 |
| `mar-l` | 478M | 1.43, 1.32 | 1.78 |
| `mar-h` | 942M | | 1.55 |

Without guidance the temperature is 0.95 (B), 0.97 (L). Early figures are huge: 11.6 after 25 epochs (DeTok's tracker,
number 8). Not reproduced here yet; `mar-smoke` is measured by the tests.
"""

import dataclasses
from typing import Any

from gen.autoregressive.infilling import InfillingSampler, KnownScale
from gen.autoregressive.mar import MARConfig, mar
from gen.autoregressive.train_latents import LatentTokenTask
from gen.data.sources import Digits
from gen.diffusion.ddpm import DDPM
from gen.experiments import Recipe
from gen.experiments._latent_tokens import latent_token_recipe
from gen.experiments._latents import adamw, small_images
from gen.experiments._tokens import SMOKE_EMA, smoke_optim
from gen.runs import Loaded
from gen.training.ema import Constant
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["PRESETS"]

EPOCH = 1_281_167 // 1024


def _recipe(name: str, size: str, scale: float, data: str, tokenizer: Loaded | None) -> Recipe:
    return latent_token_recipe(
        name,
        mar(size, dtype="bfloat16", remat="dots"),
        data,
        tokenizer,
        sampler=InfillingSampler(256, guidance=KnownScale(scale)),
        steps=800 * EPOCH,
        batch=1024,
        optim=adamw(2e-4, (0.9, 0.95)),
        emas=(Constant(0.9999),),
    )


def mar_b(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MAR-B, 208M parameters, ImageNet 256 (data: a latent cache 16 x 16 x 16; tokenizer: its maker)."""
    return _recipe("mar-b", "B", 3.9, data, tokenizer)


def mar_l(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MAR-L, 478M parameters, ImageNet 256 (data: a latent cache 16 x 16 x 16; tokenizer: its maker)."""
    return _recipe("mar-l", "L", 3.4, data, tokenizer)


def mar_h(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MAR-H, 942M parameters, ImageNet 256 (data: a latent cache 16 x 16 x 16; tokenizer: its maker)."""
    return _recipe("mar-h", "H", 3.4, data, tokenizer)


def mar_one_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MAR of 8 + 8 blocks in bfloat16 on one GPU: 400k steps at batch 256 (data, tokenizer: as `mar-b`)."""
    model = mar("B", width=512, depth=8, heads=8, head_width=768, head_depth=3, dtype="bfloat16")
    return latent_token_recipe(
        "mar-one-gpu",
        model,
        data,
        tokenizer,
        sampler=InfillingSampler(64, guidance=KnownScale(3.9)),
        steps=400_000,
        batch=256,
        optim=adamw(1e-4, (0.9, 0.95), clip=1.0),
        emas=(Constant(0.9999),),
    )


def mar_smoke(data: str | None = None) -> Recipe:
    """A toy MAR on pixels, a minute on a laptop: 8x8 digits, or images at 32 px (data).

    Its chain is the linear one. That of the paper ends so near to noise that the first of 50 steps of the head
    multiplies its error by 632, the linear one's by 0.4: too much for the head of a toy, whose samples of 32 px are
    saturated squares then.
    """
    model = MARConfig(
        shape=(8, 8, 1),
        process=DDPM("linear"),
        patch=2,
        num_classes=10,
        width=64,
        depth=2,
        heads=4,
        buffer=4,
        head_width=96,
        head_depth=2,
        times=2,
        dropout=0.0,
        scan=False,
    )
    images: Any = Digits("train")
    if data is not None:
        images, classes = small_images(data)
        dropped = 0.1 if classes else 0.0
        model = dataclasses.replace(model, shape=(32, 32, 3), patch=4, num_classes=classes, cond_dropout=dropped)
    guidance = KnownScale(2.0 if model.num_classes else 1.0)
    task = LatentTokenTask(model, optim=smoke_optim(), emas=SMOKE_EMA)
    stage, engine = Stage("tokens", task, 1200, 64, images), EngineConfig(checkpoint_every=100, log_every=20)
    return Recipe(RunConfig("mar-smoke", (stage,), sampler=InfillingSampler(16, 50, guidance=guidance), engine=engine))


PRESETS = {
    "mar-b": mar_b,
    "mar-l": mar_l,
    "mar-h": mar_h,
    "mar-one-gpu": mar_one_gpu,
    "mar-smoke": mar_smoke,
}
