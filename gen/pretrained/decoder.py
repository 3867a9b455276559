"""Joining a converted model of latents or tokens with its autoencoder, so that it makes images by itself."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gen.autoregressive.generator import TokenGenerator
from gen.data.caches import Cache
from gen.distill.noise_decoder import NoiseDecoder
from gen.errors import GenError
from gen.pretrained import diffusers
from gen.pretrained.exports import Described, described
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.runs import load
from gen.sampling.generator import DiffusionGenerator
from gen.tokenizers.var_vqvae import VARVQVAEConfig

__all__ = ["Decoder", "join", "join_tokens", "read_decoder", "read_normalizer"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A tokenizer with its parameters.

    Attributes:
      config: the Tokenizer.
      params: its parameters.
      origin: where it came from, as text.
      normalizer: "shift" and "scale" (C,) of its latents where the place it came from tells them, or None.
    """

    config: Any
    params: Any
    origin: str
    normalizer: dict[str, np.ndarray] | None = None


def read_decoder(path: Path) -> Decoder:
    """Gives the autoencoder at `path`: a run folder, a folder of diffusers, or a published file.

    Raises GenError when there is none, or something else.
    """
    if (path / "config.json").is_file() and not diffusers.is_folder(path):
        loaded = load(path)
        return Decoder(loaded.tokenizer, loaded.params["tokenizer"], f"{loaded.config.name}", _stored(loaded.params))
    options: dict[str, Any] = {}
    normalizer = None
    if path.is_dir():
        held = diffusers.component(path)
        weights, options, normalizer = held.weights, held.options, held.normalizer
    else:
        weights = read_weights(path)
    try:
        found = locate(None, weights, "tokenizer")
    except GenError as error:
        raise GenError(f"{path} holds no autoencoder for --vae: {error}") from None
    importer, weights = found.importer, found.weights
    said = Described() if path.is_dir() else described(path)
    normalizer = normalizer or said.normalizer
    network = said.network if said.system == importer.name else importer.infer(weights, **options)
    config, params, _ = importer.load(weights, network)
    return Decoder(config, params, f"{importer.name} weights {path.name}", normalizer)


def _stored(params: Any) -> dict[str, np.ndarray] | None:
    return dict(params["normalizer"]) if "normalizer" in params else None


def read_normalizer(text: str, channels: int) -> dict[str, np.ndarray]:
    """Gives the normaliser that `text` names: "shift" and "scale" (C,) float32, raw latents are normalised * scale +
    shift.

    Args:
      text: the factor by which latents were multiplied for training (0.18215), a file with ``mean`` and ``std``
        (LightningDiT's latents_stats.pt), or a latent cache.
      channels: C.
    Raises GenError for anything else, and for another number of channels.
    """
    path = Path(text)
    if path.is_dir():
        found = Cache(text).normalizer()
    elif path.is_file():
        stored = read_weights(path)
        if not {"mean", "std"} <= set(stored):
            raise GenError(f"{path} has {', '.join(sorted(stored)[:4])}; expected mean and std of the latents")
        found = {"shift": stored["mean"].reshape(-1), "scale": stored["std"].reshape(-1)}
    else:
        found = {"shift": np.zeros(channels), "scale": np.full(channels, 1.0 / _factor(text))}
    if any(value.shape != (channels,) for value in found.values()):
        raise GenError(f"{text} is the normaliser of {len(found['scale'])} channels; the model has {channels}")
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0.0 < factor < float("inf"):
        raise GenError(f"no normaliser '{text}'; give a factor such as 0.18215, a file with mean and std, or a cache")
    return factor


def join(
    generator: DiffusionGenerator, decoder: Decoder, normalizer: dict[str, np.ndarray]
) -> tuple[DiffusionGenerator, dict[str, Any]]:
    """Gives the generator of images, and the arrays by role ("tokenizer", "normalizer") that it needs beside its
    network.

    Raises GenError when the autoencoder's latents are not what the generator makes.
    """
    tokenizer, shape = decoder.config, generator.latent
    spec = tokenizer.spec
    if len(spec.shape) == len(shape) == 3 and spec.shape[-1] == shape[-1]:
        tokenizer = _sized(tokenizer, shape)
    if tuple(tokenizer.spec.shape) != shape:
        raise GenError(
            f"the model makes latents {shape}, the autoencoder decodes {tuple(spec.shape)}; give its own autoencoder"
        )
    arrays = {"tokenizer": decoder.params, "normalizer": normalizer}
    return dataclasses.replace(generator, tokenizer=tokenizer), arrays


def join_tokens(generator: Any, decoder: Decoder) -> TokenGenerator | NoiseDecoder:
    """Gives the generator of images of a token model, or of its student, and the tokenizer of its tokens.

    Raises GenError for a model of latents, and for a tokenizer of other tokens.
    """
    tokenizer = decoder.config
    if not isinstance(generator, TokenGenerator | NoiseDecoder):
        raise GenError(
            f"{decoder.origin} decodes {tokenizer.spec.kind}, and the model makes latents; give their decoder"
        )
    if len(tokenizer.spec.shape) == len(generator.model.shape) == 2 and not tokenizer.spec.scales:
        tokenizer = _sized(tokenizer, generator.model.shape)
    elif isinstance(tokenizer, VARVQVAEConfig) and generator.model.scales:
        tokenizer = tokenizer.scaled(generator.model.scales)
    return dataclasses.replace(generator, tokenizer=tokenizer)


def _sized(tokenizer: Any, shape: tuple[int, ...]) -> Any:
    """A convolutional tokenizer, which takes images of any size, for those of a grid of this shape."""
    spec = tokenizer.spec
    side = [n * spec.image[0] // spec.shape[0] for n in shape[:2]]
    return dataclasses.replace(tokenizer, image=(*side, spec.image[2]))
