"""What tests of learning share: digits as tokens of patches; whether images are of the class asked for."""

from pathlib import Path

import numpy as np

from gen.data.sources import Digits, digits
from gen.experiments._tokenizers import SMOKE_EMA, smoke_optim
from gen.tokenizers.patch_vq import PatchVQConfig
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.train import TokenizerTask
from gen.training.engine import train
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = ["agreement", "patch_tokenizer"]


def patch_tokenizer(folder: Path) -> str:
    """The run of a tokenizer of 2x2 patches, 16 tokens of 256 for a digit: a dense layer each way, soon trained."""
    codes = VQ(256, 4, averages=True, restart="random", decay=0.97)
    task = TokenizerTask(PatchVQConfig((8, 8, 1), 2, codes), optim=smoke_optim(), emas=SMOKE_EMA)
    stage = Stage("tokenizer", task, 400, 64, Digits("train"))
    train(RunConfig("patches", (stage,), engine=EngineConfig(quiet=True)), folder)
    return str(folder)


def agreement(images: np.ndarray) -> float:
    """The share of images (N, 8, 8, 1), of the classes 0 to 9 in turn, whose nearest digit is of their class."""
    known = digits("all").arrays
    flat, real = (a.reshape(len(a), -1).astype(np.float32) for a in (images, known["image"]))
    nearest = np.square(flat[:, None] - real[None]).sum(-1).argmin(1)
    return float((known["label"][nearest] == np.arange(len(images)) % 10).mean())
