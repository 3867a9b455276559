"""``gen report``."""

import re
from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import flag

__all__ = ["report"]


def report(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    out: Annotated[Path | None, flag("HTML")] = None,
) -> None:
    """Rebuilds the report page of a run folder from its logs, previews and scores; one file, no network.

    Examples:
      gen report runs/demo/teacher
      gen report runs/demo/teacher --out teacher.html

    Args:
      run: a run folder.
      out: the page; RUN/report.html by default.
    """
    from gen.config import fingerprint
    from gen.metrics.curves import logged, show_training
    from gen.metrics.monitor import METRIC
    from gen.metrics.protocol import Result
    from gen.metrics.report import Report
    from gen.runs import read_config
    from gen.training.logging import read_metrics

    config = read_config(run)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps of {stage.batch})" for stage in config.stages)
    page = Report(
        config.name, f"Run folder {run.name}, configuration {fingerprint(config)}. Stages: {stages or 'none'}."
    )
    scores = {path.stem: Result.load(path) for path in sorted(run.glob("*scores*.json"))}
    if scores:
        page.section("Scores").results(scores)
    records = read_metrics(run)
    monitored = logged([record for record in records if METRIC in record]).get(METRIC)
    if monitored:
        _add_monitor(page, run, monitored)
    show_training(page, [{name: value for name, value in record.items() if name != METRIC} for record in records])
    previews = sorted((run / "previews").glob("*.png"))
    if previews:
        page.section("Previews")
    for path in _latest(previews):
        page.pictures({path.stem: _read(path)}, columns=1, size=1)
    out = out or run / "report.html"
    page.write(out)
    print(f"written to {out}")


def _add_monitor(page: Any, run: Path, series: dict[str, tuple[list[float], list[float]]]) -> None:
    """The distance over the steps, where it was lowest, and the protocol that its numbers hold under."""
    from gen.config import from_json
    from gen.files import read_json
    from gen.metrics.protocol import Protocol

    distance, step = min(
        (value, step) for steps, values in series.values() for step, value in zip(steps, values, strict=True)
    )
    kept = (run / "checkpoints" / f"{step:.0f}").is_dir()
    text = f"Lowest at step {step:.0f}, with {distance:.4g}; its checkpoint is {'kept' if kept else 'not kept'}."
    page.section("Fréchet distance while training", text)
    if any(len(steps) > 1 for steps, _ in series.values()):
        page.curves(series, y="Fréchet distance")
    if (run / "monitor.json").is_file():
        page.protocol(from_json(read_json(run / "monitor.json"), Protocol, "monitor.json"))


def _latest(previews: list[Path]) -> list[Path]:
    """The newest picture of each stage and name; files are called STAGE-STEP-NAME.png."""
    return list({re.sub(r"-\d{7,}-", "-", path.stem): path for path in previews}.values())


def _read(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        array = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    return array.reshape(1, *array.shape[:2], -1)
