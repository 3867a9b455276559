"""MaskGen: captions to TA-TiTok's tokens, discrete or continuous (Kim et al. 2025, arXiv 2501.07730).

Data: a cache of TA-TiTok's tokens (VQ) or latents (KL), and beside them for each image "prompt" (77, 768), the features
of its caption before the last block of CLIP ViT-L/14-336's text tower, "pooled" (768,), the projected feature, and
"aesthetic" (), its score. A file empty.npz in the cache's folder holds "prompt" and "pooled" of the empty caption: it
takes the place of a tenth of the captions, guidance starts from it, and it becomes the run's artifact "empty". What
TA-TiTok's decoder reads is another feature of the caption, "text": that after the last norm.

Recipe (official): VQ 500,000 steps at 4e-4, then 250,000 at 1e-4 on images of higher score (ours: the second by
``--from``), AdamW (0.9, 0.96), weight decay 0.03, cosine; KL 1,000,000 and 500,000 steps at 1e-4, constant after
50,000 of warm-up, (0.9, 0.95), 0.02; batches of 2048 are ours. Data: DataComp, CC12M, LAION, JourneyDB, DALLE-3 images.

Expected (official README, zero-shot):

| | parameters | MJHQ-30K FID | GenEval |
|---|---|---|---|
| `maskgen-vq-l`, `maskgen-vq-xl` | 604M, 1177M | 7.74, 7.51 | 0.53, 0.57 |
| `maskgen-kl-l`, `maskgen-kl-xl` | 641M, 1237M | 7.24, 6.53 | 0.52, 0.55 |

Not reproduced here yet; the smoke presets are measured by the tests.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gen.autoregressive.infilling import InfillingSampler, KnownScale
from gen.autoregressive.joint import CAPTION, TextConfig, TrunkConfig
from gen.autoregressive.maskgen import TRUNKS, MaskGenConfig
from gen.autoregressive.maskgen_kl import MaskGenKLConfig
from gen.autoregressive.unmasking import MaskedSampler, RisenCosineScale
from gen.data.caches import Cache
from gen.data.random import RANDOM
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._latent_tokens import latent_token_recipe
from gen.experiments._tokens import SMOKE_EMA, cache_of, smoke_optim, token_recipe
from gen.experiments.maskgit import masked_optim
from gen.runs import Loaded
from gen.training.ema import Constant
from gen.training.optim import OptimConfig

__all__ = ["PRESETS"]

EMA = (Constant(0.9999),)
TOY = TrunkConfig(64, 2, 4, scan=False)


def _with_empty(recipe: Recipe, text: TextConfig, data: str) -> Recipe:
    """The recipe with the empty caption's features, for training and for the run.

    Raises GenError where they are missing, or not shaped as the model's captions.
    """
    file, shapes = Path(data) / "empty.npz", {name: text.conditions[name].shape for name in CAPTION}
    if data == RANDOM:
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    elif not file.is_file():
        raise GenError(
            f"{file} is missing: the features of the empty caption, an .npz file of "
            f"{' and '.join(f'{name} {shape}' for name, shape in shapes.items())}, encoded as those of the data were"
        )
    else:
        with np.load(file) as held:
            arrays = {name: np.asarray(held[name], np.float32) for name in CAPTION if name in held.files}
        if (found := {name: array.shape for name, array in arrays.items()}) != shapes:
            raise GenError(f"{file} holds {found}; expected {shapes}, as the captions of the data have")
    config = dataclasses.replace(recipe.config, frozen={**recipe.config.frozen, "empty": file.name})
    return Recipe(config, {**recipe.frozen, "empty": arrays}, {**recipe.artifacts, "empty": arrays})


def _trunk(size: str) -> TrunkConfig:
    return dataclasses.replace(TRUNKS[size], dtype="bfloat16", remat="dots")


def _vq(name: str, trunk: TrunkConfig, data: str, tokenizer: Loaded | None, **changes: Any) -> Recipe:
    model, sampler = MaskGenConfig(trunk=trunk), MaskedSampler(16, 2.0, guidance=RisenCosineScale(13.0))
    settings = {"steps": 500_000, "batch": 2048, "optim": masked_optim(4e-4, 1e-5)} | changes
    recipe = token_recipe(name, model, data, tokenizer, sampler=sampler, emas=EMA, **settings)
    return _with_empty(recipe, model.text, data)


def _kl(name: str, trunk: TrunkConfig, data: str, tokenizer: Loaded | None) -> Recipe:
    model, sampler = MaskGenKLConfig(trunk=trunk), InfillingSampler(32, guidance=KnownScale(3.0))
    optim = OptimConfig(1e-4, betas=(0.9, 0.95), weight_decay=0.02, warmup=50_000, clip=1.0)
    recipe = latent_token_recipe(
        name, model, data, tokenizer, sampler=sampler, steps=1_000_000, batch=2048, optim=optim, emas=EMA
    )
    return _with_empty(recipe, model.text, data)


def maskgen_vq_l(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGen-VQ-L, 604M parameters (data: TA-TiTok-BL-128's tokens with captions' features; tokenizer: it)."""
    return _vq("maskgen-vq-l", _trunk("L"), data, tokenizer)


