"""The page of one evaluation: samples, scores with their protocol, classes, distance against N, closest real images."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from gen.metrics.frechet import frechet_by_size
from gen.metrics.memorisation import show_memorisation
from gen.metrics.neighbours import nearest
from gen.metrics.protocol import Result
from gen.metrics.reference import Reference
from gen.metrics.report import Report, heading
from gen.metrics.sources import ImageSet

__all__ = ["class_rows", "closest_real", "distance_by_count", "evaluation_page"]

_SPREAD = (
    "What follows a ± is the deviation over splits (Inception Score), subsets (KID) or trainings (CAS), the error of "
    "the fitted line (N → ∞), else the standard error over samples."
)
_SHOWN = 16  # closest pairs
_CLASSES = 20  # rows of a table by class before only the extremes are shown
_ACROSS = 12  # classes that go side by side
_SIDE = 128  # pixels of a shown picture's longer side, at most
_LEAST = 16  # samples in the smallest subset of the curve


def evaluation_page(
    title: str,
    result: Result,
    found: Mapping[str, Any],
    reference: Reference,
    real: ImageSet | None = None,
    details: Mapping[str, Any] = MappingProxyType({}),
) -> Report:
    """Makes the page of an evaluation.

    Args:
      title: what was scored.
      result: its scores.
      found: the finalised statistics behind them (`gen.metrics.evaluate.Evaluation.found`), with "pictures".
      reference: the real images' statistics.
      details: further results of measures (`gen.metrics.measures.Scores`).
      real: the images whose features the reference holds, for the closest ones; None when they are not at hand.
    """
    protocol = result.protocol
    partial = f" Partial: {result.subject['partial']}." if "partial" in result.subject else ""
    page = Report(title, f"{protocol.count:,} samples against {protocol.reference}.{partial}")
    shown = _small(found["pictures"])
    page.section("Scores").results({title: result}, _SPREAD if result.within else "")
    page.section("Samples").pictures({"": shown}, "The first samples, by index.", columns=12, size=64)
    facts = {name: _spelled(text) for name, text in result.subject.items() if name not in ("name", "partial")}
    if facts:
        page.table(["subject", ""], [[name, text] for name, text in facts.items()])
    curve = distance_by_count(found, reference)
    if len(curve[0]) > 2:
        page.section(
            "Distance against the number of samples",
            "Fréchet distances of random subsets of the samples whose features are kept, the last of all of these. The "
            "distance falls about as 1/N: numbers at another N are not comparable.",
        )
        page.curves({"Fréchet distance": curve}, x="samples", y="Fréchet distance", log_x=True)
    if result.per_class:
        rows, caption = class_rows(result)
        table = [["class", *(heading(name) for name in result.per_class)], *rows]
        if len(rows) <= _ACROSS:
            table = [list(column) for column in zip(*table, strict=True)]
        page.section("By class").table([str(cell) for cell in table[0]], table[1:], caption)
    if len(reference.features):
        _closest(page, found, reference, real)
    if "memorisation" in details:
        show_memorisation(page, found["images"], found["training"]["images"], details["memorisation"])
    return page


def _spelled(text: str) -> str:
    """A configuration's JSON in words, such as "heun, uniform (shift 0.3), steps 10"; any other text as it is."""

    def said(value: Any) -> str:
        if not isinstance(value, dict):
            return str(value)
        fields = [f"{name} {said(field)}" for name, field in value.items() if name != "kind" and field is not None]
        inside = f" ({', '.join(fields)})" if fields else ""
        return f"{value.get('kind', '')}{inside}"

    return said(json.loads(text)) if text.startswith("{") else text


def distance_by_count(found: Mapping[str, Any], reference: Reference) -> tuple[list[float], list[float]]:
    """Gives (numbers of samples, distances): subsets of the kept features, doubling up to all of them."""
    kept = found["features"]
    sizes = [len(kept) >> shift for shift in range(6, -1, -1) if len(kept) >> shift >= _LEAST]
    distances = frechet_by_size(kept, reference.mean, reference.covariance, sizes)
    return [float(size) for size in sizes], distances


def class_rows(result: Result) -> tuple[list[list[Any]], str]:
    """Gives rows (class, scores ...) and what they are: all classes, or the lowest and highest by the first score."""
    columns = list(result.per_class.values())
    rows = [[label, *values] for label, values in enumerate(zip(*_padded(columns), strict=True))]
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    if len(rows) <= _CLASSES:
        return rows, ""
    scored = sorted((row for row in rows if row[1] is not None), key=lambda row: row[1])
    half = _CLASSES // 2
    name = next(iter(result.per_class)).replace("_", " ")
    return scored[:half] + scored[-half:], f"The {half} lowest and the {half} highest of {len(rows)} classes by {name}."


def closest_real(found: Mapping[str, Any], reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Gives (distance, index) of the real image whose features are closest, for each of the samples that have a
    picture.
    """
    return nearest(found["features"][: len(found["pictures"])], reference.features)


def _closest(page: Report, found: Mapping[str, Any], reference: Reference, real: ImageSet | None) -> None:
    distances, indices = closest_real(found, reference)
    order = np.argsort(distances, kind="stable")[:_SHOWN]
    text = (
        f"Of the {len(distances)} samples above, those that lie closest to a real image in the features of the "
        f"{reference.protocol.extractor} network, each over that image, among the {len(reference.features):,} real "
        "images whose features the reference holds."
    )
    page.section("Closest real images", text)
    if real is None or real.read is None:
        page.text("The real images are not at hand where the reference says they lay, so only their numbers are shown.")
        page.table(
            ["sample", "real image", "distance"], [[int(i), int(indices[i]), float(distances[i])] for i in order]
        )
        return
    rows = real.read(indices[order])
    shown = rows["levels"] if "levels" in rows else rows["image"]
    pixels = np.clip(np.round(shown), 0, 255).astype(np.uint8) if shown.dtype != np.uint8 else shown
    pairs = {"samples": _small(found["pictures"][order]), "real": _small(pixels)}
    page.pictures(pairs, f"Distances {distances[order[0]]:.3g} to {distances[order[-1]]:.3g}.", columns=_SHOWN)


def _small(images: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) uint8, shrunk where they are larger than is shown."""
    height, width, channels = images.shape[1:]
    if max(height, width) <= _SIDE:
        return images
    size = tuple(max(1, round(side * _SIDE / max(height, width))) for side in (width, height))
    shown = [Image.fromarray(i if channels == 3 else i[..., 0]).resize(size, Image.Resampling.LANCZOS) for i in images]
    return np.stack([np.asarray(picture).reshape(size[1], size[0], channels) for picture in shown])


def _padded(columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
    longest = max(len(column) for column in columns)
    return [[*column, *[None] * (longest - len(column))] for column in columns]
