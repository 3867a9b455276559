"""MaskGIT on TiTok's tokens: all at once, the surest first (Chang et al. 2022, arXiv 2202.04200; Yu et al. 2024,
arXiv 2406.07550).

Data: tokens of ImageNet-1k at 256 px by a TiTok: ``gen convert tokenizer_titok_l32.bin --out runs/titok-l32``, ``gen
encode runs/titok-l32 --data IMAGENET --flip --out runs/titok-l32-tokens``; train with ``--data runs/titok-l32-tokens
--tokenizer runs/titok-l32``.

Recipe (official configuration of B-64; L-32 and S-128 are taken to share it): 500,000 steps of 2048 images, AdamW
(0.9, 0.96) with 2e-4 falling to 1e-5 along a cosine after 10,000 steps of warm-up, weight decay 0.03 (ours on all
parameters), clipping at 1, average of decay 0.999 with warm-up, bfloat16. Masks by the arccos schedule, label smoothing
0.1, weight 0.1 on tokens that were not masked, class dropout 0.1. The BERTs drop a tenth of their activations;
attention weights, of which the official code drops as many, stay whole here: fused attention has none.

Expected (FID-50k of ImageNet 256, 50 images of each class, ADM's evaluator; official README), sampled as each preset
says:

| | network | tokens | steps | FID |
|---|---|---|---|---|
| `maskgit-l32` | BERT, 177M | 32 | 8 | 2.77 |
| `maskgit-b64` | BERT, 177M | 64 | 8 | 2.48 |
| `maskgit-s128` | U-ViT, 295M | 128 | 64 | 1.97 |

Schedules of the training masks on L-32 (TiTok's paper): arccos and linear 2.77, root 2.80, cosine 3.19. Not reproduced
here yet; `maskgit-smoke` is measured by the tests.
"""

from typing import Any

from gen.autoregressive.decoding import ConstantScale, PowerCosineScale
from gen.autoregressive.maskgit import MaskGITConfig, maskgit
from gen.autoregressive.unmasking import MaskedSampler, RampScale
from gen.experiments import Recipe
from gen.experiments._tokens import SMOKE_EMA, cache_of, classes_of, smoke_optim, token_recipe
from gen.runs import Loaded
from gen.training.ema import Constant
from gen.training.optim import OptimConfig

__all__ = ["PRESETS", "masked_optim"]

EMA = (Constant(0.999, warmup=True),)


def masked_optim(lr: float, final: float, warmup: int = 10_000) -> OptimConfig:
    """AdamW of MaskGIT and MaskGen, falling from `lr` to `final` along a cosine."""
    return OptimConfig(
        lr, betas=(0.9, 0.96), weight_decay=0.03, schedule="cosine", warmup=warmup, final=final / lr, clip=1.0
    )


def _recipe(
    name: str,
    model: Any,
    data: str,
    tokenizer: Loaded | None,
    sampler: MaskedSampler,
    *,
    steps: int = 500_000,
    batch: int = 2048,
    lr: float = 2e-4,
) -> Recipe:
    optim = masked_optim(lr, 1e-5)
    return token_recipe(name, model, data, tokenizer, sampler=sampler, steps=steps, batch=batch, optim=optim, emas=EMA)


def maskgit_l32(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGIT on TiTok-L-32, a BERT of 177M parameters (data: tokens; tokenizer: the TiTok)."""
    sampler = MaskedSampler(8, 9.5, guidance=RampScale(5.5))
    return _recipe("maskgit-l32", maskgit("l32", dtype="bfloat16"), data, tokenizer, sampler)


def maskgit_b64(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGIT on TiTok-B-64, a BERT of 177M parameters (data: tokens; tokenizer: the TiTok)."""
    sampler = MaskedSampler(8, 11.0, guidance=RampScale(4.0))
    return _recipe("maskgit-b64", maskgit("b64", dtype="bfloat16"), data, tokenizer, sampler)


def maskgit_s128(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGIT on TiTok-S-128, a U-ViT of 295M parameters (data: tokens; tokenizer: the TiTok)."""
    sampler = MaskedSampler(64, 2.8, guidance=PowerCosineScale(6.9, 3.0))
    return _recipe("maskgit-s128", maskgit("s128", dtype="bfloat16"), data, tokenizer, sampler)


def maskgit_one_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGIT on TiTok-B-64 with 12 blocks on one GPU: 300k steps at batch 512 (data: tokens; tokenizer: the TiTok)."""
    sampler, model = MaskedSampler(8, 11.0, guidance=RampScale(4.0)), maskgit("b64", depth=12, dtype="bfloat16")
    return _recipe("maskgit-one-gpu", model, data, tokenizer, sampler, steps=300_000, batch=512, lr=1e-4)


def maskgit_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy MaskGIT, a minute on a laptop (data: any small token cache, of 8x8 digits for example)."""
    cache = cache_of(data)
    classes = classes_of(cache)
    model = MaskGITConfig(
        shape=cache.shape,
        vocabulary=cache.vocabulary,
        num_classes=classes,
        cond_dropout=0.1 if classes else 0.0,
        width=64,
        depth=3,
        heads=4,
        hidden=256,
        scan=False,
    )
    return token_recipe(
        "maskgit-smoke",
        model,
        data,
        tokenizer,
        sampler=MaskedSampler(8, 4.0, annealed=False, guidance=ConstantScale(1.5 if classes else 1.0)),
        steps=1500,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


PRESETS = {
    "maskgit-l32": maskgit_l32,
    "maskgit-b64": maskgit_b64,
    "maskgit-s128": maskgit_s128,
    "maskgit-one-gpu": maskgit_one_gpu,
    "maskgit-smoke": maskgit_smoke,
}
