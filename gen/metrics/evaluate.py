"""Scores of images against a reference set, always with the protocol they were taken under."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gen.config import fingerprint
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.classifier import Classifier
from gen.metrics.measures import Scores, check_extras, extra_statistics, score
from gen.metrics.onepass import Progress, Tally, collect, merge_tallies
from gen.metrics.protocol import Protocol, Result, departures, preset
from gen.metrics.reference import Reference
from gen.metrics.sources import ImageSet
from gen.metrics.statistics import Features, Statistic, basic_statistics, finalised

__all__ = ["Evaluation", "Settings", "evaluate", "part_of"]

_SHARED = ("extractor", "extractor_fingerprint", "resize", "precision")  # a reference and its samples must agree on


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of an evaluation.

    Attributes:
      count: how many samples: the first ones; all of the source by default.
      neighbours, neighbour_rule, neighbour_limit, score_splits: see `Protocol`.
      extra: measures beyond those that need not be asked for, names in `gen.metrics.measures.MEASURES`.
      name: a preset of `gen.metrics.protocol.PRESETS` that the protocol must agree with; "" for none.
      force: go on where the reference was made under other conditions or the protocol departs from the preset; the
        result says so.
      pictures: how many of the first samples are kept to be looked at.
    """

    count: int | None = None
    neighbours: int = 3
    neighbour_rule: str = "closed"
    neighbour_limit: int = 10_000
    score_splits: str = "10-shuffled"
    extra: tuple[str, ...] = ()
    name: str = ""
    force: bool = False
    pictures: int = 0

    @classmethod
    def of(cls, name: str) -> "Settings":
        """Gives the settings of a preset. Raises GenError for an unknown one."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(name=name, **{key: value for key, value in preset(name).fields.items() if key in known})


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation: checked when it is made, before anything is compiled.

    Attributes:
      source: the samples.
      reference: the real images they are compared with.
      extractor: the feature network, that of the reference.
      settings: what is asked.

    Raises:
      GenError: fewer samples than asked for, a reference made under other conditions, a protocol that departs from the
        preset, measures that cannot be had.
    """

    source: ImageSet
    reference: Reference
    extractor: Extractor
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        _check(self.protocol, self.reference, self.source, self.settings.force)
        check_extras(self.extractor, self.source, self.reference, self.settings.extra)

    @property
    def protocol(self) -> Protocol:
        """Gives the protocol of the scores."""
        asked, source, extractor, reference = self.settings, self.source, self.extractor, self.reference
        trained = f"classifier {fingerprint(Classifier())}" if "cas" in asked.extra else ""
        protocol = Protocol(
            extractor=extractor.name,
            extractor_fingerprint=extractor.fingerprint(),
            count=source.count if asked.count is None else asked.count,
            resize=extractor.resize,
            quantiser=source.quantiser,
            precision=extractor.precision,
            labels=source.labels,
            reference=reference.name,
            reference_fingerprint=reference.fingerprint(),
            split=reference.protocol.split,
            neighbours=asked.neighbours,
            neighbour_rule=asked.neighbour_rule,
            neighbour_limit=asked.neighbour_limit,
            score_splits=asked.score_splits,
            beside=", ".join(filter(None, (trained, source.named()))),
            seeds=source.seeds,
            name=asked.name,
        )
        departing = departures(asked.name, protocol) if asked.name else {}
        return dataclasses.replace(
            protocol,
            reference=f"{reference.name} (forced)" if asked.force else reference.name,
            name=f"{asked.name}, but for {', '.join(departing)}" if departing else asked.name,
        )

    @property
    def statistics(self) -> dict[str, Statistic]:
        """Gives the statistics that are gathered, by name."""
        protocol, asked = self.protocol, self.settings
        limit = min(protocol.neighbour_limit, protocol.count)
        statistics = basic_statistics(self.extractor, self.source.labels != "none", limit)
        statistics |= extra_statistics(self.extractor, self.source, self.reference, protocol, asked.extra)
        if asked.pictures:
            statistics["pictures"] = Features(asked.pictures, "levels", "uint8", "pictures")
        return statistics

    def gather(
        self,
        *,
        indices: range | None = None,
        batch: int = 256,
        mesh: Mesh | None = None,
        partial: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Tally:
        """Makes one pass over the samples, or over those of `indices`; see `gen.metrics.onepass.collect`.

        Raises GenError for NaN images or features, and a partial file of another job.
        """
        indices = range(self.protocol.count) if indices is None else indices
        return collect(
            self.source,
            self.extractor,
            self.statistics,
            indices=indices,
            batch=batch,
            mesh=mesh,
            path=partial,
            progress=progress,
        )

    def found(self, tallies: Sequence[Tally]) -> dict[str, Any]:
        """Gives the finalised statistics of parts that make up the whole.

        Raises GenError for parts that overlap, belong to other jobs, or lack samples: no score is given for these.
        """
        statistics, count = self.statistics, self.protocol.count
        tally = merge_tallies(tallies, statistics)
        if tally.spans != ((0, count),):
            spans = ", ".join(f"{first} to {stop - 1}" for first, stop in tally.spans)
            raise GenError(
                f"{tally.count} of {count} samples are in ({spans}); "
                "no score is given for a partial set; evaluate the other parts, or ask for fewer samples"
            )
        beside = {name: thing for name, (_, thing) in self.source.beside.items()}
        return finalised(statistics, tally.accumulators) | beside

    def scores(self, found: Mapping[str, Any]) -> Scores:
        """Gives what all measures give, with what the page shows of them, from what `found` gave."""
        return score(found, self.extractor, self.source, self.reference, self.protocol, self.settings.extra)

    def result(self, scores: Scores, *, subject: Mapping[str, str] | None = None) -> Result:
        """Gives the scores with their protocol.

        Args:
          scores: what `scores` gave.
          subject: what is scored, as text by name; goes into the result.
        """
        about = {"identity": self.source.identity} | dict(subject or {})
        if self.protocol.count < self.source.count:
            about["partial"] = f"the first {self.protocol.count} of {self.source.count} samples"
        return Result(scores.values, self.protocol, about, within=scores.within, per_class=scores.per_class)


def evaluate(
    source: ImageSet,
    reference: Reference,
    extractor: Extractor,
    settings: Settings = Settings(),
    *,
    batch: int = 256,
    mesh: Mesh | None = None,
    partial: str | Path | None = None,
    progress: Progress | None = None,
    subject: Mapping[str, str] | None = None,
) -> Result:
    """Scores the first samples of a source in one pass.

    Which values there are stands in `gen.metrics.measures.MEASURES`: those that can be had with this extractor and
    reference, and those asked for.

    Args:
      source: the samples.
      reference: the real images they are compared with.
      extractor: the feature network, that of the reference.
      settings: what is asked.
      batch, mesh, progress: see `gen.metrics.onepass.collect`; they do not change the scores.
      partial: where to keep partial results, so that a killed evaluation goes on where it was.
      subject: what is scored, as text by name; goes into the result.

    Raises:
      GenError: see `Evaluation`; NaN images or features, a partial file of another job.
    """
    began = time.monotonic()
    evaluation = Evaluation(source, reference, extractor, settings)
    tally = evaluation.gather(batch=batch, mesh=mesh, partial=partial, progress=progress)
    result = evaluation.result(evaluation.scores(evaluation.found([tally])), subject=subject)
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def part_of(count: int, number: int, parts: int) -> range:
    """Gives the samples of part `number` (from 1) of `parts` that share an evaluation of `count` samples.

    Raises GenError for a part that does not exist, or has no samples.
    """
    if not 1 <= number <= parts or parts > count:
        raise GenError(f"part {number} of {parts} of {count} samples; expected a part from 1 on, with samples in each")
    return range(count * (number - 1) // parts, count * number // parts)


def _check(protocol: Protocol, reference: Reference, source: ImageSet, force: bool) -> None:
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
    if not force:
        _check_preset(protocol)
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


def _check_preset(protocol: Protocol) -> None:
    """Raises GenError naming the first field in which a protocol departs from the preset it bears the name of."""
    name = protocol.name.partition(",")[0]
    for field, (wanted, given) in departures(name, protocol).items() if name else ():
        unknown = " (unknown)" if given in ("given", "") else ""
        raise GenError(
            f"protocol '{name}' has {field} {wanted!r}, this evaluation {given!r}{unknown}; make samples and reference "
            "so, say what is known of them with a flag, or force it: the result will name what departs"
        )
