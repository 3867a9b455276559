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
from gen.metrics.statistics import Accumulator, Features, Shapes, Statistic, finalised
from gen.nn.conditions import empty_conditions, make_conditions
from gen.nn.network import Params
from gen.sampling.noise import decode_keys
from gen.tokenizers.base import Tokenizer
from gen.tokenizers.quantizers.base import frequencies, used
from gen.training.indexed import sample_keys

__all__ = ["SHOWN", "NoFeatures", "Reconstructed", "Usage", "evaluate_reconstruction", "reconstructions"]


_COND = "cond/"  # begins the names of rows that are conditions
SHOWN = 16  # images of the picture before and after


@dataclasses.dataclass(frozen=True)
class NoFeatures:
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
        """Gives no arrays, for pixels are what they are."""
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
        keys = sample_keys(0, indices)
        cond = {n.removeprefix(_COND): values for n, values in given.items() if n.startswith(_COND)}
        found = self.tokenizer.encode(params["tokenizer"], x, cond=cond, keys=keys)
        decoded = self.tokenizer.decode(
            params["tokenizer"], found.mode(), cond=cond, keys=decode_keys(keys), options=self.options
        )
        levels = QUANTISERS[self.quantiser](decoded)
        rows = {"label": given["label"]} if "label" in given else {}
        if self.tokenizer.spec.kind != "continuous":
            rows["ids"] = found.stored
        return {"levels": levels, "original": images} | rows | pair_scores(levels, images, params["lpips"])


@dataclasses.dataclass(frozen=True)
class Usage:
    """How much of a codebook the ids of all images use, as `gen.tokenizers.quantizers.base.usage` says it of a batch.

    Attributes:
      vocabulary: number of token ids; None for bits.
    """

    vocabulary: int | None

    def init(self, shapes: Shapes, span: int) -> Accumulator:
        """Does what `gen.metrics.statistics.Statistic` says."""
        size = shapes["ids"].shape[-1] if self.vocabulary is None else self.vocabulary
        return {"count": jnp.zeros(()), "frequency": jnp.zeros(size)}

    def update(
        self, accumulator: Accumulator, batch: Mapping[str, jax.Array], weight: jax.Array, index: jax.Array
    ) -> Accumulator:
        """Does what `gen.metrics.statistics.Statistic` says."""
        found = frequencies(batch["ids"], self.vocabulary, weight)
        return {
            "count": accumulator["count"] + weight.sum(),
            "frequency": accumulator["frequency"] + found,
        }

    def merge(self, a: Accumulator, b: Accumulator) -> Accumulator:
        """Does what `gen.metrics.statistics.Statistic` says."""
        return {name: np.asarray(array, np.float64) + b[name] for name, array in a.items()}

    def finalise(self, accumulator: Accumulator) -> dict[str, Any]:
        """``codebook``: usage, entropy in bits and perplexity by name."""
        frequency = np.asarray(accumulator["frequency"], np.float64) / max(float(accumulator["count"]), 1.0)
        return {"codebook": {f"codebook_{k}": float(v) for k, v in used(frequency, self.vocabulary).items()}}


def reconstructions(
    tokenizer: Tokenizer,
    params: Params,
    images: ImageSet,
    *,
    identity: str,
    quantiser: str = "round",
    lpips: Sequence[str] = (),
    cond: Mapping[str, np.ndarray] | None = None,
    options: Any = None,
) -> ImageSet:
    """Gives the images of a source after encoding (the posterior's mode) and decoding, with the scores of every pair.

    Args:
      tokenizer, params: the tokenizer and its parameters.
      images: stored images of the tokenizer's size, uint8.
      identity: of tokenizer and weights.
      quantiser: how the decoder's output becomes 8-bit, a name in `gen.metrics.sources.QUANTISERS`.
      cond: the tokenizer's conditions by name, one value for all images or one each.
      options: settings of a decoder that samples; None for its own.
      lpips: trunks whose LPIPS is worked out, from the weights that ``gen convert lpips`` keeps.

    Raises:
      GenError: other images than the tokenizer takes, an unknown quantiser or trunk, a trunk without weights, a
        condition that is missing or does not fit.
    """
    read, conditions = images.read, tokenizer.spec.conditions
    assert read is not None, "reconstructions are of stored images"
    given = {name: values for name, values in (cond or {}).items() if name in empty_conditions(conditions, 1)}

    def rows(indices: np.ndarray) -> Mapping[str, Any]:
        each = {name: v[indices] if v.shape[:1] == (images.count,) else v for name, v in given.items()}
        return {**read(indices), **{_COND + n: v for n, v in make_conditions(conditions, indices, each).items()}}

    first, expected = rows(np.arange(1))["image"], tuple(tokenizer.spec.image)  # says what is missing
    if first.dtype != np.uint8 or first.shape[1:] != expected:
        raise GenError(
            f"images are {first.dtype} {first.shape[1:]}; this tokenizer takes uint8 {expected}; convert them "
            "(gen data convert)"
        )
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
        read=rows,
        identity=f"{identity} of {images.identity}",
        quantiser=quantiser,
        beside=beside,
    )


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """Scores and pictures.

    Attributes:
      result: the scores.
      before, after: the first originals and their reconstructions, (n, H, W, C) uint8 with n at most `SHOWN`.
      images, labels: all reconstructions (N, H, W, C) uint8 and their labels (N,), where these were asked for.
    """

    result: Result
    before: np.ndarray
    after: np.ndarray
    images: np.ndarray | None = None
    labels: np.ndarray | None = None


def evaluate_reconstruction(
    made: ImageSet,
    images: ImageSet,
    extractor: Extractor | None,
    *,
    tokenizer: Tokenizer,
    name: str,
    split: str = "",
    settings: Settings = Settings(),
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
      tokenizer: that made them; of one with a codebook, how much of it the images use is scored too.
      name, split: of the originals.
      settings: of the distances.
      keep: whether the reconstructions are handed back.
      batch, mesh, progress: see `gen.metrics.onepass.collect`.
      subject: what is scored.
    """
    kept: dict[str, Statistic] = {"kept": Features(made.count, "levels", "uint8", "kept")} if keep else {}
    if keep and made.labels != "none":
        kept["kept_labels"] = Features(made.count, "label", "int32", "kept_labels")
    spec = tokenizer.spec
    network = NoFeatures(spec.picture) if extractor is None else extractor
    job = None
    statistics: dict[str, Statistic] = {"pairs": Pairs()}
    kept |= {n: Features(SHOWN, key, "uint8", n) for n, key in (("before", "original"), ("after", "levels"))}
    if spec.kind != "continuous":
        kept["codebook"] = Usage(spec.vocabulary)
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
    result = dataclasses.replace(result, values={**result.values, **found.get("codebook", {})})
    return Reconstructed(result, found["before"], found["after"], found.get("kept"), found.get("kept_labels"))
