"""The measures of an evaluation: one table that says what each is, what it needs and how it is worked out.

A new measure is a function from what one pass over the samples has gathered, and a row of `MEASURES`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gen.config import suggest
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.alignment import CLIPScore
from gen.metrics.classifier import classification_accuracy
from gen.metrics.diversity import vendi
from gen.metrics.frechet import frechet_distance, frechet_infinity, frechet_of_features
from gen.metrics.inception_score import InceptionScore
from gen.metrics.intervals import frechet_error, kernel_error, proportion_error
from gen.metrics.kernels import CMMD_SCALE, CMMD_SIGMA, KID_SIZE, cmmd, cubic, kid, mind, rbf
from gen.metrics.memorisation import memorisation
from gen.metrics.neighbours import manifold
from gen.metrics.pairs import Pairs
from gen.metrics.protocol import Protocol
from gen.metrics.reference import Reference
from gen.metrics.sources import ImageSet
from gen.metrics.statistics import Accuracy, Features, Statistic

__all__ = [
    "MEASURES",
    "Measure",
    "Scores",
    "check_extras",
    "extra_statistics",
    "reconstruction_scores",
    "score",
]

Found = Mapping[str, Any]  # finalised statistics: mean, covariance, features (L, D), label (L,) where there are any ...


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a measure gives.

    Attributes:
      values: by name; a measure may give several (precision, recall ...).
      within: spread of a value inside this one evaluation, by name.
      per_class: values by class, by name; None for a class without samples.
      details: further results by name, shown on the page alone.
    """

    values: Mapping[str, float]
    within: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_class: Mapping[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
      line: what it is, for help.
      compute: ``(found, reference, protocol) -> Scores`` from the finalised statistics of the samples, the real
        images' statistics and the protocol.
      needs: names in `_NEEDS`: what must be there.
      asked: computed only when asked for by name; else whenever what it needs is there.
      statistics: what has to be gathered for it beside moments, features and labels.
    """

    line: str
    compute: Callable[[Found, Reference, Protocol], Scores]
    needs: tuple[str, ...] = ()
    asked: bool = True
    statistics: Callable[[Protocol], Mapping[str, Statistic]] = lambda protocol: {}


# what a measure may need -> (whether it is there, what to say and do when it is not)
_NEEDS: dict[str, tuple[Callable[[Extractor, ImageSet, Reference], bool], str]] = {
    "real features": (
        lambda extractor, source, reference: len(reference.features) > 0,
        "needs the features of real images, which the reference does not hold; make one from images with gen reference",
    ),
    "labels": (
        lambda extractor, source, reference: source.labels != "none" and len(reference.labels) > 0,
        "needs labels of samples and of real images; give both, or leave it out",
    ),
    "classifier": (
        lambda extractor, source, reference: 0 < extractor.classes == source.classes,
        "needs samples labelled with the classes of the extractor's classifier, in its order; for ImageNet give labels "
        "and --extractor inception:torchvision (the 1008 outputs of FID's network are in another order)",
    ),
    "spatial": (
        lambda extractor, source, reference: "spatial" in extractor.outputs and reference.spatial is not None,
        "needs the spatial features of the Inception network on both sides; make the reference again with it",
    ),
    "unit embeddings": (
        lambda extractor, source, reference: (
            extractor.name.startswith("clip-") and extractor.resize.endswith("stretched")
        ),
        "needs the embeddings that it is defined on; give --extractor clip:cmmd",
    ),
    "captions": (
        lambda extractor, source, reference: extractor.name.startswith("clip-") and "captions" in source.beside,
        "needs a CLIP and a caption for every sample; give --extractor clip:vit-b-32 and --captions FILE",
    ),
    "training images": (
        lambda extractor, source, reference: {"training", "heldout"} <= set(source.beside),
        "needs training images and held-out ones; give --training DATA and --heldout DATA",
    ),
    "originals": (
        lambda extractor, source, reference: "originals" in source.beside,
        "needs images that were made from others; see gen reconstruct",
    ),
    "labelled images": (
        lambda extractor, source, reference: (
            source.labels != "none" and "label" in source.beside.get("heldout", ("", {}))[1]
        ),
        "needs labels of samples and labelled held-out images; give --heldout DATA with classes",
    ),
    "unbiased logits": (
        lambda extractor, source, reference: "unbiased_logits" in extractor.outputs,
        "needs the classes of the Inception network; give --extractor inception",
    ),
}


def _frechet(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    distance = frechet_distance(found["mean"], found["covariance"], reference.mean, reference.covariance)
    kept = found["features"]
    if len(kept) < 2:
        return Scores({"frechet_distance": distance})
    error = frechet_error(kept, reference.mean, reference.covariance)
    # of all samples, from those whose features are kept
    return Scores({"frechet_distance": distance}, {"frechet_distance": error * np.sqrt(len(kept) / protocol.count)})


def _spatial(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    assert reference.spatial is not None  # `Measure.needs`
    distance = frechet_distance(found["spatial_mean"], found["spatial_covariance"], *reference.spatial)
    return Scores({"spatial_frechet_distance": distance})


def _inception_score(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    return Scores(
        {"inception_score": float(found["inception_score"])},
        {"inception_score": float(found["inception_score_spread"])},
    )


def _score_statistic(protocol: Protocol) -> InceptionScore:
    """The statistic of `Protocol.score_splits`."""
    kind, _, number = protocol.score_splits.partition("-")
    if kind == "chunk" and number.isdecimal() and int(number):
        return InceptionScore(protocol.count, chunk=int(number))
    if kind.isdecimal() and number in ("", "shuffled") and 1 <= int(kind) <= protocol.count:
        return InceptionScore(protocol.count, splits=int(kind), shuffle=number == "shuffled")
    raise GenError(
        f"Inception Score splits '{protocol.score_splits}' of {protocol.count} samples; expected N, N-shuffled or "
        "chunk-N with N from 1 to the number of samples"
    )


def _manifold(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    near = manifold(
        reference.features[: protocol.neighbour_limit],
        found["features"],
        protocol.neighbours,
        strict=protocol.neighbour_rule == "open",
    )
    values = {name: getattr(near, name) for name in ("precision", "recall", "density", "coverage")}
    real, fake = min(len(reference.features), protocol.neighbour_limit), len(found["features"])
    counts = {"precision": fake, "recall": real, "coverage": real}
    errors = {name: proportion_error(values[name], count) for name, count in counts.items()}
    return Scores(values, errors | {"density": near.density_error})


def _accuracy(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    classes = tuple(None if np.isnan(a) else float(a) for a in found["class_accuracy"])
    values = {name: float(found[name]) for name in ("accuracy", "top5_accuracy") if name in found}
    count = int(found["class_count"].sum())
    errors = {name: proportion_error(value, count) for name, value in values.items()}
    return Scores(values, errors, per_class={"accuracy": classes})


def _kid(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    mean, spread = kid(reference.features, found["features"])
    if len(found["features"]) <= KID_SIZE:  # every subset holds all samples: their deviation says nothing of these
        spread = kernel_error(reference.features, found["features"], cubic)
    return Scores({"kid": mean}, {"kid": spread})


def _mind(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    value, error = mind(reference.features, found["features"])
    return Scores({"mind": value}, {"mind": error})


def _infinity(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    value, error = frechet_infinity(found["features"], reference.mean, reference.covariance)
    return Scores({"frechet_infinity": value}, {"frechet_infinity": error})


def _class_frechet(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    features, labels = found["features"], found["label"].astype(int)
    rows: list[float | None] = []
    for label in range(int(max(reference.labels.max(), labels.max())) + 1):
        real, fake = reference.features[reference.labels == label], features[labels == label]
        if not len(real) and not len(fake):
            rows.append(None)  # a number that is no class
            continue
        if min(len(real), len(fake)) < 2:
            raise GenError(
                f"class {label} has {len(fake)} samples and {len(real)} real images among those whose features are "
                "kept; expected at least 2 of each; evaluate more, or leave class_frechet out"
            )
        rows.append(frechet_of_features(real, fake))
    scored = [value for value in rows if value is not None]
    spread = {"class_frechet": float(np.std(scored))}
    return Scores({"class_frechet": float(np.mean(scored))}, spread, per_class={"class_frechet": tuple(rows)})


def _images(limit: int) -> Features:
    return Features(limit, "levels", "uint8", "images")


def _cmmd(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    real, fake = reference.features[: protocol.neighbour_limit], found["features"]
    error = CMMD_SCALE * kernel_error(real, fake, rbf(CMMD_SIGMA))
    return Scores({"cmmd": cmmd(real, fake)}, {"cmmd": error})


def _vendi(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    value, error = vendi(found["features"])
    return Scores({"vendi": value}, {"vendi": error})


def _clip_score(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    return Scores({"clip_score": float(found["clip_score"])}, {"clip_score": float(found["clip_score_error"])})


def _memorisation(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    training, heldout = found["training"], found["heldout"]
    spaces = {
        space: memorisation(found[key], training[key], heldout[key])
        for space, key in (("pixels", "images"), ("features", "features"))
    }
    return Scores(
        {f"copies_in_{space}": m.share for space, m in spaces.items()},
        {f"copies_in_{space}": m.error for space, m in spaces.items()},
        details={"memorisation": spaces},
    )


def _cas(found: Found, reference: Reference, protocol: Protocol) -> Scores:
    real = found["heldout"]
    samples = found["images"], found["all_labels"].astype(int)
    value, spread, classes = classification_accuracy(*samples, real["images"], real["label"].astype(int))
    return Scores({"cas": value}, {"cas": spread}, {"cas": classes})


def reconstruction_scores(found: Found) -> Scores:
    """Gives means over pairs and their standard errors; ``psnr_pooled`` is the ratio of the mean error instead."""
    values = dict(found["pairs"])
    pooled = 10 * np.log10(255**2 / max(values.pop("mse"), 1e-10))
    within = {name: error for name, error in found["pair_errors"].items() if name in values}
    return Scores({**values, "psnr_pooled": float(pooled)}, within)


MEASURES: dict[str, Measure] = {
    "frechet": Measure(
        "Frechet distance of the features, and its standard error: FID, FD-DINOv2 ...", _frechet, asked=False
    ),
    "spatial": Measure("Frechet distance of spatial Inception features: sFID", _spatial, ("spatial",), asked=False),
    "inception_score": Measure(
        "Inception Score, mean and spread over splits",
        _inception_score,
        ("unbiased logits",),
        asked=False,
        statistics=lambda protocol: {"score": _score_statistic(protocol)},
    ),
    "manifold": Measure("precision, recall, density, coverage", _manifold, ("real features",), asked=False),
    "accuracy": Measure(
        "how often the extractor's classifier reads the label a sample was made for, or has it among its first 5",
        _accuracy,
        ("classifier",),
        asked=False,
        statistics=lambda protocol: {"accuracy": Accuracy()},
    ),
    "kid": Measure("kernel distance, mean over 100 random subsets of at most 1000", _kid, ("real features",)),
    "mind": Measure(
        "sliced distance over 1000 random directions, and its standard error over these", _mind, ("real features",)
    ),
    "frechet_infinity": Measure("Frechet distance extrapolated to infinitely many samples", _infinity),
    "class_frechet": Measure(
        "mean and spread over classes of the Frechet distance within a class",
        _class_frechet,
        ("real features", "labels"),
    ),
    "cmmd": Measure(
        "kernel distance of CLIP embeddings, times 1000, and its standard error over samples",
        _cmmd,
        ("real features", "unit embeddings"),
    ),
    "vendi": Measure("Vendi score: how many different samples there are, by their cosines, and its error", _vendi),
    "clip_score": Measure(
        "100 times the cosine of image and caption, with --captions FILE, and its standard error",
        _clip_score,
        ("captions",),
        asked=False,
        statistics=lambda protocol: {"alignment": CLIPScore()},
    ),
    "memorisation": Measure(
        "share of samples closer to a training image than half the median of held-out ones, with --training and "
        "--heldout, in pixels and in features",
        _memorisation,
        ("training images",),
        asked=False,
        statistics=lambda protocol: {"images": _images(min(protocol.neighbour_limit, protocol.count))},
    ),
    "reconstruction": Measure(
        "PSNR, SSIM, MS-SSIM and LPIPS against the images that were reconstructed",
        lambda found, reference, protocol: reconstruction_scores(found),
        ("originals",),
        asked=False,
        statistics=lambda protocol: {"pairs": Pairs()},
    ),
    "cas": Measure(
        "accuracy on --heldout images of a classifier trained on the samples, mean and spread over 3 trainings",
        _cas,
        ("labelled images",),
        statistics=lambda protocol: {
            "images": _images(protocol.count),
            "all_labels": Features(protocol.count, "label", name="all_labels"),
        },
    ),
}


def _chosen(extractor: Extractor, source: ImageSet, reference: Reference, extra: Sequence[str]) -> dict[str, Measure]:
    """Those that are asked for, and those that need not be asked for where they can be had."""

    def there(measure: Measure) -> bool:
        return all(_NEEDS[need][0](extractor, source, reference) for need in measure.needs)

    return {name: m for name, m in MEASURES.items() if (name in extra if m.asked else there(m))}


def check_extras(extractor: Extractor, source: ImageSet, reference: Reference, extra: Sequence[str]) -> None:
    """Raises GenError for a name that is not in `MEASURES`, or a measure whose needs are not met."""
    for name in extra:
        if name not in MEASURES:
            raise GenError(f"unknown measure '{name}'; {suggest(name, MEASURES)}")
        for need in MEASURES[name].needs:
            there, advice = _NEEDS[need]
            if not there(extractor, source, reference):
                raise GenError(f"{name} {advice}")


def extra_statistics(
    extractor: Extractor, source: ImageSet, reference: Reference, protocol: Protocol, extra: Sequence[str]
) -> dict[str, Statistic]:
    """Gives what the measures of an evaluation need gathered, beside what every evaluation gathers."""
    chosen = _chosen(extractor, source, reference, extra).values()
    return {name: statistic for measure in chosen for name, statistic in measure.statistics(protocol).items()}


def score(
    found: Found,
    extractor: Extractor,
    source: ImageSet,
    reference: Reference,
    protocol: Protocol,
    extra: Sequence[str] = (),
) -> Scores:
    """Gives all measures that can be had without asking and those of `extra`, from finalised statistics."""
    values: dict[str, float] = {}
    within: dict[str, float] = {}
    per_class: dict[str, tuple[float | None, ...]] = {}
    details: dict[str, Any] = {}
    for measure in _chosen(extractor, source, reference, extra).values():
        scores = measure.compute(found, reference, protocol)
        values |= scores.values
        within |= scores.within
        per_class |= scores.per_class
        details |= scores.details
    return Scores(values, within, per_class, details)
