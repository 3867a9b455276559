"""Scores of images against a reference set, always with the protocol they were taken under."""

import dataclasses
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gen.config import from_json, to_json
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.frechet import frechet_distance
from gen.metrics.neighbours import manifold
from gen.metrics.onepass import Progress, collect
from gen.metrics.protocol import Protocol, Result
from gen.metrics.sources import Source
from gen.metrics.statistics import Accuracy, Features, Moments, Statistic
from gen.training.files import atomic

__all__ = ["Reference", "evaluate", "make_reference", "score"]

_SHARED = ("extractor", "extractor_fingerprint", "resize", "precision")  # a reference and its samples must agree on


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images, computed once and stored with their protocol.

    Attributes:
      name: of the data, for tables.
      mean, covariance: of the features, (D,) and (D, D) float64.
      features: (R, D) float32, the first R images' features, for the measures that need neighbours.
      protocol: how they were computed; ``count`` is the number of real images.
      identity: of the real images.
    """

    name: str
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    protocol: Protocol
    identity: str

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of the real images' identity and the protocol.

        Not of the statistics, whose last bits depend on the machine.
        """
        text = json.dumps([self.name, self.identity, to_json(self.protocol)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes an .npz (mu, sigma, n, feats, name, identity, protocol as JSON text), whole or not at all."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            mu=self.mean,
            sigma=self.covariance,
            n=self.protocol.count,
            feats=self.features,
            name=np.array(self.name),
            identity=np.array(self.identity),
            protocol=np.array(json.dumps(to_json(self.protocol))),
        )
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
                "computed under; make it again"
            )
        protocol = from_json(json.loads(str(arrays["protocol"])), Protocol, f"{path}: protocol")
        name, identity = str(arrays["name"]), str(arrays["identity"])
        return cls(name, arrays["mu"], arrays["sigma"], arrays["feats"], protocol, identity)


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
    statistics: dict[str, Statistic] = {"moments": Moments(), "features": Features(min(neighbour_limit, source.count))}
    tally = collect(source, extractor, statistics, batch=batch, mesh=mesh, progress=progress)
    found = _finalise(statistics, tally.accumulators)
    protocol = Protocol(
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint(),
        count=source.count,
        quantiser=source.quantiser,
        labels=source.labels,
        split=split,
        neighbour_limit=neighbour_limit,
    )
    return Reference(name, found["mean"], found["covariance"], found["features"], protocol, source.identity)


def evaluate(
    source: Source,
    reference: Reference,
    extractor: Extractor,
    *,
    count: int | None = None,
    neighbours: int = 3,
    neighbour_rule: str = "closed",
    neighbour_limit: int = 10_000,
    batch: int = 256,
    mesh: Mesh | None = None,
    partial: str | Path | None = None,
    progress: Progress | None = None,
    subject: Mapping[str, str] | None = None,
) -> Result:
    """Scores the first `count` samples of a source in one pass.

    Values: ``frechet_distance``, ``precision``, ``recall``, ``density``, ``coverage``, and ``accuracy`` of the
    extractor's classifier where samples have labels.

    Args:
      source: the samples.
      reference: the real images they are compared with.
      extractor: the feature network, that of the reference.
      count: how many; all by default.
      neighbours, neighbour_rule, neighbour_limit: see `Protocol`.
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
        quantiser=source.quantiser,
        labels=source.labels,
        reference=reference.name,
        reference_fingerprint=reference.fingerprint(),
        split=reference.protocol.split,
        neighbours=neighbours,
        neighbour_rule=neighbour_rule,
        neighbour_limit=neighbour_limit,
        seeds=source.seeds,
    )
    _check(protocol, reference, source)
    began = time.monotonic()
    statistics: dict[str, Statistic] = {"moments": Moments(), "features": Features(min(neighbour_limit, count))}
    if source.labels != "none":
        statistics["accuracy"] = Accuracy()
    tally = collect(
        source, extractor, statistics, indices=range(count), batch=batch, mesh=mesh, path=partial, progress=progress
    )
    values, per_class = score(_finalise(statistics, tally.accumulators), reference, protocol)
    return Result(
        values=values,
        protocol=protocol,
        subject={"identity": source.identity} | dict(subject or {}),
        per_class=per_class,
        seconds=time.monotonic() - began,
    )


def score(
    found: Mapping[str, Any], reference: Reference, protocol: Protocol
) -> tuple[dict[str, float], dict[str, tuple[float | None, ...]]]:
    """Values and per-class values from finalised statistics (``mean``, ``covariance``, ``features`` ...)."""
    near = manifold(
        reference.features[: protocol.neighbour_limit],
        found["features"],
        protocol.neighbours,
        strict=protocol.neighbour_rule == "open",
    )
    values = {
        "frechet_distance": frechet_distance(found["mean"], found["covariance"], reference.mean, reference.covariance),
        "precision": near.precision,
        "recall": near.recall,
        "density": near.density,
        "coverage": near.coverage,
    }
    if "accuracy" not in found:
        return values, {}
    classes = tuple(None if np.isnan(a) else float(a) for a in found["class_accuracy"])
    return values | {"accuracy": float(found["accuracy"])}, {"accuracy": classes}


def _finalise(statistics: Mapping[str, Statistic], accumulators: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v for name, s in statistics.items() for key, v in s.finalise(accumulators[name]).items()}


def _check(protocol: Protocol, reference: Reference, source: Source) -> None:
    for name in _SHARED:
        ours, theirs = getattr(protocol, name), getattr(reference.protocol, name)
        if ours != theirs:
            raise GenError(
                f"the reference '{reference.name}' was made with {name} {theirs!r}, these samples with {ours!r}; "
                "expected the same; make the reference again or use its extractor"
            )
    if protocol.count > source.count:
        raise GenError(
            f"{protocol.count} samples asked of a source with {source.count}; no score is given for a partial set; "
            "make more samples or ask for fewer"
        )
    if protocol.neighbour_rule not in ("open", "closed"):
        raise GenError(f"unknown neighbour rule '{protocol.neighbour_rule}'; expected open or closed")
    available = min(protocol.neighbour_limit, protocol.count, len(reference.features))
    if not 1 <= protocol.neighbours < available:
        raise GenError(
            f"{protocol.neighbours} neighbours asked of {available} images; expected at least 1 and fewer than "
            "those; lower neighbours or use more samples"
        )
