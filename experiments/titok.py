"""TiTok: images as 32 to 256 tokens in a row (Yu et al. 2024, "An Image is Worth 32 Tokens", arXiv 2406.07550).

Data: ImageNet-1k images at 256 px. The two-stage presets (`titok-l32`, `titok-b64`, `titok-s128`) take MaskGIT's VQGAN
as --tokenizer: ``gen convert maskgit-vqgan-imagenet-f16-256.bin --out runs/maskgit-vqgan``, or one's own, of which
`titok-proxy` trains one by the losses below (no published recipe). One million steps learn to name its codes, 500,000
more tune the decoder and the VQGAN's decoder on pixels. The single-stage presets follow
TA-TiTok's recipe without its text, one million steps at batch 256 by the authors' account; no file of it is published.

AdamW 1e-4 falling to 1e-5, weight decay 1e-4 (ours decays all weights, theirs no biases, norms and embeddings),
clipping at 1, average of decay 0.999, mixed precision (float16 there, bfloat16 here). L2, codebook 1, commitment 0.25,
KL 1e-6, hinge losses of weight 0.01 from step 20,000 (second stage) or 0.1 from step 200,000 on, LeCAM 0.001. The
perceptual terms are LPIPS (``gen convert lpips``) and 0.1 times the squared difference of ConvNeXt-S's class logits
(``gen convert convnext``), the second alone in the two-stage recipe. Without weights a run says what it goes without.
Official crops keep the shorter side at 256 pixels; ours (ADM's) vary it as well.

Expected (ImageNet validation 256 px, rFID; official README):

| | tokens | codes | rFID |
|---|---|---|---|
| `titok-l32` | 32 | 4096 x 12 | 2.21 |
| `titok-b64` | 64 | 4096 x 12 | 1.70 |
| `titok-s128` | 128 | 4096 x 12 | 1.71 |
| `titok-bl64-vq`, `titok-bl128-vq`, `titok-sl256-vq` | 64, 128, 256 | 8192 x 64 | 2.06, 1.49, 1.03 |
| `titok-ll32-vae`, `titok-bl64-vae`, `titok-bl128-vae` | 32, 64, 128 | KL, 16 channels | 1.61, 1.25, 0.84 |

Not reproduced here yet; `titok-smoke` is measured by the tests.
"""

from typing import Any

from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._tokenizers import SMOKE_EMA, smoke_images, smoke_optim, square_images, tokenizer_recipe
from gen.features.convnext import ConvNeXt
from gen.nn.discriminators import TiTokDiscriminator
from gen.runs import Loaded
from gen.tokenizers.adversarial import AdversarialTask, LeCAM
from gen.tokenizers.losses import LPIPS, FeatureTerm, LiteMaps, available
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.proxy import SECOND_STAGE, ProxyTask
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import BASE, LARGE, SMALL, TiTokConfig, Tower
from gen.tokenizers.train import TokenizerTask
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.task import Stage

__all__ = ["PRESETS", "single_stage", "terms", "titok_optim"]

EMA = (Constant(0.999, warmup=True),)
PROXY = MaskGITVQGANConfig()
CODES = VQ(8192, 64)
LOGITS = FeatureTerm(ConvNeXt(), weight=0.1)


def titok_optim(warmup: int = 10_000, betas: tuple[float, float] = (0.9, 0.999)) -> OptimConfig:
    """AdamW of all recipes."""
    return OptimConfig(1e-4, betas=betas, weight_decay=1e-4, schedule="cosine", warmup=warmup, final=0.1, clip=1.0)


