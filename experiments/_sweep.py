"""Sweeps over a trained run's settings under one protocol, and over the width of its averages."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gen.config import fingerprint
from gen.errors import GenError
from gen.experiments._search import scored
from gen.features.extractor import Extractor
from gen.metrics.protocol import Result, differences
from gen.metrics.reference import Reference
from gen.metrics.report import Report
from gen.runs import Loaded
from gen.sampling.guidance import ClassifierFree, Interval

__all__ = ["Point", "changed", "chosen", "front", "page", "points", "run_sweep"]

DISTANCE = "frechet_distance"
Open = Callable[[float | None], Loaded]  # width of the averaged weights, None for the run's own -> the run


@dataclasses.dataclass(frozen=True)
class Point:
    """Settings of a sampler; None for the run's own.

    Attributes:
      steps, solver, grid: of the sampler; a solver and a grid by kind.
      guidance: a scale.
      interval: times between which guidance acts.
      ema: relative width of the averaged weights.
    """

    steps: int | None = None
    solver: str | None = None
    grid: str | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None
    ema: float | None = None

    def __str__(self) -> str:
        return self.named([field.name for field in dataclasses.fields(self)])

    def named(self, axes: Sequence[str]) -> str:
        """Gives these of its settings in words."""
        given = {name: value for name in axes if (value := getattr(self, name)) is not None}
        return ", ".join(f"{name} {_shown(value)}" for name, value in given.items()) or "as it is"


def _shown(value: Any) -> str:
    return ":".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def points(**axes: Sequence[Any]) -> list[Point]:
    """Gives the product of the axes that are not empty. Raises GenError where all are."""
    given = {name: values for name, values in axes.items() if values}
    if not given:
        raise GenError("a sweep over nothing; give some settings, such as --cfg-scale 1,1.5,2 or --steps 5,10")
    return [Point(**dict(zip(given, values, strict=True))) for values in itertools.product(*given.values())]


def changed(open_run: Open, point: Point) -> Loaded:
    """Gives the run with a point's settings. Raises GenError for those that it has not."""
    from gen.config import config_class

    loaded = open_run(point.ema)
    kinds = {name: config_class(kind)() for name in ("solver", "grid") if (kind := getattr(point, name)) is not None}
    guidance: Any = point.guidance
    if point.interval is not None:
        held = loaded.config.sampler.guidance
        inner = held.guidance if isinstance(held, Interval) else held
        if point.guidance is not None:
            inner = dataclasses.replace(inner, scale=point.guidance)
        if inner == ClassifierFree():
            raise GenError("an interval of guidance without guidance changes nothing; add --cfg-scale W, such as 1.5")
        guidance = Interval(inner, *point.interval)
    sampler = loaded.config.sampler.changed(steps=point.steps, guidance=guidance, **kinds)
    return loaded.with_sampler(sampler)


def run_sweep(
    open_run: Open,
    wanted: Sequence[Point],
    reference: Reference,
    extractor: Extractor,
    folder: Path,
    *,
    seeds: range,
    batch: int = 256,
    mesh: Any = None,
) -> dict[Point, Result]:
    """Scores every point once on the same seeds; those that the folder holds are not made again.

    Raises GenError for a folder whose scores are of another protocol, or of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Point, Result] = {}
    for number, point in enumerate(wanted, 1):
        loaded = changed(open_run, point)
        path = folder / f"{fingerprint([to_json_point(point), seeds.start, len(seeds), loaded.origin])}.json"
        if path.exists():
            found[point] = Result.load(path)
        else:
            partial = path.with_suffix(".partial.npz")
            found[point] = scored(loaded, reference, extractor, seeds, batch=batch, mesh=mesh, partial=partial)
            found[point].save(path)
            partial.unlink(missing_ok=True)
        differing = differences(next(iter(found.values())).protocol, found[point].protocol)
        if differing:
            raise GenError(
                f"{folder} holds scores whose {next(iter(differing))} is another; give another --out for this protocol"
            )
        value = found[point].values[DISTANCE]
        print(f"[{number}/{len(wanted)}] {point}: {value:.4f} at {found[point].subject['nfe']} calls", flush=True)
    return found


def to_json_point(point: Point) -> dict[str, Any]:
    """Gives a point as JSON."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(point).items()}


def chosen(results: Mapping[Point, Result]) -> Point:
    """Gives the point of the least distance."""
    return min(results, key=lambda point: results[point].values[DISTANCE])


def calls(result: Result) -> float:
    """Gives the network calls of a sample."""
    text = result.subject["nfe"]
    return float(text) if text != "None" else float("nan")


def front(results: Mapping[Point, Result]) -> list[Point]:
    """Gives the points that none beats in both distance and calls, by calls."""
    ranked = sorted(results, key=lambda p: (calls(results[p]), results[p].values[DISTANCE]))
    best: list[Point] = []
    for point in ranked:
        if not best or results[point].values[DISTANCE] < results[best[-1]].values[DISTANCE]:
            best.append(point)
    return best


def page(title: str, results: Mapping[Point, Result], reported: Result, best: Point) -> Report:
    """Gives a page: the chosen setting on other seeds, distances over each axis that varies, the front, the table."""
    made = Report(title, f"{len(results)} settings under one protocol.")
    made.section(
        "Chosen",
        f"{best}: {reported.values[DISTANCE]:.4f} on seeds {reported.protocol.seeds}, which it was "
        f"not chosen by ({results[best].values[DISTANCE]:.4f} on those that it was).",
    )
    fields = [field.name for field in dataclasses.fields(Point)]
    varying = [name for name in fields if len({getattr(point, name) for point in results}) > 1]
    for axis in varying:
        if axis not in ("guidance", "ema", "steps"):
            continue
        others = [name for name in varying if name != axis]
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for point in sorted(results, key=lambda p: getattr(p, axis)):
            xs, ys = lines.setdefault(point.named(others), ([], []))
            xs.append(float(getattr(point, axis)))
            ys.append(results[point].values[DISTANCE])
        made.curves(lines, x=axis, y="Fréchet distance")
    every = {p.named(varying): (calls(r), r.values[DISTANCE]) for p, r in results.items()}
    if len({x for x, _ in every.values()}) > 1:
        made.points(every, x="network calls", y="Fréchet distance")
    best_of = [str(point) for point in front(results)]
    rows = [
        (str(p), f"{calls(r):g}", f"{r.values[DISTANCE]:.4f}", "yes" if str(p) in best_of else "")
        for p, r in results.items()
    ]
    made.table(["setting", "calls", "distance", "on the front"], sorted(rows, key=lambda row: float(row[2])))
    return made.protocol(reported.protocol)
