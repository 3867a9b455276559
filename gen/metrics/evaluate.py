"""Scores of images against a reference set, always with the protocol they were taken under."""

import dataclasses
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gen.config import from_json, suggest, to_json
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.frechet import frechet_distance, frechet_infinity, frechet_of_features
from gen.metrics.inception_score import InceptionScore
from gen.metrics.kernels import kid, mind
from gen.metrics.neighbours import manifold
from gen.metrics.onepass import Progress, collect
from gen.metrics.protocol import Protocol, Result
from gen.metrics.sources import Source
from gen.metrics.statistics import Accuracy, Features, Moments, Statistic
from gen.training.files import atomic

__all__ = ["EXTRAS", "Reference", "evaluate", "make_reference", "score"]

# measures that are computed when asked for: name -> what it is; all need whole features
EXTRAS = {
    "kid": "kernel distance, mean over 100 random subsets of at most 1000",
    "mind": "sliced distance over 1000 random directions",
    "frechet_infinity": "Frechet distance extrapolated to infinitely many samples",
    "class_frechet": "mean over classes of the Frechet distance within a class; needs labels on both sides",
}
_SHARED = ("extractor", "extractor_fingerprint", "resize", "precision")  # a reference and its samples must agree on


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images, computed once and stored with their protocol.

    Attributes:
      name: of the data, for tables.
      mean, covariance: of the features, (D,) and (D, D) float64.
      features: (R, D) float32, the first R images' features, for the measures that need them; R may be 0.
      protocol: how they were computed; ``count`` is the number of real images, 0 when unknown.
      identity: of the real images.
      labels: (R,) int32 classes of `features`; empty without.
      spatial: mean and covariance of the spatial features, for sFID; None without.
    """

    name: str
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    protocol: Protocol
    identity: str
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    spatial: tuple[np.ndarray, np.ndarray] | None = None

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of the real images' identity and the protocol.

        Not of the statistics, whose last bits depend on the machine.
        """
        text = json.dumps([self.name, self.identity, to_json(self.protocol)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes an .npz (mu, sigma, n, feats, name, identity, protocol as JSON text ...), whole or not at all."""
        arrays: dict[str, Any] = {
            "mu": self.mean,
            "sigma": self.covariance,
            "n": self.protocol.count,
            "feats": self.features,
            "name": np.array(self.name),
            "identity": np.array(self.identity),
            "protocol": np.array(json.dumps(to_json(self.protocol))),
        }
        if len(self.labels):
            arrays["labels"] = self.labels
        if self.spatial is not None:
            arrays["mu_s"], arrays["sigma_s"] = self.spatial
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        atomic(path, lambda file: file.write(buffer.getbuffer()))

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Reads what `save` wrote. Raises GenError for another file, or one without a protocol."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise GenError(f"{path} cannot be read as a reference ({error}); expected an .npz; make it again") from None
        missing = [name for name in ("mu", "sigma", "feats", "name", "identity", "protocol") if name not in arrays]
        if missing:
            raise GenError(
                f"the reference {path} lacks {', '.join(missing)}; expected statistics with the protocol they were "
                "computed under; make it again, or convert a published file with gen reference"
            )
        return cls(
            name=str(arrays["name"]),
            mean=arrays["mu"],
            covariance=arrays["sigma"],
            features=arrays["feats"],
            protocol=from_json(json.loads(str(arrays["protocol"])), Protocol, f"{path}: protocol"),
            identity=str(arrays["identity"]),
            labels=arrays.get("labels", np.zeros(0, np.int32)),
            spatial=(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None,
        )


def make_reference(
    name: str,
    source: Source,
    extractor: Extractor,
    *,
    split: str = "",
    batch: int = 256,
    neighbour_limit: int = 10_000,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Statistics of all images of a source, through the very pass that samples go through.

    Args:
      name: of the data, for tables.
      source: the real images.
      extractor: the feature network.
      split: which part of the data they are.
      batch, mesh, progress: see `gen.metrics.onepass.collect`.
      neighbour_limit: how many images' features are kept: the first, so shuffle a larger source sorted by class.

    Raises:
      GenError: see `gen.metrics.onepass.collect`.
    """
    statistics = _statistics(extractor, source, min(neighbour_limit, source.count))
    tally = collect(source, extractor, statistics, batch=batch, mesh=mesh, progress=progress)
    found = _finalise(statistics, tally.accumulators)
    protocol = Protocol(
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint(),
        count=source.count,
        resize=extractor.resize,
        quantiser=source.quantiser,
        precision=extractor.precision,
        labels=source.labels,
        split=split,
        neighbour_limit=neighbour_limit,
    )
    return Reference(
        name=name,
        mean=found["mean"],
        covariance=found["covariance"],
        features=found["features"],
        protocol=protocol,
        identity=source.identity,
        labels=np.asarray(found.get("label", ()), np.int32),
        spatial=(found["spatial_mean"], found["spatial_covariance"]) if "spatial_mean" in found else None,
    )


def evaluate(
    source: Source,
    reference: Reference,
    extractor: Extractor,
    *,
    count: int | None = None,
    neighbours: int = 3,
    neighbour_rule: str = "closed",
    neighbour_limit: int = 10_000,
    score_splits: str = "10-shuffled",
    extra: Sequence[str] = (),
    force: bool = False,
    batch: int = 256,
    mesh: Mesh | None = None,
    partial: str | Path | None = None,
    progress: Progress | None = None,
    subject: Mapping[str, str] | None = None,
) -> Result:
    """Scores the first `count` samples of a source in one pass.

    Values: ``frechet_distance``; ``precision``, ``recall``, ``density``, ``coverage`` where the reference has features;
    ``accuracy`` of the extractor's classifier where samples have labels; ``spatial_frechet_distance`` (sFID) and
    ``inception_score`` with the Inception network; and those asked for by `extra`.

    Args:
      source: the samples.
      reference: the real images they are compared with.
      extractor: the feature network, that of the reference.
      count: how many; all by default.
      neighbours, neighbour_rule, neighbour_limit, score_splits: see `Protocol`.
      extra: names in `EXTRAS`.
      force: compare with a reference made under other conditions; the result says so.
      batch, mesh, progress: see `gen.metrics.onepass.collect`; they do not change the scores.
      partial: where to keep partial results, so that a killed evaluation goes on where it was.
      subject: what is scored, as text by name; goes into the result.

    Raises:
      GenError: fewer samples than asked for, a reference made under other conditions, NaN images or features,
        a partial file of another job.
    """
    count = source.count if count is None else count
    protocol = Protocol(
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint(),
        count=count,
        resize=extractor.resize,
        quantiser=source.quantiser,
        precision=extractor.precision,
        labels=source.labels,
        reference=f"{reference.name} (forced)" if force else reference.name,
        reference_fingerprint=reference.fingerprint(),
        split=reference.protocol.split,
        neighbours=neighbours,
        neighbour_rule=neighbour_rule,
        neighbour_limit=neighbour_limit,
        score_splits=score_splits,
        seeds=source.seeds,
    )
    _check(protocol, reference, source, extra, force)
    began = time.monotonic()
    statistics = _statistics(extractor, source, min(neighbour_limit, count))
    if "unbiased_logits" in extractor.outputs:
        statistics["score"] = _score_statistic(score_splits, count)
    if "logits" in extractor.outputs and source.labels != "none":
        statistics["accuracy"] = Accuracy()
    tally = collect(
        source, extractor, statistics, indices=range(count), batch=batch, mesh=mesh, path=partial, progress=progress
    )
    found = _finalise(statistics, tally.accumulators)
    values, per_class = score(found, reference, protocol)
    more, within, classes = _extras(found, reference, extra)
    if "inception_score_spread" in found:
        within["inception_score"] = float(found["inception_score_spread"])
    return Result(
        values=values | more,
        protocol=protocol,
        subject={"identity": source.identity} | dict(subject or {}),
        within=within,
        per_class=per_class | classes,
        seconds=time.monotonic() - began,
    )


def score(
    found: Mapping[str, Any], reference: Reference, protocol: Protocol
) -> tuple[dict[str, float], dict[str, tuple[float | None, ...]]]:
    """Values and per-class values from finalised statistics (``mean``, ``covariance``, ``features`` ...)."""
    values = {
        "frechet_distance": frechet_distance(found["mean"], found["covariance"], reference.mean, reference.covariance)
    }
    if "spatial_mean" in found and reference.spatial is not None:
        spatial = found["spatial_mean"], found["spatial_covariance"]
        values["spatial_frechet_distance"] = frechet_distance(*spatial, *reference.spatial)
    if "inception_score" in found:
        values["inception_score"] = float(found["inception_score"])
    if len(reference.features):
        near = manifold(
            reference.features[: protocol.neighbour_limit],
            found["features"],
            protocol.neighbours,
            strict=protocol.neighbour_rule == "open",
        )
        values |= {name: getattr(near, name) for name in ("precision", "recall", "density", "coverage")}
    if "accuracy" not in found:
        return values, {}
    classes = tuple(None if np.isnan(a) else float(a) for a in found["class_accuracy"])
    return values | {"accuracy": float(found["accuracy"])}, {"accuracy": classes}


_Extras = tuple[dict[str, float], dict[str, float], dict[str, tuple[float | None, ...]]]


def _extras(found: Mapping[str, Any], reference: Reference, extra: Sequence[str]) -> _Extras:
    """(values, spreads within them, values by class) of the measures asked for."""
    values: dict[str, float] = {}
    within: dict[str, float] = {}
    classes: dict[str, tuple[float | None, ...]] = {}
    features = found["features"]
    if "kid" in extra:
        values["kid"], within["kid"] = kid(reference.features, features)
    if "mind" in extra:
        values["mind"] = mind(reference.features, features)
    if "frechet_infinity" in extra:
        line = frechet_infinity(features, reference.mean, reference.covariance)
        values["frechet_infinity"], within["frechet_infinity"] = line
    if "class_frechet" in extra:
        classes["class_frechet"] = _by_class(reference, features, found["label"].astype(int))
        scored = [value for value in classes["class_frechet"] if value is not None]
        if not scored:
            raise GenError("no class has two samples on both sides; expected some; evaluate more samples")
        values["class_frechet"] = float(np.mean(scored))
    return values, within, classes


def _by_class(reference: Reference, features: np.ndarray, labels: np.ndarray) -> tuple[float | None, ...]:
    rows = []
    for label in range(int(max(reference.labels.max(), labels.max())) + 1):
        real, fake = reference.features[reference.labels == label], features[labels == label]
        rows.append(frechet_of_features(real, fake) if min(len(real), len(fake)) > 1 else None)
    return tuple(rows)


def _score_statistic(splits: str, count: int) -> InceptionScore:
    """The statistic of `Protocol.score_splits`."""
    kind, _, number = splits.partition("-")
    if kind == "chunk" and number.isdecimal() and int(number):
        return InceptionScore(count, chunk=int(number))
    if kind.isdecimal() and number in ("", "shuffled") and 1 <= int(kind) <= count:
        return InceptionScore(count, splits=int(kind), shuffle=number == "shuffled")
    raise GenError(
        f"Inception Score splits '{splits}' of {count} samples; expected N, N-shuffled or chunk-N with N from 1 to the "
        "number of samples"
    )


def _statistics(extractor: Extractor, source: Source, limit: int) -> dict[str, Statistic]:
    """What references and samples both need."""
    statistics: dict[str, Statistic] = {"moments": Moments(), "features": Features(limit)}
    if "spatial" in extractor.outputs:
        statistics["spatial"] = Moments("spatial")
    if source.labels != "none":
        statistics["labels"] = Features(limit, "label")
    return statistics


def _finalise(statistics: Mapping[str, Statistic], accumulators: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, statistic in statistics.items():
        prefix = f"{name}_" if name == "spatial" else ""
        found |= {f"{prefix}{key}": value for key, value in statistic.finalise(accumulators[name]).items()}
    return found


def _check(protocol: Protocol, reference: Reference, source: Source, extra: Sequence[str], force: bool) -> None:
    for name in () if force else _SHARED:
        ours, theirs = getattr(protocol, name), getattr(reference.protocol, name)
        if ours != theirs:
            raise GenError(
                f"the reference '{reference.name}' was made with {name} {theirs!r}, these samples with {ours!r}; "
                "expected the same; make the reference again, use its extractor, or force the comparison"
            )
    if protocol.count > source.count:
        raise GenError(
            f"{protocol.count} samples asked of a source with {source.count}; no score is given for a partial set; "
            "make more samples or ask for fewer"
        )
    if protocol.neighbour_rule not in ("open", "closed"):
        raise GenError(f"unknown neighbour rule '{protocol.neighbour_rule}'; expected open or closed")
    for name in extra:
        _check_extra(name, reference, source)
    if not len(reference.features):
        return
    available = min(protocol.neighbour_limit, protocol.count, len(reference.features))
    if not 1 <= protocol.neighbours < available:
        raise GenError(
            f"{protocol.neighbours} neighbours asked of {available} images; expected at least 1 and fewer than "
            "those; lower neighbours or use more samples"
        )


def _check_extra(name: str, reference: Reference, source: Source) -> None:
    if name not in EXTRAS:
        raise GenError(f"unknown measure '{name}'; {suggest(name, EXTRAS)}")
    if name in ("kid", "mind", "class_frechet") and not len(reference.features):
        raise GenError(
            f"{name} needs the features of real images, which the reference '{reference.name}' does not hold; make one "
            "from images with gen reference"
        )
    if name == "class_frechet" and (source.labels == "none" or not len(reference.labels)):
        raise GenError("class_frechet needs labels of samples and of real images; give both, or leave it out")
