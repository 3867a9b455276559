"""``gen search``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gen.cli.flags import USUAL, SamplingFlags, flag
from gen.errors import GenError

__all__ = ["search"]


def search(
    run: Annotated[Path, tyro.conf.Positional, flag("RUN")],
    /,
    *,
    out: Annotated[Path, flag("JSON")],
    what: Literal["steps", "skips"] = "steps",
    scale: Annotated[str, flag("NAME")] = "laptop",
    layers: Annotated[float | None, flag("SHARE")] = None,
    budget: Annotated[int, flag("N")] = 0,
    count: Annotated[int | None, flag("N")] = None,
    seed: Annotated[int, flag("N")] = 0,
    reference: Annotated[str | None, flag("IMAGES|NPZ")] = None,
    extractor: Annotated[str | None, flag("NAME")] = None,
    batch: Annotated[int, flag("N")] = 256,
    sampling: SamplingFlags = USUAL,
) -> None:
    """Finds a better sampler of a trained model: its time steps, which layers run at each, or the scale of its skips.

    An evolutionary search over time steps (AutoDiffusion), or a search of the skips' scale from bottom to top
    (Skip-Tuning). The result is a grid for --grid FILE. Its distance, and that of what it is held against, are of other
    samples than those that it was chosen by. Interrupted and started again, a search of steps goes on.

    Examples:
      gen search runs/demo/teacher --steps 4 --out runs/four.json
      gen sample runs/demo/teacher --grid runs/four.json --out grid.png
      gen search runs/adm --steps 10 --layers 0.2 --budget 580 --out ten.json
      gen search runs/edm --what skips --steps 5 --out skips.json

    Args:
      run: a run that a solver samples; for skips also a one-step student.
      out: the file of the grid.
      what: steps or skips.
      scale: numbers of a search of steps: smoke, laptop, one-gpu, imagenet64, imagenet64-layers.
      layers: greatest share of the layers that a step leaves out; the scale's if not given.
      budget: greatest number of layers that run, over all steps.
      count: samples of each candidate.
      seed: of a search of steps, and of its samples.
      reference: real images, or statistics of gen reference.
      extractor: feature network, as for gen evaluate.
      batch: images at a time.
      sampling: how the run is sampled.
    """
    from gen.cli.evaluate import _usual_reference
    from gen.cli.extractors import find_extractor, open_reference
    from gen.cli.opening import open_run
    from gen.config import suggest
    from gen.experiments import autodiffusion, skip_tuning
    from gen.training.sharding import make_mesh

    if scale not in autodiffusion.SEARCHES:
        raise GenError(f"unknown search '{scale}'; {suggest(scale, autodiffusion.SEARCHES)}")
    loaded = open_run(run, sampling)
    if what == "skips":
        skip_tuning.skips_of(loaded)  # says what does not suit before the reference is made
    network = find_extractor(extractor, reference, lambda: loaded.generator.shape)
    mesh = make_mesh()
    held, _ = open_reference(reference or _usual_reference(loaded.generator.shape), network, batch, mesh)
    placed: dict[str, Any] = {"batch": batch, "mesh": mesh}
    if what == "skips":
        number = {} if count is None else {"count": count}
        found = skip_tuning.tune(loaded, held, network, out, **number, **placed)
    else:
        how = autodiffusion.SEARCHES[scale]
        evolution = dataclasses.replace(how.evolution, seed=seed)
        most = how.most if layers is None else layers
        how = dataclasses.replace(how, evolution=evolution, count=count or how.count, most=most)
        steps = sampling.steps or loaded.config.sampler.steps
        found = autodiffusion.search(loaded, held, network, steps, out, how, budget=budget, **placed)
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()) + f"; written to {out}")
