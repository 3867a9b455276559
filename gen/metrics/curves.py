"""What a run logged while it trained, as curves on a page: the losses first, one line for each stage and part."""

from collections.abc import Iterable, Mapping
from typing import Any

from gen.metrics.report import Report

__all__ = ["Series", "logged", "show_training"]

Series = dict[str, tuple[list[float], list[float]]]  # name -> (steps, values)
_AXES = ("step", "seconds", "images")  # what the curves run over, no curves of their own
_LAST = ("images_per_second",)


def logged(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Gives the lines of each metric, from the records of a metrics.jsonl; what ends in "loss" comes first, the speed
    last.

    A metric of a task with several networks is logged as "student/loss": the last word is the metric, and every
    stage and every path before that word is a line of its own ("matching, student").
    """
    found: dict[str, Series] = {}
    for record in records:
        for key, value in record.items():
            if key in _AXES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            path, _, metric = key.rpartition("/")
            line = ", ".join(part for part in (str(record.get("stage", "run")), path) if part).replace("_", " ")
            steps, values = found.setdefault(metric, {}).setdefault(line, ([], []))
            steps.append(float(record["step"]))
            values.append(float(value))
    return {metric: found[metric] for metric in sorted(found, key=_place)}


def _place(metric: str) -> int:
    """Where a metric stands on the page; equal ones stay in the order in which they were logged."""
    if metric in _LAST:
        return 3
    return 0 if metric == "loss" else 1 if metric.endswith("loss") else 2


def show_training(page: Report, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds a section with a drawing for each metric, and a table of what a drawing would not show.

    In the table stands what was logged once or never changed. A term that is all of its loss is not drawn again.
    """
    still: list[list[Any]] = []
    drawn: dict[str, Series] = {}
    for metric, lines in logged(records).items():
        for line, (steps, values) in lines.items():
            if len(set(values)) > 1:
                drawn.setdefault(metric, {})[line] = (steps, values)
            else:
                times = f"at step {steps[0]:.0f}" if len(steps) == 1 else f"at {len(steps)} steps"
                still.append([metric.replace("_", " "), line, times, values[0]])
    if drawn or still:
        page.section("Training")
    for metric, lines in drawn.items():
        if metric != "loss" and lines == drawn.get("loss"):
            continue
        positive = all(value > 0 for _, values in lines.values() for value in values)
        page.curves(lines, y=metric.replace("_", " "), log=positive and metric == "loss")
    if still:
        page.table(["metric", "stage", "logged", "value"], still, "What was logged once, or is the same every time.")
