"""``gen sweep`` and ``gen ema``."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from gen.cli.flags import flag
from gen.errors import GenError

__all__ = ["ema", "sweep"]

_Text = Annotated[str, flag("A,B,..")]


def sweep(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    guidance: Annotated[str, flag("W,W,..", name="cfg-scale")] = "",
    interval: Annotated[str, flag("LOW:HIGH,..")] = "",
    ema: _Text = "",
    steps: _Text = "",
    solver: _Text = "",
    grid: _Text = "",
    count: Annotated[int | None, flag("N")] = None,
    reference: Annotated[str | None, flag("IMAGES|NPZ")] = None,
    extractor: Annotated[str | None, flag("NAME")] = None,
    batch: Annotated[int, flag("N")] = 256,
    out: Annotated[Path | None, flag("DIR")] = None,
) -> None:
    """Scores the product of settings under one protocol, and reports the best on samples it was not chosen by.

    Each setting is evaluated once, on the same seeds. Interrupted and started again, it goes on where it was; a longer
    list costs what is new. OUT/sweep.html shows distances over guidance, averages and steps, and the front of distance
    over network calls.

    Examples:
      gen sweep runs/demo/teacher --cfg-scale 1,1.15,1.5 --steps 3,6,12
      gen sweep runs/edm2 --ema 0.05,0.1,0.15 --cfg-scale 1.2,1.6 --interval 0.3:1.6,0.2:5
      gen sweep runs/dit --solver euler,heun,dpm-solver --steps 10,20

    Args:
      run: the run folder of a diffusion or flow model.
      guidance: guidance scales; 1 is none.
      interval: times between which guidance acts, on the clock of the sampled process.
      ema: relative widths of averages made after training (EDM2).
      steps: numbers of solver steps.
      solver: of gen list solver.
      grid: of gen list grid.
      count: samples of each; as many as the reference holds, 50,000 at most, if not given.
      reference: real images, or statistics of gen reference.
      extractor: feature network, as for gen evaluate.
      batch: images at a time.
      out: the folder of scores; RUN/sweep if not given.
    """
    from gen.experiments._sweep import points

    wanted = points(
        steps=_each(steps, int, "--steps"),
        solver=_kinds("solver", solver),
        grid=_kinds("grid", grid),
        guidance=_each(guidance, float, "--cfg-scale"),
        interval=_intervals(interval),
        ema=_each(ema, float, "--ema"),
    )
    _swept(run, wanted, "sweep", count, reference, extractor, batch, out)


def ema(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    sigma_rel: Annotated[str, flag("A,B,..|A..B")] = "0.05..0.25",
    count: Annotated[int | None, flag("N")] = None,
    reference: Annotated[str | None, flag("IMAGES|NPZ")] = None,
    extractor: Annotated[str | None, flag("NAME")] = None,
    batch: Annotated[int, flag("N")] = 256,
    out: Annotated[Path | None, flag("DIR")] = None,
) -> None:
    """Averages of any width after training (EDM2): the distance over the width, and the best width.

    The run must have been trained with two or more power-function averages, and keeps a few checkpoints
    (engine.keep_every); of these every other width is made. OUT/ema.html shows the curve.

    Examples:
      gen ema runs/edm2 --sigma-rel 0.05..0.25
      gen ema runs/edm2 --sigma-rel 0.06,0.08,0.1 --count 10000 --reference img64.npz

    Args:
      run: the run folder.
      sigma_rel: widths relative to the length of training; A..B are nine from A to B.
      count: samples of each; as many as the reference holds, 50,000 at most, if not given.
      reference: real images, or statistics of gen reference.
      extractor: feature network, as for gen evaluate.
      batch: images at a time.
      out: the folder of scores; RUN/ema if not given.
    """
    from gen.experiments._sweep import points

    low, dots, high = sigma_rel.partition("..")
    if dots:
        ends = [*_each(low, float, "--sigma-rel"), *_each(high, float, "--sigma-rel")]
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise GenError(f"--sigma-rel {sigma_rel} is not like 0.05..0.25")
        widths = [round(ends[0] + i / 8 * (ends[1] - ends[0]), 6) for i in range(9)]
    else:
        widths = _each(sigma_rel, float, "--sigma-rel")
    _swept(run, points(ema=widths), "ema", count, reference, extractor, batch, out)


def _swept(
    run: Path,
    wanted: Any,
    name: str,
    count: int | None,
    reference: str | None,
    extractor: str | None,
    batch: int,
    out: Path | None,
) -> None:
    """Scores the points, chooses, reports on other seeds, writes the page."""
    import functools

    from gen.cli.evaluate import _usual_reference
    from gen.cli.extractors import find_extractor, open_reference
    from gen.experiments._search import scored
    from gen.experiments._sweep import DISTANCE, changed, chosen, page, run_sweep
    from gen.runs import averaged, load
    from gen.training.sharding import make_mesh

    loaded = load(run)
    shape, folder = loaded.generator.shape, out or run / name

    @functools.cache
    def opened(width: float | None) -> Any:
        return loaded if width is None else averaged(run, width)

    for point in wanted:
        changed(opened, point)  # says what does not suit before anything is compiled
    network, mesh = find_extractor(extractor, reference, lambda: shape), make_mesh()
    held, _ = open_reference(reference or _usual_reference(shape), network, batch, mesh)
    number = count or min(held.protocol.count or 50_000, 50_000)
    placed = {"batch": batch, "mesh": mesh}
    results = run_sweep(opened, wanted, held, network, folder, seeds=range(number), **placed)
    best = chosen(results)
    reported = scored(changed(opened, best), held, network, range(number, 2 * number), **placed)
    reported.save(folder / "chosen.json")
    page(f"{run}: {name}", results, reported, best).write(folder / f"{name}.html")
    print(f"best: {best}; on other seeds {reported.values[DISTANCE]:.4f}; written to {folder / name}.html")


def _each(text: str, kind: Any, title: str) -> list[Any]:
    """The values of a list such as 1,1.5,2; [] of an empty one."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise GenError(f"{title} '{text}' is not a list of numbers such as 1,2,4") from None


def _kinds(family: str, text: str) -> list[str]:
    from gen.config import members, suggest

    names = text.split(",") if text else []
    for name in names:
        if name not in members(family):
            raise GenError(
                f"unknown {family} '{name}'; {suggest(name, members(family))} (of your own file: --module FILE)"
            )
    return names


def _intervals(text: str) -> list[tuple[float, float]]:
    found = []
    for part in text.split(",") if text else ():
        ends = _each(part.replace(":", ","), float, "--interval")
        if len(ends) != 2 or not ends[0] < ends[1]:
            raise GenError(f"--interval '{part}' is not like 0.1:0.9, low before high")
        found.append((ends[0], ends[1]))
    return found
