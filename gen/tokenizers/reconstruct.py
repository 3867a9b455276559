"""How well a tokenizer gives images back: pair by pair, and as a set (rFID)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gen.config import suggest
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.features.lpips import TRUNKS
from gen.features.weights import cache_path, identity_of, load_weights
from gen.metrics.evaluate import Evaluation, Settings
from gen.metrics.measures import reconstruction_scores
from gen.metrics.onepass import Progress, collect
from gen.metrics.pairs import Pairs, pair_scores
from gen.metrics.protocol import Protocol, Result
from gen.metrics.reference import make_reference
from gen.metrics.sources import QUANTISERS, ImageSet
from gen.metrics.statistics import Features, Statistic, finalised
from gen.nn.network import Params
from gen.sampling.noise import decode_keys
from gen.tokenizers.base import Tokenizer
from gen.training.indexed import sample_keys

__all__ = ["Pixels", "Reconstructed", "evaluate_reconstruction", "reconstructions"]


@dataclasses.dataclass(frozen=True)
class Pixels:
    """An `Extractor` of nothing, for measures that look at the images alone.

    Attributes:
      image: (H, W, C) of the images.
    """

    modes: ClassVar[tuple[str, ...]] = ()

    image: tuple[int, int, int]
    name: str = "none"
    resize: str = "none"
    precision: str = "float32-highest"
    outputs: tuple[str, ...] = ("features",)
    classes: int = 0

    def load(self) -> Params:
        """Nothing."""
        return {}

    def fingerprint(self) -> str:
        """Nothing has no identity."""
        return ""

    def __call__(self, params: Params, images: jax.Array) -> dict[str, jax.Array]:
        """images (B, H, W, C) -> "features" (B, 0)."""
        return {"features": jnp.zeros((len(images), 0))}


@dataclasses.dataclass(frozen=True)
class _Function:
    """What makes a batch: rows of the images and parameters -> reconstructions with the scores of each pair."""

    tokenizer: Any
    quantiser: str
    options: Any = None

    def __call__(self, given: Mapping[str, Any], indices: jax.Array) -> dict[str, jax.Array]:
        params, images = given["arguments"], given["image"]
        x = images.astype(jnp.float32) / 127.5 - 1
        keys, cond = sample_keys(0, indices), given.get("cond", {})
        codes = self.tokenizer.encode(params["tokenizer"], x, cond=cond, keys=keys).mode()
        decoded = self.tokenizer.decode(
            params["tokenizer"], codes, cond=cond, keys=decode_keys(keys), options=self.options
        )
        levels = QUANTISERS[self.quantiser](decoded)
        labels = {"label": given["label"]} if "label" in given else {}
        return {"levels": levels} | labels | pair_scores(levels, images, params["lpips"])


def reconstructions(
    tokenizer: Tokenizer,
    params: Params,
    images: ImageSet,
    *,
    identity: str,
    quantiser: str = "round",
    lpips: Sequence[str] = (),
    options: Any = None,
) -> ImageSet:
    """The images of a source after encoding (the posterior's mode) and decoding, with the scores of every pair.

    Args:
      tokenizer, params: the tokenizer and its parameters.
      images: stored images of the tokenizer's size, uint8.
      identity: of tokenizer and weights.
      quantiser: how the decoder's output becomes 8-bit, a name in `gen.metrics.sources.QUANTISERS`.
      options: settings of a decoder that samples; None for its own.
      lpips: trunks whose LPIPS is worked out, from the weights that ``gen convert lpips`` keeps.

    Raises:
      GenError: an unknown quantiser or trunk, or a trunk without weights.
    """
    if quantiser not in QUANTISERS:
        raise GenError(f"unknown quantiser '{quantiser}'; {suggest(quantiser, QUANTISERS)}")
    networks, beside = {}, {"originals": (images.identity, None)}
    for net in lpips:
        if net not in TRUNKS:
            raise GenError(f"LPIPS has no trunk '{net}'; {suggest(net, TRUNKS)}")
        path, hint = cache_path(f"lpips-{net}"), f"save lpips.LPIPS(net='{net}').state_dict() and run gen convert lpips"
        networks[net], beside[f"lpips_{net}"] = load_weights(path, hint), (identity_of(path, hint), None)
    return dataclasses.replace(
        images,
        function=_Function(tokenizer, quantiser, options),
        arguments={"tokenizer": params, "lpips": networks},
        identity=f"{identity} of {images.identity}",
        quantiser=quantiser,
        beside=beside,
    )


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """Scores, and the reconstructions (N, H, W, C) uint8 with their labels (N,) where these were asked for."""

    result: Result
    images: np.ndarray | None = None
    labels: np.ndarray | None = None


def evaluate_reconstruction(
    made: ImageSet,
    images: ImageSet,
    extractor: Extractor | None,
    *,
    name: str,
    split: str = "",
    settings: Settings = Settings(),
    size: tuple[int, int, int],
    keep: bool = False,
    batch: int = 256,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    subject: Mapping[str, str] | None = None,
) -> Reconstructed:
    """Scores reconstructions against the images they were made from.

    Args:
      made: what `reconstructions` gave for `images`.
      images: the originals; with an extractor they are the reference of its distances, so that its Frechet distance
        is the rFID.
      extractor: the feature network; None for the scores of pairs alone.
      name, split: of the originals.
      settings: of the distances.
      size: (H, W, C) of the images.
      keep: whether the reconstructions are handed back.
      batch, mesh, progress: see `gen.metrics.onepass.collect`.
      subject: what is scored.
    """
    kept: dict[str, Statistic] = {"kept": Features(made.count, "levels", "uint8", "kept")} if keep else {}
    if keep and made.labels != "none":
        kept["kept_labels"] = Features(made.count, "label", "int32", "kept_labels")
    network = Pixels(size) if extractor is None else extractor
    job = None
    statistics: dict[str, Statistic] = {"pairs": Pairs()}
    if extractor is not None:
        reference = make_reference(name, images, extractor, split=split, batch=batch, mesh=mesh, progress=progress)
        job = Evaluation(made, reference, extractor, settings)
        statistics = job.statistics
    tally = collect(made, network, statistics | kept, batch=batch, mesh=mesh, progress=progress)
    found = finalised(statistics | kept, tally.accumulators)
    if job is not None:
        result = job.result(job.scores(found), subject=subject)
    else:
        protocol = Protocol("none", "", made.count, quantiser=made.quantiser, labels=made.labels, reference=name)
        protocol = dataclasses.replace(protocol, split=split, beside=made.named())
        scores = reconstruction_scores(found)
        result = Result(scores.values, protocol, dict(subject or {}), within=scores.within)
    return Reconstructed(result, found.get("kept"), found.get("kept_labels"))
