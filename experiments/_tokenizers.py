"""What the tokenizer experiments share: images, terms of the loss whose weights are here, frozen encoders, engine."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gen.data.images import Images
from gen.data.random import RANDOM
from gen.data.sources import Digits
from gen.experiments import Recipe
from gen.features.efficientnet_lite import EfficientNetLite
from gen.features.vit import ViTConfig
from gen.features.weights import cache_path, identity_of, load_weights, network_of
from gen.nn.network import Params, param_shapes
from gen.pretrained.features import convert_installed
from gen.tokenizers.losses import LPIPS, LiteMaps, available, frozen_terms
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.run import EngineConfig, RunConfig
from gen.training.task import Stage

__all__ = [
    "Encoder",
    "adam",
    "encoder",
    "keep_lite",
    "perceptual",
    "smoke_images",
    "smoke_latents",
    "smoke_optim",
    "square_images",
    "tokenizer_recipe",
]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder.

    Attributes:
      network: its configuration.
      params: its weights.
      origin: where they came from, as text.
    """

    network: ViTConfig
    params: Params
    origin: str


def encoder(name: str, path: str, hint: str, published: ViTConfig, data: str) -> Encoder:
    """A foundation encoder that ``gen convert`` made.

    Args:
      name: of its file in the per-user cache, where `path` is "".
      hint: what to do where it is missing.
      published: the network whose shapes stand for it in a run that is only planned.
      data: that of the run.

    Raises GenError where it is missing or damaged, unless the run is only planned.
    """
    file = Path(path) if path else cache_path(name)
    hint = hint.replace("{out}", str(file))
    if data == RANDOM and not file.exists():
        return Encoder(published, param_shapes(published), f"{name}, of which nothing but the shapes is here")
    network = network_of(file, ViTConfig, hint)
    return Encoder(network, load_weights(file, hint), f"{name} {identity_of(file, hint)}")


def keep_lite() -> None:
    """Converts the `[lite]` network of the installed package where that is still to be done."""
    if not EfficientNetLite().path.exists():
        convert_installed("lite")


def perceptual(weight: float = 1.0) -> tuple[Any, ...]:
    """LPIPS (VGG) where its weights are on this machine; else feature maps of the `[lite]` network; else nothing.

    What a run goes without is printed, and its configuration names the terms that it has.
    """
    keep_lite()
    terms, lines = available((LPIPS(weight),), LiteMaps(weight))
    for line in lines:
        print(line)
    return terms


def square_images(data: str, size: int = 256, *, random_crop: bool = False, flip: bool = False) -> Images:
    """The images at `data` without labels, cut to `size` x `size`: in the middle (ADM's), or anywhere."""
    return Images(data, size, crop="random" if random_crop else "adm", flip=flip, labels="none")


def smoke_images(data: str | None) -> tuple[Any, int, int]:
    """(data, side, channels) of smoke runs: the embedded 8 x 8 digits, or images of 32 x 32 pixels at `data`."""
    return (Digits("train"), 8, 1) if data is None else (Images(data, 32, labels="none"), 32, 3)


def smoke_latents(side: int) -> int:
    """Channels of the 4 x 4 latents of a smoke run: 32 numbers for the 64 pixels of a digit."""
    return 2 if side == 8 else 16


def adam(lr: float, betas: tuple[float, float], **changes: Any) -> OptimConfig:
    """Adam with these betas; `changes` as in `OptimConfig`."""
    return OptimConfig(lr, betas=betas, **changes)


def smoke_optim(lr: float = 3e-3) -> OptimConfig:
    """The optimiser of smoke runs."""
    return OptimConfig(lr, betas=(0.9, 0.99), schedule="cosine", final=0.05, warmup=20, clip=1.0)


SMOKE_EMA = (Constant(0.99, warmup=True),)


def tokenizer_recipe(
    name: str,
    stages: Sequence[Stage],
    *,
    frozen: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
    smoke: bool = False,
) -> Recipe:
    """A run of tokenizer stages, with the weights of all terms of their losses.

    Args:
      frozen, origins: further frozen arrays, and where they came from, by role.
      smoke: log and checkpoint as a run of a minute does.
    """
    terms = {term.name: term for stage in stages for term in stage.task.looks}
    weights, identities = frozen_terms(terms.values())
    engine = EngineConfig(checkpoint_every=5_000, keep_every=50_000, log_every=100, preview_every=5_000)
    if smoke:
        engine = EngineConfig(checkpoint_every=100, log_every=20)
    config = RunConfig(name, tuple(stages), {**identities, **(origins or {})}, engine=engine)
    return Recipe(config, {**weights, **(frozen or {})})
