"""VAR: token maps from coarse to fine, each map at once (Tian et al. 2024, arXiv 2404.02905).

Data: tokens of ImageNet-1k at 256 px (512 for d36) by VAR's tokenizer: ``gen convert vae_ch160v4096z32.pth --out
runs/var-vqvae`` (or the preset `var-vqvae`), ``gen encode runs/var-vqvae --data IMAGENET --out runs/var-tokens``. Train
with ``--data runs/var-tokens --tokenizer runs/var-vqvae``. The published runs cut a fresh crop in every epoch, of
images whose shorter side is 1.125 times as long; a cache holds one crop of each.

Recipe (README and defaults of the official code): AdamW (0.9, 0.95), weight decay 0.05 (ours on all parameters; d30's
rises to 0.08 there), clipping at 2, a rate of base x batch / 256, warm-up over a fiftieth of the epochs, then constant
for a twentieth of the rest and linear to `final` of it (ours falls from the warm-up on), class dropout 0.1, no average;
half precision. Sampled with guidance 1.5 counted from 0, which grows over the maps, top-k 900 and top-p 0.96.

| | parameters | epochs | batch | base rate | gate gain | final |
|---|---|---|---|---|---|---|
| `var-d16` | 310 M | 200 | 768 | 1e-4 | 1e-3 | 0.1 |
| `var-d20` | 601 M | 250 | 768 | 1e-4 | 1e-3 | 0.1 |
| `var-d24` | 1.03 B | 350 | 768 | 8e-5 | 1e-4 | 0.01 |
| `var-d30` | 2.01 B | 350 | 1024 | 8e-5 | 1e-5 | 0.01 |
| `var-d36-512` | 2.35 B | 350 | 768 | 8e-5 | 5e-6 | 0.01 |

Expected (FID of ImageNet 256, ADM's evaluator, official README): d16 3.55, d20 2.95, d24 2.33, d30 1.97, and at 512 px
d36 2.63. Papers on distillation measure 4.19 and 3.40 of the released d16 and d20. Not reproduced here yet.
"""

from pathlib import Path
from typing import Any

from gen.autoregressive.decoding import LinearScale
from gen.autoregressive.scales import ScaleSampler
from gen.autoregressive.var import VARConfig, var
from gen.data.random import RANDOM
from gen.errors import GenError
from gen.experiments import Recipe
from gen.experiments._tokens import SMOKE_EMA, cache_of, classes_of, smoke_optim, token_recipe
from gen.nn.network import param_shapes
from gen.runs import Loaded
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.var_vqvae import SCALES, VARVQVAEConfig, var_vqvae
from gen.training.optim import OptimConfig
from gen.training.run import RunConfig
from gen.training.task import Model

__all__ = ["PRESETS"]

IMAGES = 1_281_167  # of ImageNet-1k's training set


def _recipe(name: str, model: VARConfig, data: str, tokenizer: Loaded | None, **how: Any) -> Recipe:
    """A VAR with its tokenizer, of which the shapes stand for it in a run that is only planned.

    Raises GenError for a tokenizer of another kind.
    """
    if tokenizer is None and data == RANDOM:
        side = next((side for side, scales in SCALES.items() if scales == model.scales), 256)
        published = var_vqvae(side)
        models, shapes = {"tokenizer": Model(published)}, {"tokenizer": param_shapes(published)}
        tokenizer = Loaded(Path("var-vqvae"), RunConfig("var-vqvae", models=models), shapes, "raw", 0)
    if tokenizer is not None and not isinstance(tokenizer.tokenizer, VARVQVAEConfig):
        raise GenError(
            f"VAR predicts the token maps of VAR's tokenizer, not codes of {type(tokenizer.tokenizer).__name__}; give "
            "its run"
        )
    return token_recipe(name, model, data, tokenizer, reads_codes=True, **how)


