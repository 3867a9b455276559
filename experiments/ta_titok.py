"""TA-TiTok: 1D tokens whose decoder also reads a caption (Kim et al. 2025, arXiv 2501.07730).

Data: images with the features of their captions, "text" (77, 768): all positions of the text tower of CLIP ViT-L/14 at
336 px after its last norm (`gen.features.clip`), with padding, which the decoder attends to. The authors train on
DataComp, images of aspect ratio 0.5 to 2, 650,000 steps; the README's command gives batch 256. No caption is dropped.

The recipe is `gen.experiments.titok`'s of one stage; the codebook restarts hardly used codes on the closest vectors.
Their decoder keeps torch's default initial weights, by the order in which it is built; ours starts like the encoder.

Expected (ImageNet validation 256 px, zero-shot, caption "A photo of a {class}."; official README):

| | tokens | latents | rFID | IS |
|---|---|---|---|---|
| `ta-titok-bl32-vq`, `ta-titok-bl64-vq`, `ta-titok-bl128-vq` | 32, 64, 128 | 8192 x 64 | 3.95, 2.43, 1.53 | 219-223 |
| `ta-titok-bl32-kl`, `ta-titok-bl64-kl` | 32, 64 | KL, 16 channels | 1.53, 1.47 | 222, 221 |
| `ta-titok-sl128-kl` | 128 | KL, 16 channels | 0.90 | 227 |

Not reproduced here yet; `ta-titok-smoke` is measured by the tests.
"""

import dataclasses
from typing import Any

from gen.data.images import Images
from gen.data.sources import Digits
from gen.experiments import Recipe
from gen.experiments._tokenizers import SMOKE_EMA, smoke_optim, tokenizer_recipe
from gen.experiments.titok import CODES, single_stage, smoke_tower
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import BASE, SMALL, TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.task import Stage

__all__ = ["PRESETS"]

TEXT = (77, 768)
RESTARTED = dataclasses.replace(CODES, restart="closest")


def _captioned(data: str) -> Images:
    """The images at `data` with their captions' features, cropped and mirrored by chance."""
    length, width = TEXT
    return Images(data, 256, crop="random", flip=True, labels="text", width=width, length=length)


def _recipe(name: str, data: str, tokens: int, encoder: Tower, quantizer: VQ | None, **changes: Any) -> Recipe:
    config = TiTokConfig(
        tokens=tokens,
        channels=None if quantizer else 16,
        encoder=encoder,
        quantizer=quantizer,
        text=TEXT,
        init="normal",
        dtype="bfloat16",
    )
    task = single_stage(dataclasses.replace(config, **changes))
    return tokenizer_recipe(name, [Stage("tokenizer", task, 650_000, 256, _captioned(data))])


def ta_titok_bl32_vq(data: str) -> Recipe:
    """TA-TiTok-BL-32 VQ: 32 tokens (data: images with captions' features)."""
    return _recipe("ta-titok-bl32-vq", data, 32, BASE, RESTARTED)


def ta_titok_bl64_vq(data: str) -> Recipe:
    """TA-TiTok-BL-64 VQ: 64 tokens (data: images with captions' features)."""
    return _recipe("ta-titok-bl64-vq", data, 64, BASE, RESTARTED)


def ta_titok_bl128_vq(data: str) -> Recipe:
    """TA-TiTok-BL-128 VQ: 128 tokens (data: images with captions' features)."""
    return _recipe("ta-titok-bl128-vq", data, 128, BASE, RESTARTED)


def ta_titok_bl32_kl(data: str) -> Recipe:
    """TA-TiTok-BL-32 KL: 32 continuous tokens (data: images with captions' features)."""
    return _recipe("ta-titok-bl32-kl", data, 32, BASE, None)


def ta_titok_bl64_kl(data: str) -> Recipe:
    """TA-TiTok-BL-64 KL: 64 continuous tokens (data: images with captions' features)."""
    return _recipe("ta-titok-bl64-kl", data, 64, BASE, None)


def ta_titok_sl128_kl(data: str) -> Recipe:
    """TA-TiTok-SL-128 KL: 128 continuous tokens (data: images with captions' features)."""
    return _recipe("ta-titok-sl128-kl", data, 128, SMALL, None)


def ta_titok_one_gpu(data: str) -> Recipe:
    """TA-TiTok S/S KL in bfloat16 on one GPU: 64 continuous tokens, batch 64 (data: images with captions' features)."""
    recipe = _recipe("ta-titok-one-gpu", data, 64, SMALL, None, decoder=SMALL)
    (stage,) = recipe.config.stages
    stage = dataclasses.replace(stage, steps=300_000, batch=64, task=dataclasses.replace(stage.task, gan_start=60_000))
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, stages=(stage,)))


def ta_titok_smoke(data: str | None = None) -> Recipe:
    """A toy TA-TiTok, a minute on a laptop: 8x8 digits with made-up captions, or images at 32 px with text (data)."""
    images: Any = Digits("train", text=(4, 8))
    side, channels, text = 8, 1, (4, 8)
    if data is not None:
        images = Images(data, 32, labels="text")
        side, channels, text = 32, 3, images.source()[0]["text"].shape
    config = TiTokConfig(
        (side, side, channels),
        tokens=8,
        channels=None,
        quantizer=VQ(64, 8, restart="closest"),
        text=text,
        **smoke_tower(side),
    )
    task = TokenizerTask(config, optim=smoke_optim(), emas=SMOKE_EMA)
    return tokenizer_recipe("ta-titok-smoke", [Stage("tokenizer", task, 600, 64, images)], smoke=True)


PRESETS = {
    "ta-titok-bl32-vq": ta_titok_bl32_vq,
    "ta-titok-bl64-vq": ta_titok_bl64_vq,
    "ta-titok-bl128-vq": ta_titok_bl128_vq,
    "ta-titok-bl32-kl": ta_titok_bl32_kl,
    "ta-titok-bl64-kl": ta_titok_bl64_kl,
    "ta-titok-sl128-kl": ta_titok_sl128_kl,
    "ta-titok-one-gpu": ta_titok_one_gpu,
    "ta-titok-smoke": ta_titok_smoke,
}
