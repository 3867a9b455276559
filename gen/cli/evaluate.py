"""``gen evaluate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.start import Multihost, start
from gen.cli.train import Overrides
from gen.errors import GenError

__all__ = ["evaluate"]


def evaluate(
    what: Annotated[str, tyro.conf.Positional],
    /,
    *,
    reference: str = "digits:train",
    extractor: str = "digits-extractor",
    seeds: str = "0-1796",
    neighbours: int = 3,
    batch: int = 256,
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    solver: Annotated[str | None, tyro.conf.arg(metavar="KIND")] = None,
    grid: Annotated[str | None, tyro.conf.arg(metavar="KIND")] = None,
    guidance: Annotated[float | None, tyro.conf.arg(aliases=["--cfg-scale"], metavar="W")] = None,
    weights: Literal["ema", "raw"] = "ema",
    measures: tuple[str, ...] = (),
    compare: tuple[Path, ...] = (),
    force: bool = False,
    out: Annotated[Path | None, tyro.conf.arg(metavar="JSON")] = None,
    multihost: Multihost = False,
    overrides: Overrides = (),
) -> None:
    """Scores a run, a folder of images or an npz against real images; writes the scores with their protocol.

    A run is sampled with balanced classes. Scores taken under different protocols are not shown side by side.
    Interrupted and started again, it goes on where it was.

    Examples:
      gen evaluate runs/demo/student
      gen evaluate runs/demo/teacher --steps 10 --cfg-scale 1.5 --out teacher10.json
      gen evaluate samples.npz --reference digits:train --compare runs/demo/student/scores.json
      gen evaluate samples.npz --reference imagenet256.npz --extractor inception:legacy_tensorflow --measures kid

    Args:
      what: a run folder, a folder of PNG files, an .npz with arr_0 (and arr_1 labels), or digits:test.
      reference: real images (as for WHAT), or statistics saved as an .npz.
      extractor: the feature network, from gen list extractor; inception:MODE with clean, legacy_tensorflow or
        legacy_pytorch.
      seeds: which samples of a run, FIRST-LAST.
      neighbours: k of precision, recall, density and coverage.
      batch: images at a time; does not change the scores.
      steps: number of solver steps.
      solver: a solver from gen list solver.
      grid: a time grid from gen list grid.
      guidance: guidance scale; 1 is none.
      weights: ema, the averaged weights, or raw.
      measures: further measures: kid, mind, frechet_infinity, class_frechet.
      compare: score files to show beside.
      force: compare with a reference made under other conditions.
      out: where the scores go; RUN/scores.json, or beside the images, by default.
      multihost: this is one of several processes of a SLURM, GKE, TPU pod or MPI job.
    """
    from gen.cli.sample import sampler_overrides
    from gen.metrics.evaluate import evaluate as score
    from gen.metrics.protocol import Result, require_comparable
    from gen.training.sharding import make_mesh

    network = open_extractor(extractor)
    others = {str(path): Result.load(path) for path in compare}
    start(multihost)
    changes = sampler_overrides(steps, solver, grid, guidance) + overrides
    source, subject = _subject(what, seeds, weights, changes)
    mesh = make_mesh()
    out = out or _default_out(Path(what))
    partial = out.with_name(out.name + ".partial.npz")
    result = score(
        source,
        _reference(reference, network, batch, mesh),
        network,
        neighbours=neighbours,
        extra=measures,
        force=force,
        batch=batch,
        mesh=mesh,
        partial=partial,
        progress=_progress(what),
        subject=subject,
    )
    result.save(out)
    partial.unlink(missing_ok=True)
    show({what: result} | others)
    print(f"written to {out}")
    require_comparable({what: result} | others)


def open_extractor(text: str) -> Any:
    """The feature network that ``NAME`` or ``NAME:MODE`` names. Raises GenError for an unknown one."""
    from gen.config import KINDS, config_class, suggest

    name, _, mode = text.partition(":")
    if name not in KINDS["extractor"]:
        raise GenError(f"unknown extractor '{name}'; {suggest(name, KINDS['extractor'])}")
    network = config_class(name)
    if mode and "mode" not in getattr(network, "__dataclass_fields__", {}):
        raise GenError(f"the extractor '{name}' has no modes; write --extractor {name}")
    return network(mode=mode) if mode else network()


def _subject(what: str, seeds: str, weights: Any, overrides: tuple[tuple[str, str], ...]) -> tuple[Any, dict[str, str]]:
    """(source, what is said of it) of a run or of stored images."""
    from gen.cli.images import parse_seeds, read_images
    from gen.cli.sample import describe, open_run
    from gen.config import fingerprint
    from gen.metrics.sources import from_arrays, generated
    from gen.pretrained.load import labels_for

    if not (Path(what) / "config.json").is_file():
        if overrides:
            raise GenError(f"{what} holds finished images; sampler settings apply to runs only: leave them out")
        images, labels = read_images(what)
        return from_arrays(images, labels), {"name": what}
    loaded = open_run(Path(what), weights, None, overrides)
    wanted = parse_seeds(seeds)
    import numpy as np

    labels = labels_for(loaded.generator, np.arange(wanted.start, wanted.stop), None).get("label")
    print(describe(loaded))
    identity = f"{fingerprint(loaded.config)} step {loaded.step} {loaded.weights}"
    source = generated(
        loaded.generator, loaded.params, seeds=wanted, identity=identity, labels=labels, rule="seed mod classes"
    )
    calls = str(loaded.generator.nfe or "measured")
    return source, {"name": what, "weights": loaded.weights, "nfe": calls, "step": str(loaded.step)}


def _reference(text: str, network: Any, batch: int, mesh: Any) -> Any:
    """Stored statistics, or those of the images that `text` names."""
    import zipfile

    from gen.cli.images import read_images
    from gen.metrics.reference import Reference, make_reference
    from gen.metrics.sources import from_arrays

    path = Path(text)
    if path.suffix == ".npz" and zipfile.is_zipfile(path) and "mu.npy" in zipfile.ZipFile(path).namelist():
        return Reference.load(path)
    images, labels = read_images(text)
    name, _, split = text.partition(":")
    return make_reference(name, from_arrays(images, labels), network, split=split, batch=batch, mesh=mesh)


def _default_out(path: Path) -> Path:
    return path / "scores.json" if (path / "config.json").is_file() else Path(str(path).rstrip("/") + ".scores.json")


def _progress(what: str) -> Any:
    """Shows how far it is, on a terminal only."""
    import sys

    def shown(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return shown


def show(results: dict[str, Any]) -> None:
    """A table of scores, one column per result, and under it the protocol of the first."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    first = next(iter(results.values()))
    comparable = {name: r for name, r in results.items() if not _differs(first, r)}
    table = Table("score", *comparable, box=None, header_style="bold")
    for name in first.values:
        table.add_row(name, *(f"{r.values[name]:.4f}" if name in r.values else "-" for r in comparable.values()))
    console = Console()
    console.print(table)
    facts = {f.name: getattr(first.protocol, f.name) for f in dataclasses.fields(first.protocol)}
    console.print("protocol: " + ", ".join(f"{k} {v}" for k, v in facts.items() if v != ""), highlight=False)


def _differs(a: Any, b: Any) -> bool:
    from gen.metrics.protocol import differences

    return bool(differences(a.protocol, b.protocol))
