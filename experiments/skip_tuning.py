"""Skip-Tuning: the skips of a U-Net scaled by a line from its bottom to its top (Ma et al. 2024, arXiv 2402.15170).

Nothing is trained. Factors below 1 at the bottom help samplers of few steps, and one-step students. The two ends are
searched together on a small grid, for the number of steps at hand; all candidates share noise and classes.

Expected (EDM on ImageNet-64, FID; the abstract): 1.75 at 19 network calls, about half of the untuned value, 1.57 at 39.
Not reproduced here yet.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen.errors import GenError
from gen.experiments._search import controls_of, process_of, scorer, tunable
from gen.features.extractor import Extractor
from gen.metrics.reference import Reference
from gen.runs import Loaded
from gen.sampling.grids import Searched
from gen.sampling.search import write_grid

__all__ = ["BOTTOMS", "TOPS", "per_concat", "skips_of", "tune"]

BOTTOMS = tuple(np.round(np.arange(0.5, 1.01, 0.1), 2).tolist())
TOPS = (0.9, 1.0, 1.05)


def per_concat(count: int, bottom: float, top: float) -> np.ndarray:
    """Gives (count,) factors on a line, one for each skip in the order of use: the deepest first."""
    return np.linspace(bottom, top, count)


def skips_of(loaded: Loaded) -> int:
    """Gives the number of a run's skips.

    Raises GenError for a network without skips, and for a run that no solver samples.
    """
    known = controls_of(tunable(loaded), loaded.params["net"])
    if "skips" not in known:
        raise GenError(f"the network of {loaded.path} has no skips to tune; give a run of a U-Net")
    return known["skips"][0]


def tune(
    loaded: Loaded,
    reference: Reference,
    extractor: Extractor,
    out: Path,
    *,
    bottoms: Sequence[float] = BOTTOMS,
    tops: Sequence[float] = TOPS,
    count: int = 600,
    final_count: int = 1797,
    batch: int = 256,
    mesh: Any = None,
) -> dict[str, float]:
    """Searches the ends of the line on the run's own grid, writes it with the factors to `out`, and gives distances.

    ``tuned`` and ``plain`` are of other seeds than those of the search.

    Raises GenError for a network without skips, and for nothing to search.
    """
    skips, generator = skips_of(loaded), tunable(loaded)
    if not bottoms or not tops:
        raise GenError("a search over no ends of the line; give some bottoms and tops")
    steps, process = generator.sampler.steps, process_of(generator)
    times = generator.sampler.times(generator.denoiser.process).times

    def rows(bottom: float, top: float) -> dict[str, np.ndarray]:
        return {"skips": np.tile(per_concat(skips, bottom, top).astype(np.float32), (steps, 1))}

    settings = {"steps": steps, "controls": rows(1.0, 1.0), "batch": batch, "mesh": mesh}
    quick = scorer(loaded, reference, extractor, count=count, **settings)
    sure = scorer(loaded, reference, extractor, count=final_count, first_seed=count, **settings)
    scores = {ends: quick(times, rows(*ends)) for ends in itertools.product(bottoms, tops)}
    best = min(scores, key=lambda ends: scores[ends])
    found = {"tuned": sure(times, rows(*best)), "plain": sure(times, rows(1.0, 1.0))}
    line = tuple(tuple(row.tolist()) for row in rows(*best)["skips"])
    about = {"model": loaded.origin, "bottom, top": list(best), "distances": found, "scored": len(scores)}
    write_grid(out, Searched(tuple(np.asarray(times).tolist()), process, (("skips", line),)), about)
    return found
