"""What searches over a trained model's sampler share: a score of times and controls, on the same noise for all."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gen.config import fingerprint, to_json
from gen.diffusion.ddpm import DDPM
from gen.errors import GenError
from gen.features.extractor import Extractor
from gen.metrics.evaluate import Settings, evaluate
from gen.metrics.frechet import frechet_distance
from gen.metrics.onepass import collect
from gen.metrics.protocol import Result
from gen.metrics.reference import Reference
from gen.metrics.sources import LABEL_RULES, generated
from gen.metrics.statistics import Moments, finalised
from gen.nn.conditions import class_count
from gen.runs import Loaded
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Explicit
from gen.sampling.search import GridGenerator
from gen.sampling.solvers import Euler

__all__ = ["Score", "controls_of", "pool_of", "process_of", "scored", "scorer", "tunable"]

Score = Callable[[np.ndarray, Mapping[str, np.ndarray]], float]  # times (K + 1,), controls by name (K, ...) -> distance
_STATISTICS = {"moments": Moments()}


def scored(
    loaded: Loaded,
    reference: Reference,
    extractor: Extractor,
    seeds: range,
    *,
    settings: Settings = Settings(),
    batch: int = 256,
    mesh: Any = None,
    partial: Path | None = None,
) -> Result:
    """Gives the scores of a run's samples of these seeds, balanced over the classes.

    Args:
      partial: where partial results are kept, so that a killed evaluation goes on.
    """
    generator = loaded.generator
    number = class_count(generator.conditions)
    labels = None if number is None else LABEL_RULES["seed mod classes"](seeds, number)
    identity = f"{fingerprint(loaded.config)} step {loaded.step} {loaded.weights}"
    images = generated(
        generator, loaded.params, seeds=seeds, identity=identity, labels=labels, classes=number, rule="seed mod classes"
    )
    about = {
        "name": str(loaded.path),
        "weights": loaded.weights,
        "nfe": str(generator.nfe),
        "sampler": json.dumps(to_json(loaded.config.sampler)),
    }
    return evaluate(images, reference, extractor, settings, batch=batch, mesh=mesh, partial=partial, subject=about)


def tunable(loaded: Loaded) -> DiffusionGenerator:
    """Gives a run's generator as one with a solver and a grid: a one-step student is an Euler step from its time to 0.

    Raises GenError for a run that no solver samples.
    """
    generator = loaded.generator
    model = loaded.config.exported().get("net")
    if model is not None and len(model.times) == 1 and not isinstance(generator, DiffusionGenerator):
        if model.noise_scale is not None:
            raise GenError(f"{loaded.path} starts from noise of its own scale, as no solver does; give another run")
        sampler = Sampler(Euler(), Explicit((model.times[0], 0.0)), 1)
        return DiffusionGenerator(loaded.denoiser, sampler, loaded.config.tokenizer)
    if not isinstance(generator, DiffusionGenerator):
        raise GenError(f"{loaded.path} is not sampled by a solver on a grid; search on a diffusion or flow model")
    return generator


def process_of(generator: DiffusionGenerator) -> Any:
    """Gives the process that is sampled."""
    return generator.sampler.process or generator.denoiser.process


def pool_of(process: Any, count: int = 1000) -> tuple[float, ...]:
    """Gives the times that a search chooses from, rising: a chain's own, else evenly spaced up to the noise end."""
    shift = 0.5 if isinstance(process, DDPM) else 1.0
    return tuple(float(t) for t in process.at((np.arange(count) + shift) / count))


def controls_of(generator: DiffusionGenerator, params: Any) -> dict[str, tuple[int, ...]]:
    """Gives shapes of the network's controls by name."""
    found: dict[str, tuple[int, ...]] = generator.denoiser.net.apply(params, method="controls")
    return found


def scorer(
    loaded: Loaded,
    reference: Reference,
    extractor: Extractor,
    *,
    steps: int,
    count: int,
    first_seed: int = 0,
    controls: Mapping[str, np.ndarray] | None = None,
    batch: int = 256,
    mesh: Any = None,
) -> Score:
    """Gives the Frechet distance of `count` samples as a function of a grid's times and controls.

    All calls use the same noise and balanced classes (common random numbers), and one compiled program.

    Args:
      controls: an example of the controls that calls will give; {} for none.
      first_seed: of the samples; the last ones that are reported are of other seeds than those of the search.
    """
    generator = GridGenerator(tunable(loaded), steps)
    seeds = range(first_seed, first_seed + count)
    number = class_count(generator.conditions)
    labels = None if number is None else LABEL_RULES["seed mod classes"](seeds, number)
    extras = dict(controls or {})

    def score(times: np.ndarray, given: Mapping[str, np.ndarray]) -> float:
        if set(given) != set(extras):
            raise GenError(f"controls {', '.join(given) or 'none'}; this score is of {', '.join(extras) or 'none'}")
        grid = {"times": np.asarray(times, np.float32), "controls": {k: np.asarray(v) for k, v in given.items()}}
        params = {**loaded.params, "grid": grid}
        images = generated(generator, params, seeds=seeds, identity="search", labels=labels, rule="seed mod classes")
        tally = collect(images, extractor, _STATISTICS, batch=batch, mesh=mesh)
        found = finalised(_STATISTICS, tally.accumulators)
        return frechet_distance(found["mean"], found["covariance"], reference.mean, reference.covariance)

    return score
