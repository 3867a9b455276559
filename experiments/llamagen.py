"""LlamaGen: next-token prediction by a plain Llama decoder (Sun et al. 2024, arXiv 2406.06525).

Data: ImageNet-1k tokens by the VQ-16 tokenizer, 16 x 16 of 16384 at 256 px or 24 x 24 at 384 px (``gen encode
TOKENIZER --data imagenet/ --flip``, where TOKENIZER is ``gen convert vq_ds16_c2i.pt`` or an own run). The authors keep
ten crops of every image at 1.1 times the size, and in half of the cases 1.05; a cache here keeps the centre and its
mirror image. AdamW 1e-4 constant, betas 0.9 and 0.95, weight decay 0.05 (theirs spares norms), clipping at 1, batch
256, 300 epochs, dropout 0.1, label dropout 0.1, bfloat16, no average of weights. Captions (`llamagen-t2i-xl`) are
features of 120 positions by FLAN-T5-XL, ``text`` and ``text_mask`` beside the tokens, padded on the left; their recipe
is not published in full, and the class models' stands in for it.

Expected (ImageNet-256, FID-50k by ADM's evaluator; 384 px images brought to 256; official README):

| | tokens | guidance | FID |
|---|---|---|---|
| B, L | 16 x 16 | 2.0 | 5.46, 3.80 (`llamagen-l`) |
| L, XL, XXL, 3B | 24 x 24 | 2.0, 1.75, 1.75, 1.65 | 3.07, 2.62 (`llamagen-xl-384`), 2.34, 2.18 |

Users measured 6.1 (B), 6.2 to 6.8 (L) and 3.7 (XL) from the released weights. The loss ends between 7.3 and 7.9 nats
per token. Not reproduced here yet; `llamagen-smoke` is measured by the tests.
"""

from typing import Any

from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.gpt import GPTConfig, gpt
from gen.autoregressive.sampler import TokenSampler
from gen.experiments import Recipe
from gen.experiments._tokens import SMOKE_EMA, adamw, cache_of, classes_of, smoke_optim, token_recipe
from gen.runs import Loaded

__all__ = ["PRESETS"]

EPOCH = 1_281_167  # images


def _decoder(name: str, **changes: Any) -> GPTConfig:
    return gpt(name, dtype="bfloat16", **{"remat": "full", **changes})


def llamagen_l(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LlamaGen-L on ImageNet-256, the paper's 300 epochs (data: a token cache)."""
    return token_recipe(
        "llamagen-l",
        _decoder("L"),
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(2.0)),
        steps=300 * EPOCH // 256,
        batch=256,
        optim=adamw(),
    )


def llamagen_xl_384(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LlamaGen-XL on ImageNet at 384 px, 576 tokens, the paper's 300 epochs (data: a token cache)."""
    return token_recipe(
        "llamagen-xl-384",
        _decoder("XL", shape=(24, 24)),
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(1.75)),
        steps=300 * EPOCH // 256,
        batch=256,
        optim=adamw(),
    )


def llamagen_t2i_xl(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LlamaGen-XL from captions (data: a token cache with text and text_mask beside the tokens)."""
    return token_recipe(
        "llamagen-t2i-xl",
        _decoder("XL", num_classes=0, text=(120, 2048)),
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(7.5), top_k=1000),
        steps=500_000,
        batch=256,
        optim=adamw(),
    )


def llamagen_b(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """LlamaGen-B on ImageNet-256, 50 epochs on one GPU (data: a token cache)."""
    return token_recipe(
        "llamagen-b",
        _decoder("B", remat="none"),
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(2.0)),
        steps=50 * EPOCH // 256,
        batch=256,
        optim=adamw(),
    )


def llamagen_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy LlamaGen, a minute on a laptop (data: any small token cache, of 8x8 digits for example)."""
    cache = cache_of(data)
    model = GPTConfig(
        cache.shape, cache.vocabulary, 64, 2, 4, 192, num_classes=classes_of(cache), dropout=0.1, scan=False
    )
    return token_recipe(
        "llamagen-smoke",
        model,
        data,
        tokenizer,
        sampler=TokenSampler(ConstantScale(1.5 if model.num_classes else 1.0)),
        steps=600,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


PRESETS = {
    "llamagen-l": llamagen_l,
    "llamagen-xl-384": llamagen_xl_384,
    "llamagen-t2i-xl": llamagen_t2i_xl,
    "llamagen-b": llamagen_b,
    "llamagen-smoke": llamagen_smoke,
}