def _published(
    name: str,
    model: VARConfig,
    data: str,
    tokenizer: Loaded | None,
    *,
    epochs: int,
    batch: int,
    base: float,
    final: float,
) -> Recipe:
    steps = epochs * IMAGES // batch
    optim = OptimConfig(
        base * batch / 256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        schedule="linear",
        warmup=steps / 50,
        final=final,
        clip=2.0,
    )
    return _recipe(name, model, data, tokenizer, sampler=ScaleSampler(), steps=steps, batch=batch, optim=optim)


def _network(depth: int, gain: float, **changes: Any) -> VARConfig:
    return var(depth, gain=gain, drop_path=0.1 * depth / 24, dtype="bfloat16", remat="full", **changes)


def var_d16(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """VAR-d16, 310M parameters, ImageNet 256 (data: tokens; tokenizer: VAR's)."""
    model = _network(16, 1e-3)
    return _published("var-d16", model, data, tokenizer, epochs=200, batch=768, base=1e-4, final=0.1)


def var_d20(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """VAR-d20, 601M parameters, ImageNet 256 (data: tokens; tokenizer: VAR's)."""
    model = _network(20, 1e-3)
    return _published("var-d20", model, data, tokenizer, epochs=250, batch=768, base=1e-4, final=0.1)


def var_d24(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """VAR-d24, 1.03B parameters, ImageNet 256 (data: tokens; tokenizer: VAR's)."""
    model = _network(24, 1e-4)
    return _published("var-d24", model, data, tokenizer, epochs=350, batch=768, base=8e-5, final=0.01)


def var_d30(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """VAR-d30, 2.01B parameters, ImageNet 256 (data: tokens; tokenizer: VAR's)."""
    model = _network(30, 1e-5)
    return _published("var-d30", model, data, tokenizer, epochs=350, batch=1024, base=8e-5, final=0.01)


def var_d36_512(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """VAR-d36-s, 2.35B parameters with shared AdaLN, ImageNet 512 (data: tokens; tokenizer: VAR's at 512 px)."""
    model = _network(36, 5e-6, scales=SCALES[512], shared=True)
    return _published("var-d36-512", model, data, tokenizer, epochs=350, batch=768, base=8e-5, final=0.01)


def var_one_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """VAR of depth 12, 132M parameters, on one GPU: 200k steps at batch 128 (data: tokens; tokenizer: VAR's)."""
    optim = OptimConfig(
        1e-4, betas=(0.9, 0.95), weight_decay=0.05, schedule="linear", warmup=4_000, final=0.1, clip=2.0
    )
    model, sampler = var(12, drop_path=0.05, dtype="bfloat16"), ScaleSampler()
    return _recipe("var-one-gpu", model, data, tokenizer, sampler=sampler, steps=200_000, batch=128, optim=optim)


def var_smoke(data: str, tokenizer: Loaded) -> Recipe:
    """A toy VAR, a minute on a laptop (data: tokens of digits or CIFAR-10; tokenizer: `var-vqvae-smoke`'s run)."""
    quantizer = getattr(tokenizer.tokenizer, "quantizer", None)
    if not isinstance(quantizer, Residual):
        raise GenError(f"VAR predicts token maps, which {type(tokenizer.tokenizer).__name__} has not; give VAR's run")
    model = VARConfig(
        quantizer, num_classes=classes_of(cache_of(data)), width=64, depth=3, heads=4, hidden=256, gain=0.1, scan=False
    )
    return _recipe(
        "var-smoke",
        model,
        data,
        tokenizer,
        sampler=ScaleSampler(LinearScale(2.0), top_k=0, top_p=1.0),
        steps=800,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


PRESETS = {
    "var-d16": var_d16,
    "var-d20": var_d20,
    "var-d24": var_d24,
    "var-d30": var_d30,
    "var-d36-512": var_d36_512,
    "var-one-gpu": var_one_gpu,
    "var-smoke": var_smoke,
}
