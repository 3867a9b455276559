"""Scores of images against a reference set, always with the protocol they were taken under."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.measures import check_extras, extra_statistics, score
from gen.metrics.onepass import Progress, collect
from gen.metrics.protocol import Protocol, Result
from gen.metrics.reference import Reference
from gen.metrics.sources import Source
from gen.metrics.statistics import basic_statistics, finalised

__all__ = ["evaluate"]

_SHARED = ("extractor", "extractor_fingerprint", "resize", "precision")  # a reference and its samples must agree on


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

    Which values there are stands in `gen.metrics.measures.MEASURES`: those that can be had with this extractor and
    reference, and those asked for by `extra`.

    Args:
      source: the samples.
      reference: the real images they are compared with.
      extractor: the feature network, that of the reference.
      count: how many; all by default.
      neighbours, neighbour_rule, neighbour_limit, score_splits: see `Protocol`.
      extra: names in `gen.metrics.measures.EXTRAS`.
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
    _check(protocol, reference, source, force)
    check_extras(extractor, source, reference, extra)
    began = time.monotonic()
    statistics = basic_statistics(extractor, source.labels != "none", min(neighbour_limit, count))
    statistics |= extra_statistics(extractor, source, reference, protocol, extra)
    tally = collect(
        source, extractor, statistics, indices=range(count), batch=batch, mesh=mesh, path=partial, progress=progress
    )
    scores = score(finalised(statistics, tally.accumulators), extractor, source, reference, protocol, extra)
    return Result(
        values=scores.values,
        protocol=protocol,
        subject={"identity": source.identity} | dict(subject or {}),
        within=scores.within,
        per_class=scores.per_class,
        seconds=time.monotonic() - began,
    )


def _check(protocol: Protocol, reference: Reference, source: Source, force: bool) -> None:
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
    if not len(reference.features):
        return
    available = min(protocol.neighbour_limit, protocol.count, len(reference.features))
    if not 1 <= protocol.neighbours < available:
        raise GenError(
            f"{protocol.neighbours} neighbours asked of {available} images; expected at least 1 and fewer than "
            "those; lower neighbours or use more samples"
        )
