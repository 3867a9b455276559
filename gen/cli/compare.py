"""``gen compare``."""

import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import Switch, flag
from gen.errors import GenError

__all__ = ["compare", "show"]


def compare(
    what: Annotated[tuple[str, ...], tyro.conf.Positional, flag("RUN|JSON")],
    /,
    *,
    force: Switch = False,
    out: Annotated[Path | None, flag("HTML")] = None,
) -> None:
    """Shows the scores of several evaluations side by side, under one protocol.

    Results taken under different protocols are refused, naming the field in which they differ; forced, that field
    stands in the table.

    Examples:
      gen compare runs/a runs/b runs/c
      gen compare teacher10.json teacher50.json --out steps.html

    Args:
      what: run folders (their scores.json), or score files of gen evaluate.
      force: compare all the same.
      out: also write a page.
    """
    from gen.metrics.protocol import Result, require_comparable
    from gen.metrics.report import Report

    if len(what) < 2:
        raise GenError("one result or none has nothing to be compared with; give two or more score files or runs")
    if len(set(what)) < len(what):
        raise GenError("a result is given twice; expected different ones")
    results = {name: Result.load(_scores(Path(name))) for name in what}
    require_comparable(results, force=force)
    show(results)
    if out is not None:
        Report("Comparison", f"{len(results)} evaluations.").results(results).write(out)
        print(f"written to {out}")


def _scores(path: Path) -> Path:
    """The score file of a run folder, or the file itself."""
    if path.is_dir() and not (path / "scores.json").is_file():
        raise GenError(f"{path} holds no scores.json; run gen evaluate {path}")
    return path / "scores.json" if path.is_dir() else path


def show(results: dict[str, Any]) -> None:
    """Prints a table of scores and of the protocol fields in which they differ; the rest of the protocol beneath.

    Results are its columns; its rows where there are more results than scores.
    """
    import dataclasses

    from gen.cli.tables import print_table
    from gen.metrics.protocol import Protocol, differences

    everyone = list(results.values())
    first = everyone[0].protocol
    varying = list(dict.fromkeys(name for r in everyone for name in differences(first, r.protocol)))
    names = list(dict.fromkeys(name for result in everyone for name in result.values))
    columns = [["", *results]]
    columns += [[name, *(_cell(result, name) for result in everyone)] for name in names]
    columns += [[field, *(str(getattr(result.protocol, field)) for result in everyone)] for field in varying]
    upright = len(columns) <= len(results) + 1
    head, *rows = zip(*columns, strict=True) if upright else columns
    print_table(head, rows)
    fields = [field.name for field in dataclasses.fields(Protocol) if field.name not in varying]
    facts = {name: getattr(first, name) for name in fields}
    print("protocol: " + ", ".join(f"{k} {v}" for k, v in facts.items() if v != ""))
    for label, result in results.items():
        if "partial" in result.subject:
            print(f"{label} is partial: {result.subject['partial']}")


def _cell(result: Any, name: str) -> str:
    if name not in result.values:
        return "-"
    spread = result.spread.get(name, result.within.get(name))
    value = result.values[name]
    digits = max(3 - math.floor(math.log10(max(abs(value) or 1, 1e-4))), 4)  # a KID of 0.0005 keeps its digits
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
