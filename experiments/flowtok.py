"""FlowTok's image tokenizer (He et al. 2025, arXiv 2503.10772): 77 latent tokens, as many as a caption has.

Data: images at 256 px with the CLIP ViT-L/14 features of their captions, "text" (77, 768) (the paper: DataComp-1B).
The paper gives the network (TA-TiTok's with rotary positions and SwiGLU, encoder B, decoder L, 16 channels) and trains
it as TA-TiTok; the settings here are TA-TiTok's: batch 1024, AdamW 1e-4 with betas (0.9, 0.99) and weight
decay 1e-4, squared error on [0, 1], perceptual weight 1.1, KL 1e-6, EMA 0.9999.

Expected (ImageNet validation 256 px, zero-shot from DataComp-1B, paper): rFID 1.02, as TA-TiTok has with 128 tokens.
Not reproduced here yet; `flowtok-smoke` is measured by the tests. The flow from text to these latents
(`gen.tokenizers.flowtok`) reaches FID 10.06 on COCO with XL (paper).
"""

from typing import Any

from gen.data.images import Images
from gen.experiments import Recipe
from gen.experiments._tokenizers import (
    SMOKE_EMA,
    adam,
    perceptual,
    smoke_images,
    smoke_latents,
    smoke_optim,
    tokenizer_recipe,
)
from gen.tokenizers.flowtitok import FlowTiTokConfig
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.trunk import Tower
from gen.training.ema import Constant
from gen.training.task import Stage

__all__ = ["PRESETS"]

TEXT = (77, 768)  # of CLIP ViT-L/14


def _recipe(name: str, data: str, batch: int, steps: int, **changes: Any) -> Recipe:
    task = TokenizerTask(
        tokenizer=FlowTiTokConfig(text=TEXT, dtype="bfloat16", remat="dots", **changes),
        optim=adam(1e-4 * batch / 1024, (0.9, 0.99), weight_decay=1e-4, warmup=10_000, schedule="cosine", clip=1.0),
        emas=(Constant(0.9999),),
        terms=perceptual(1.1),
    )
    images = Images(data, 256, crop="adm", labels="text", width=TEXT[1], length=TEXT[0])
    return tokenizer_recipe(name, [Stage("tokenizer", task, steps, batch, images)])


def flowtok_tokenizer(data: str) -> Recipe:
    """FlowTok's tokenizer, encoder B and decoder L (data: images with CLIP features of their captions)."""
    return _recipe("flowtok-tokenizer", data, 1024, 650_000)


def flowtok_one_gpu(data: str) -> Recipe:
    """The same on one GPU with both towers B: batch 128 (data: images with CLIP features of their captions)."""
    return _recipe("flowtok-one-gpu", data, 128, 400_000, decoder=Tower(768, 12, 12))


def flowtok_smoke(data: str | None = None) -> Recipe:
    """A toy of FlowTok's tokenizer without text, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    tower = Tower(64, 2, 4)
    tokenizer = FlowTiTokConfig((side, side, channels), side // 4, 16, smoke_latents(side), tower, tower, scan=False)
    task = TokenizerTask(tokenizer=tokenizer, optim=smoke_optim(), emas=SMOKE_EMA, l1=0.1)
    return tokenizer_recipe("flowtok-smoke", [Stage("tokenizer", task, 800, 64, images)], smoke=True)


PRESETS = {
    "flowtok-tokenizer": flowtok_tokenizer,
    "flowtok-one-gpu": flowtok_one_gpu,
    "flowtok-smoke": flowtok_smoke,
}
