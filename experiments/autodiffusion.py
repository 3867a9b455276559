"""AutoDiffusion: the best few time steps of a trained model, and the layers it needs at each (Li et al. 2023).

arXiv 2309.10438. Nothing is trained. Paper's search: 50 candidates in each of 10 generations (15 with layers), 1000 to
5000 samples each; here all candidates share noise and classes, and the best are scored again on more samples of other
seeds before one is chosen.

Expected (ImageNet-64, guided ADM, 4 steps, FID; the abstract): 17.86 against 138.66 of uniform DDIM. Not reproduced
here yet. On the digits teacher of the demo: see benchmarks/RESULTS.md.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from gen.errors import GenError
from gen.experiments._search import controls_of, pool_of, process_of, scorer, tunable
from gen.features.extractor import Extractor
from gen.metrics.reference import Reference
from gen.runs import Loaded
from gen.sampling.grids import Karras, Searched, Uniform
from gen.sampling.search import Candidate, Evolution, SearchSpace, evolve, write_grid

__all__ = ["SEARCHES", "Search", "search"]

LAYERS = ("keep", "blocks")  # controls that say which layers run: of U-Nets, of transformers


@dataclasses.dataclass(frozen=True)
class Search:
    """How a search is carried out.

    Attributes:
      evolution: the algorithm's numbers.
      count: samples of each candidate.
      finalists: the best so many are scored again.
      final_count: on so many samples, of seeds that follow those of the search.
      most: greatest share of the layers that a step leaves out; 0 to search times alone.
    """

    evolution: Evolution = Evolution()
    count: int = 5000
    finalists: int = 10
    final_count: int = 10_000
    most: float = 0.0


SEARCHES: dict[str, Search] = {
    "smoke": Search(Evolution(4, 2, 2, 2, 1), 64, 2, 128),
    "laptop": Search(Evolution(30, 3, 8, 15, 8), 600, 4, 1797),
    "one-gpu": Search(Evolution(50, 10, 10, 25, 15), 2000),
    "imagenet64": Search(),
    "imagenet64-layers": Search(Evolution(50, 15, 10, 25, 10), 1000, most=0.1),
}


def search(
    loaded: Loaded,
    reference: Reference,
    extractor: Extractor,
    steps: int,
    out: Path,
    how: Search = SEARCHES["laptop"],
    *,
    budget: int = 0,
    batch: int = 256,
    mesh: Any = None,
) -> dict[str, float]:
    """Searches, writes the grid to `out`, and gives distances on the finalists' seeds: ``searched``, and beside it
    those of the usual grids, ``uniform`` and ``karras``.

    What was scored is kept beside `out`; an interrupted search goes on from there.

    Args:
      steps: of the sampler.
      budget: greatest number of layers that run, over all steps; 0 for no limit.

    Raises GenError for a model without layers that can be left out where some are to be.
    """
    generator = tunable(loaded)
    process, known = process_of(generator), controls_of(generator, loaded.params["net"])
    name = next((n for n in LAYERS if n in known), "")
    if how.most and not name:
        raise GenError(f"the network of {loaded.path} leaves no layers out; search times alone (--layers 0)")
    layers = known[name][0] if how.most else 0
    space = SearchSpace(pool_of(process), steps, layers, how.most, budget)
    example = {name: _rows(space, space.uniform, name)} if layers else {}
    settings = {"steps": steps, "controls": example, "batch": batch, "mesh": mesh}
    first = how.evolution.seed * (how.count + how.final_count)
    quick = scorer(loaded, reference, extractor, count=how.count, first_seed=first, **settings)
    sure = scorer(loaded, reference, extractor, count=how.final_count, first_seed=first + how.count, **settings)

    def controls(candidate: Candidate) -> dict[str, np.ndarray]:
        return {name: _rows(space, candidate, name)} if layers else {}

    ranked = evolve(
        space,
        how.evolution,
        lambda c: quick(space.times(c), controls(c)),
        out.with_suffix(".search.json"),
        lambda g, c, value: print(f"generation {g + 1}: {value:.3f} at {_shown(space, c)}", flush=True),
    )
    finalists = {c: sure(space.times(c), controls(c)) for c, _ in ranked[: how.finalists]}
    best = min(finalists, key=lambda c: finalists[c])
    usual = {"uniform": Uniform(), "karras": Karras()}
    plain = {name: sure(grid(process, steps).times, controls(space.uniform)) for name, grid in usual.items()}
    rows = [tuple(row.tolist()) for row in controls(best).get(name, np.zeros((0, 0)))]
    grid = Searched(tuple(space.times(best).tolist()), process, ((name, tuple(rows)),) if layers else ())
    found = {"searched": finalists[best], **plain}
    about = {"model": loaded.origin, "distances": found, "samples": how.final_count, "scored": len(ranked)}
    write_grid(out, grid, about)
    return found


def _rows(space: SearchSpace, candidate: Candidate, name: str) -> np.ndarray:
    runs = space.runs(candidate)
    return runs if name == "keep" else runs.astype(np.float32)


def _shown(space: SearchSpace, candidate: Candidate) -> str:
    return ", ".join(f"{t:.4g}" for t in space.times(candidate)[:-1])