def maskgen_vq_xl(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGen-VQ-XL, 1177M parameters (data: TA-TiTok-BL-128's tokens with captions' features; tokenizer: it)."""
    return _vq("maskgen-vq-xl", _trunk("XL"), data, tokenizer)


def maskgen_kl_l(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGen-KL-L, 641M parameters (data: TA-TiTok-BL-32's latents with captions' features; tokenizer: it)."""
    return _kl("maskgen-kl-l", _trunk("L"), data, tokenizer)


def maskgen_kl_xl(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGen-KL-XL, 1237M parameters (data: TA-TiTok-BL-32's latents with captions' features; tokenizer: it)."""
    return _kl("maskgen-kl-xl", _trunk("XL"), data, tokenizer)


def maskgen_one_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """MaskGen-VQ of 8 blocks on one GPU: 300k steps at batch 512 (data, tokenizer: as `maskgen-vq-l`)."""
    trunk = TrunkConfig(768, 8, 12, dtype="bfloat16", remat="dots")
    optim = masked_optim(2e-4, 1e-5)
    return _vq("maskgen-one-gpu", trunk, data, tokenizer, steps=300_000, batch=512, optim=optim)


def _toy_text(data: str, cache: Any) -> TextConfig:
    """What the captions of a small cache are given by, without scores. Raises GenError for a cache without captions."""
    row = cache.source()[0]
    if "prompt" not in row:
        raise GenError(f"{data} has no 'prompt' among {', '.join(row)}; encode images with features of their captions")
    length, width = row["prompt"].shape
    return TextConfig(length, width, score=0)


def maskgen_vq_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy MaskGen, minutes on a laptop (data: a small token cache with prompt and pooled; tokenizer: its maker)."""
    cache = cache_of(data)
    text = _toy_text(data, cache)
    return _with_empty(
        token_recipe(
            "maskgen-vq-smoke",
            MaskGenConfig(shape=cache.shape, vocabulary=cache.vocabulary, trunk=TOY, text=text),
            data,
            tokenizer,
            sampler=MaskedSampler(8, 4.0, annealed=False, guidance=RisenCosineScale(2.5)),
            steps=800,
            batch=64,
            optim=smoke_optim(),
            emas=SMOKE_EMA,
            smoke=True,
        ),
        text,
        data,
    )


def maskgen_kl_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy MaskGen on continuous tokens (data: a small latent cache with prompt and pooled; tokenizer: its maker)."""
    cache = Cache(data)
    model = MaskGenKLConfig(shape=cache.shape, trunk=TOY, text=_toy_text(data, cache), head_depth=2)
    recipe = latent_token_recipe(
        "maskgen-kl-smoke",
        model,
        data,
        tokenizer,
        sampler=InfillingSampler(min(8, model.length), 25, guidance=KnownScale(1.5)),
        steps=800,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )
    return _with_empty(recipe, model.text, data)


PRESETS = {
    "maskgen-vq-l": maskgen_vq_l,
    "maskgen-vq-xl": maskgen_vq_xl,
    "maskgen-kl-l": maskgen_kl_l,
    "maskgen-kl-xl": maskgen_kl_xl,
    "maskgen-one-gpu": maskgen_one_gpu,
    "maskgen-vq-smoke": maskgen_vq_smoke,
    "maskgen-kl-smoke": maskgen_kl_smoke,
}