def terms(*wanted: Any, instead: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """Those of the perceptual terms whose weights are here; what a run goes without is printed."""
    found, lines = available(wanted, *instead)
    for line in lines:
        print(line)
    return found


def single_stage(tokenizer: Any, **changes: Any) -> AdversarialTask:
    """TA-TiTok's training, which is also that of the single-stage TiTok; `changes` to its settings."""
    settings: dict[str, Any] = {
        "optim": titok_optim(),
        "emas": EMA,
        "discriminator": TiTokDiscriminator(tokenizer.spec.image[2]),
        "discriminator_optim": titok_optim(),
        "gan_weight": 0.1,
        "gan_start": 200_000,
        "lecam": LeCAM(),
    }
    if "terms" not in changes:
        settings["terms"] = terms(LPIPS(1.0), LOGITS, instead=(LiteMaps(1.0),))
    return AdversarialTask(tokenizer, **settings | changes)


def titok_proxy(data: str) -> Recipe:
    """MaskGIT's VQGAN by TiTok's losses, 256 tokens on a grid, for the two-stage presets (data: images)."""
    images = square_images(data, random_crop=True, flip=True)
    return tokenizer_recipe("titok-proxy", [Stage("tokenizer", single_stage(PROXY), 1_000_000, 256, images)])


def _two_stage(name: str, data: str, proxy: Loaded, tokens: int, tower: Tower) -> Recipe:
    if proxy.tokenizer != PROXY:
        raise GenError(
            f"{proxy.path} is not MaskGIT's VQGAN of 256 px; convert maskgit-vqgan-imagenet-f16-256.bin and give that "
            "run"
        )
    config = TiTokConfig(
        tokens=tokens,
        channels=None,
        encoder=tower,
        decoder=tower,
        quantizer=VQ(4096, 12, normalize=True),
        pixels=PROXY,
        init="normal",
        dtype="bfloat16",
    )
    images = square_images(data, random_crop=True, flip=True)
    naming = ProxyTask(config, optim=titok_optim(betas=(0.9, 0.99)), emas=EMA)
    painting = single_stage(
        config,
        optim=titok_optim(5_000),
        discriminator_optim=titok_optim(5_000),
        terms=terms(LOGITS),
        quantizer={"commitment": 0.0, "codebook": 0.0},
        gan_weight=0.01,
        gan_start=20_000,
        train=SECOND_STAGE,
    )
    stages = [Stage("naming", naming, 1_000_000, 256, images), Stage("painting", painting, 500_000, 256, images)]
    return tokenizer_recipe(name, stages, frozen={"proxy": proxy.params["tokenizer"]}, origins={"proxy": proxy.origin})


def titok_l32(data: str, tokenizer: Loaded) -> Recipe:
    """TiTok-L-32: two stages, 32 tokens (data: images; tokenizer: MaskGIT's VQGAN)."""
    return _two_stage("titok-l32", data, tokenizer, 32, LARGE)


def titok_b64(data: str, tokenizer: Loaded) -> Recipe:
    """TiTok-B-64: two stages, 64 tokens (data: images; tokenizer: MaskGIT's VQGAN)."""
    return _two_stage("titok-b64", data, tokenizer, 64, BASE)


def titok_s128(data: str, tokenizer: Loaded) -> Recipe:
    """TiTok-S-128: two stages, 128 tokens (data: images; tokenizer: MaskGIT's VQGAN)."""
    return _two_stage("titok-s128", data, tokenizer, 128, SMALL)


def _single(name: str, data: str, tokens: int, encoder: Tower, quantizer: VQ | None) -> Recipe:
    config = TiTokConfig(
        tokens=tokens,
        channels=None if quantizer else 16,
        encoder=encoder,
        quantizer=quantizer,
        init="normal",
        dtype="bfloat16",
    )
    images = square_images(data, random_crop=True, flip=True)
    return tokenizer_recipe(name, [Stage("tokenizer", single_stage(config), 1_000_000, 256, images)])


def titok_bl64_vq(data: str) -> Recipe:
    """TiTok-BL-64 VQ: one stage, 64 tokens (data: images)."""
    return _single("titok-bl64-vq", data, 64, BASE, CODES)


def titok_bl128_vq(data: str) -> Recipe:
    """TiTok-BL-128 VQ: one stage, 128 tokens (data: images)."""
    return _single("titok-bl128-vq", data, 128, BASE, CODES)


def titok_sl256_vq(data: str) -> Recipe:
    """TiTok-SL-256 VQ: one stage, 256 tokens (data: images)."""
    return _single("titok-sl256-vq", data, 256, SMALL, CODES)


def titok_ll32_vae(data: str) -> Recipe:
    """TiTok-LL-32 VAE: one stage, 32 continuous tokens (data: images)."""
    return _single("titok-ll32-vae", data, 32, LARGE, None)


def titok_bl64_vae(data: str) -> Recipe:
    """TiTok-BL-64 VAE: one stage, 64 continuous tokens (data: images)."""
    return _single("titok-bl64-vae", data, 64, BASE, None)


def titok_bl128_vae(data: str) -> Recipe:
    """TiTok-BL-128 VAE: one stage, 128 continuous tokens (data: images)."""
    return _single("titok-bl128-vae", data, 128, BASE, None)


def titok_one_gpu(data: str) -> Recipe:
    """TiTok S/S in bfloat16 on one GPU: one stage, 128 tokens, batch 64, 300,000 steps (data: images)."""
    config = TiTokConfig(
        tokens=128, channels=None, encoder=SMALL, decoder=SMALL, quantizer=CODES, init="normal", dtype="bfloat16"
    )
    task = single_stage(config, gan_start=60_000)
    images = square_images(data, random_crop=True, flip=True)
    return tokenizer_recipe("titok-one-gpu", [Stage("tokenizer", task, 300_000, 64, images)])


def smoke_tower(side: int) -> dict[str, Any]:
    """Towers of toys: 16 patches of 8 x 8 digits, 64 of 32 px images."""
    tower = Tower(64, 1, 8)
    return {"patch": 2 if side == 8 else 4, "encoder": tower, "decoder": tower, "scan": False}


def titok_smoke(data: str | None = None) -> Recipe:
    """A toy TiTok with a codebook, a minute on a laptop: 8x8 digits, or images at 32 px (data)."""
    images, side, channels = smoke_images(data)
    config = TiTokConfig(
        (side, side, channels), tokens=8, channels=None, quantizer=VQ(64, 8, restart="random"), **smoke_tower(side)
    )
    task = TokenizerTask(config, optim=smoke_optim(), emas=SMOKE_EMA)
    return tokenizer_recipe("titok-smoke", [Stage("tokenizer", task, 600, 64, images)], smoke=True)


PRESETS = {
    "titok-proxy": titok_proxy,
    "titok-l32": titok_l32,
    "titok-b64": titok_b64,
    "titok-s128": titok_s128,
    "titok-bl64-vq": titok_bl64_vq,
    "titok-bl128-vq": titok_bl128_vq,
    "titok-sl256-vq": titok_sl256_vq,
    "titok-ll32-vae": titok_ll32_vae,
    "titok-bl64-vae": titok_bl64_vae,
    "titok-bl128-vae": titok_bl128_vae,
    "titok-one-gpu": titok_one_gpu,
    "titok-smoke": titok_smoke,
}
