"""Instella's generators: text to images over 128 tokens of 64 bits (Instella-T2I, arXiv 2506.21022).

Data: bits of images at 512 px by Instella's tokenizer (``gen convert TOKENIZER.safetensors --out runs/instella``, ``gen
encode``), beside them the states of AMD-OLMo-1B after each of its 16 layers for every caption, at most 128 tokens
padded on the left: "text" (128, 16, 2048) and "text_mask" (128,). In the published training a dropped caption (one of
ten) is the empty caption; here it is none.

Recipe (example scripts of the official code): AdamW (0.9, 0.999), rate 1e-4 after 1,000 steps of warm-up, no weight
decay, clipping at 1, batch 8 x 512, bfloat16, no average. Data are LAION-COCO, then LAION and synthetic images 3 to 1;
numbers of steps are not published. Diffusion: times are the logistic function of a normal number, the network says
which bits were flipped, the loss is the mean over the bits. Sampled in 20 steps with guidance 7.5, token by token with
guidance 9 at temperature 0.5, both counted from 0.

Expected: the paper's tables (GenEval and others) were not at hand; nothing is claimed here. The smoke presets learn the
digits' bits with classes in the place of captions.
"""

from typing import Any

from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler
from gen.autoregressive.bits import BitSampler
from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.instella import InstellaDiffusionConfig
from gen.autoregressive.instella_ar import InstellaARConfig
from gen.experiments import Recipe
from gen.experiments._tokens import SMOKE_EMA, cache_of, classes_of, smoke_optim, token_recipe
from gen.runs import Loaded
from gen.training.optim import OptimConfig

__all__ = ["PRESETS"]

OPTIM = OptimConfig(1e-4, warmup=1_000, clip=1.0)
LARGE: dict[str, Any] = {"dtype": "bfloat16", "remat": "full"}


def _diffusion(network: InstellaDiffusionConfig) -> BinaryDiffusion:
    return BinaryDiffusion(network, times="logit-normal")


def instella_diffusion(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """Instella's diffusion model, 1.29B parameters, text to image (data: bits and text; tokenizer: Instella's)."""
    model, sampler = _diffusion(InstellaDiffusionConfig(**LARGE)), BinarySampler(rule="renoise", guidance=8.5)
    return token_recipe(
        "instella-diffusion", model, data, tokenizer, sampler=sampler, steps=200_000, batch=4096, optim=OPTIM
    )


def instella_ar(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """Instella's autoregressive model, 881M parameters, text to image (data: bits and text; tokenizer: Instella's)."""
    sampler = BitSampler(ConstantScale(10.0), temperature=0.5)
    return token_recipe(
        "instella-ar",
        InstellaARConfig(**LARGE),
        data,
        tokenizer,
        sampler=sampler,
        steps=200_000,
        batch=4096,
        optim=OPTIM,
    )


def instella_one_gpu(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A diffusion model of half the width on one GPU, batch 256 (data: bits and text; tokenizer: Instella's)."""
    network = InstellaDiffusionConfig(width=1024, depth=16, heads=8, dtype="bfloat16")
    sampler = BinarySampler(rule="renoise", guidance=8.5)
    return token_recipe(
        "instella-one-gpu",
        _diffusion(network),
        data,
        tokenizer,
        sampler=sampler,
        steps=200_000,
        batch=256,
        optim=OPTIM,
    )


def _toy(data: str) -> dict[str, Any]:
    """The size of the toys, for the bits at `data`."""
    cache = cache_of(data, "bits")
    classes = classes_of(cache)
    return {
        "shape": cache.shape,
        "width": 64,
        "depth": 3,
        "heads": 4,
        "text": None,
        "num_classes": classes,
        "scan": False,
    }


def _smoke(name: str, model: Any, data: str, tokenizer: Loaded | None, sampler: Any) -> Recipe:
    return token_recipe(
        name,
        model,
        data,
        tokenizer,
        sampler=sampler,
        steps=800,
        batch=64,
        optim=smoke_optim(),
        emas=SMOKE_EMA,
        smoke=True,
    )


def instella_diffusion_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy of diffusion over bits, a minute on a laptop (data: bits of digits; tokenizer: `instella-smoke`'s run)."""
    network = InstellaDiffusionConfig(**_toy(data))
    sampler = BinarySampler(guidance=1.5 if network.num_classes else 1.0)
    return _smoke("instella-diffusion-smoke", _diffusion(network), data, tokenizer, sampler)


def instella_ar_smoke(data: str, tokenizer: Loaded | None = None) -> Recipe:
    """A toy that writes tokens of bits, a minute on a laptop (data: bits; tokenizer: `instella-smoke`'s run)."""
    model = InstellaARConfig(**_toy(data))
    sampler = BitSampler(ConstantScale(1.5 if model.num_classes else 1.0))
    return _smoke("instella-ar-smoke", model, data, tokenizer, sampler)


PRESETS = {
    "instella-diffusion": instella_diffusion,
    "instella-ar": instella_ar,
    "instella-one-gpu": instella_one_gpu,
    "instella-diffusion-smoke": instella_diffusion_smoke,
    "instella-ar-smoke": instella_ar_smoke,
}
