"""RAR: autoregression over permuted orders that are annealed to raster order (Yu et al. 2024, arXiv 2411.00776).

Data: ImageNet-1k tokens by MaskGIT's VQGAN, 16 x 16 of 1024 (``gen convert maskgit-vqgan-imagenet-f16-256.bin``, then
``gen encode``). The authors keep ten crops at 1.1 times the size. AdamW 4e-4 falling to 1e-5, 62,500 steps of warm-up,
betas 0.9 and 0.96, weight decay 0.03, clipping at 1, batch 2048, 250,000 steps; all orders at random for 125,000 steps,
then fewer, none from 187,500 on. Dropout 0.1, label dropout 0.1, bfloat16, no average of weights.

Expected (ImageNet-256, FID-50k by ADM's evaluator; official README): B 1.95 (`rar-b`), L 1.70, XL 1.50 (`rar-xl`),
XXL 1.48. A user who changed batch and steps got 0.7 more for B. Not reproduced here yet; `rar-smoke` is
measured by the tests.
"""

from typing import Any

from gen.autoregressive.decoding import PowerCosineScale
from gen.autoregressive.rar import RARConfig, rar
from gen.autoregressive.sampler import TokenSampler
from gen.experiments import Recipe
from gen.experiments._tokens import SMOKE_EMA, adamw, cache_of, classes_of, smoke_optim, token_recipe
from gen.runs import Loaded

__all__ = ["PRESETS"]


def _optim(lr: float, warmup: int) -> Any:
    return adamw(lr, (0.9, 0.96), 0.03, schedule="cosine", warmup=warmup, final=0.025)


def rar_b(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """RAR-B on ImageNet-256, the paper's 250,000 steps (data: a token cache)."""
    return token_recipe(
        "rar-b",
        rar("B", dtype="bfloat16", remat="full"),
        data,
        tokenizer,
        sampler=TokenSampler(PowerCosineScale(16.0, 2.75)),
        steps=250_000,
        batch=2048,
        optim=_optim(4e-4, 62_500),
    )


def rar_xl(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """RAR-XL on ImageNet-256, the paper's 250,000 steps (data: a token cache)."""
    return token_recipe(
        "rar-xl",
        rar("XL", dtype="bfloat16", remat="full"),
        data,
        tokenizer,
        sampler=TokenSampler(PowerCosineScale(6.9, 1.5), temperature=1.02),
        steps=250_000,
        batch=2048,
        optim=_optim(4e-4, 62_500),
    )


def rar_one_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """RAR-B on ImageNet-256, 300,000 steps of batch 256 on one GPU (data: a token cache)."""
    return token_recipe(
        "rar-one-gpu",
        rar("B", dtype="bfloat16", remat="full", anneal=(150_000, 225_000)),
        data,
        tokenizer,
        sampler=TokenSampler(PowerCosineScale(16.0, 2.75)),
        steps=300_000,
        batch=256,
        optim=_optim(1e-4, 10_000),
    )


def rar_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy RAR, minutes on a laptop (data: any small token cache, of 8x8 digits for example)."""
    cache = cache_of(data)
    model = RARConfig(
        cache.shape, cache.vocabulary, 64, 2, 4, 128, num_classes=classes_of(cache), anneal=(300, 450), scan=False
    )
    return token_recipe(
        "rar-smoke",
        model,
        data,
        tokenizer,
        sampler=TokenSampler(PowerCosineScale(2.0 if model.num_classes else 1.0, 1.5)),
        steps=600,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


PRESETS = {"rar-b": rar_b, "rar-xl": rar_xl, "rar-one-gpu": rar_one_gpu, "rar-smoke": rar_smoke}
