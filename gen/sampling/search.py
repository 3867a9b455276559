"""AutoDiffusion: an evolutionary search of the time steps of a sampler, and of the layers that run at each of them.

Li et al. 2023, arXiv 2309.10438: with few steps a uniform grid is far from the best one, and no training is needed to
find a better. A candidate is K distinct times of a pool and, for each, the layers that are left out. Each generation
keeps the best candidates ever seen as parents and makes mutations, crossovers and fresh random ones. The score is what
the caller measures (a Frechet distance of few samples, on the same noise for all candidates); lower is better.

Differences from the official code, whose slips are not repeated: genes are kept in order with their layers attached, so
that equal sets are one candidate and layers act at the step that they were drawn for; mutation changes layers too; a
crossover that repeats a step draws another.

The times and layers of a candidate are arrays of the sampler's program (`GridGenerator`), which is compiled once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gen.config import from_json, suggest, to_json
from gen.errors import GenError
from gen.files import read_json, write_json
from gen.nn.conditions import Conditions
from gen.nn.network import Cond
from gen.sampling.generator import DiffusionGenerator, GeneratorParams
from gen.sampling.grids import Grid, Searched

__all__ = ["Candidate", "Evolution", "GridGenerator", "SearchSpace", "evolve", "read_grid", "write_grid"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A point of a `SearchSpace`.

    Attributes:
      steps: K distinct places in the pool of times, falling: noise end first.
      left_out: for each step the layers that do not run, rising.
    """

    steps: tuple[int, ...]
    left_out: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """What is searched.

    Attributes:
      pool: (N,) times on the sampled process, rising; a candidate evaluates K of them.
      steps: K.
      layers: number of layers that can be left out; 0 to search times alone.
      most: greatest share of the layers that a step leaves out.
      budget: greatest number of layers that run, over all steps; 0 for no limit.

    Raises GenError for more steps than times, all layers left out, and a budget that is too small.
    """

    pool: tuple[float, ...]
    steps: int
    layers: int = 0
    most: float = 0.0
    budget: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= len(self.pool):
            raise GenError(f"a search over {self.steps} of {len(self.pool)} times; give 1 to {len(self.pool)} steps")
        if not 0.0 <= self.most < 1.0 or (self.most and not self.layers):
            raise GenError(f"a search that leaves out {self.most:.0%} of {self.layers} layers; give a share below 1")
        least = self.steps * (self.layers - int(self.most * self.layers))
        if self.budget and self.budget < least:
            raise GenError(f"a budget of {self.budget} layers; {self.steps} steps run at least {least} of them")

    @property
    def uniform(self) -> Candidate:
        """Gives evenly spaced steps that run everything."""
        places = np.round(np.linspace(len(self.pool) - 1, 0, self.steps + 1)[:-1]).astype(int)
        return Candidate(tuple(places.tolist()), ((),) * self.steps)

    def drawn(self, rng: np.random.Generator, layers: bool) -> Candidate:
        """Gives a random candidate; with `layers` some are left out of each step."""
        steps = rng.choice(len(self.pool), self.steps, replace=False)
        return self._fitting(rng, [(int(i), self._layers(rng) if layers else ()) for i in steps])

    def mutated(self, rng: np.random.Generator, parent: Candidate, share: float, layers: bool) -> Candidate:
        """Gives the parent with each step, and each step's layers, drawn anew with probability `share`."""
        free = [int(i) for i in rng.permutation(len(self.pool)) if i not in parent.steps]
        genes = []
        for step, out in zip(parent.steps, parent.left_out, strict=True):
            moved = free.pop() if free and rng.random() < share else step
            genes.append((moved, self._layers(rng) if layers and rng.random() < share else out))
        return self._fitting(rng, genes)

    def crossed(self, rng: np.random.Generator, a: Candidate, b: Candidate) -> Candidate:
        """Gives at each place the step of one of two candidates, with its layers; a repeated step is drawn anew."""
        sides = rng.random(self.steps) < 0.5
        pairs = [tuple(zip(c.steps, c.left_out, strict=True)) for c in (a, b)]
        genes: dict[int, tuple[int, ...]] = {}
        for first, second, side in zip(*pairs, sides, strict=True):
            step, out = first if side else second
            while step in genes:
                step = int(rng.integers(len(self.pool)))
            genes[step] = out
        return self._fitting(rng, list(genes.items()))

    def _layers(self, rng: np.random.Generator) -> tuple[int, ...]:
        count = int(rng.uniform(0.0, self.most) * self.layers)
        return tuple(sorted(rng.choice(self.layers, count, replace=False).tolist()))

    def _fitting(self, rng: np.random.Generator, genes: list[tuple[int, tuple[int, ...]]]) -> Candidate:
        """The candidate of these genes, in order; over the budget, further layers are left out at random."""
        genes = sorted(genes, reverse=True)
        out = [set(layers) for _, layers in genes]
        cap = int(self.most * self.layers)
        while self.budget and sum(self.layers - len(o) for o in out) > self.budget:
            i = int(rng.choice([i for i, o in enumerate(out) if len(o) < cap]))
            out[i].add(int(rng.choice([layer for layer in range(self.layers) if layer not in out[i]])))
        return Candidate(tuple(step for step, _ in genes), tuple(tuple(sorted(o)) for o in out))

    def times(self, candidate: Candidate) -> np.ndarray:
        """Gives (K + 1,) float64 times, which end at clean data."""
        return np.append(np.asarray(self.pool, np.float64)[list(candidate.steps)], 0.0)

    def runs(self, candidate: Candidate) -> np.ndarray:
        """Gives (K, layers) bool: which layers run."""
        runs = np.ones((self.steps, self.layers), bool)
        for row, out in zip(runs, candidate.left_out, strict=True):
            row[list(out)] = False
        return runs


@dataclasses.dataclass(frozen=True)
class Evolution:
    """The algorithm's numbers; by default those of the paper's search on ImageNet-64 at 4 steps.

    Attributes:
      population: candidates of the first generation, and of each later one at least as many.
      generations: how many.
      parents: the best ever seen, which later ones are made of.
      mutations, crossovers: children of each generation; fresh random candidates fill it up.
      share: probability that a gene mutates.
      layers_from: the generation from which layers are left out; before, times alone are searched.
      seed: of all draws.

    Raises GenError for counts that are not positive, and a share of mutations outside (0, 1].
    """

    population: int = 50
    generations: int = 10
    parents: int = 10
    mutations: int = 25
    crossovers: int = 15
    share: float = 0.25
    layers_from: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        children = self.mutations + self.crossovers
        if min(self.population, self.generations, self.parents) < 1 or children > self.population:
            raise GenError(f"{self} does not evolve; counts are positive, and children are no more than the population")
        if not 0.0 < self.share <= 1.0:
            raise GenError(f"genes mutate with probability {self.share}; give a number in (0, 1]")


def evolve(
    space: SearchSpace,
    settings: Evolution,
    score: Callable[[Candidate], float],
    path: Path | None = None,
    say: Callable[[int, Candidate, float], None] | None = None,
) -> list[tuple[Candidate, float]]:
    """Gives all candidates that were scored, best first.

    Args:
      score: measures a candidate; it is called once for each.
      path: a JSON file of what was scored. A search that was interrupted goes on from it, as one that was not.
      say: is told of the best candidate after each generation.

    Raises GenError where the file is of another search.
    """
    search = {"space": _plain(space), "settings": _plain(settings)}
    known = _read(path, search)
    best: list[tuple[Candidate, float]] = []
    everyone: dict[Candidate, float] = {}
    for generation in range(settings.generations):
        rng = np.random.default_rng((settings.seed, generation))
        layers = space.most > 0.0 and generation >= settings.layers_from
        for candidate in _generation(space, settings, rng, [c for c, _ in best], everyone, layers):
            if candidate not in known:
                known[candidate] = float(score(candidate))
                _write(path, search, known)
            everyone[candidate] = known[candidate]
        best = sorted(everyone.items(), key=lambda row: row[1])[: settings.parents]
        if say is not None:
            say(generation, *best[0])
    return sorted(everyone.items(), key=lambda row: row[1])


def _generation(
    space: SearchSpace,
    settings: Evolution,
    rng: np.random.Generator,
    parents: list[Candidate],
    seen: Mapping[Candidate, float],
    layers: bool,
) -> list[Candidate]:
    """New candidates; a small space may have fewer than are asked for."""
    made: dict[Candidate, None] = {}

    def add(count: int, make: Callable[[], Candidate]) -> None:
        goal = len(made) + count
        for _ in range(10 * count):
            if len(made) >= goal:
                break
            candidate = make()
            if candidate not in seen:
                made[candidate] = None

    if not parents:
        made[space.uniform] = None
        add(settings.population // 2, lambda: space.drawn(rng, layers))
        add(settings.population - len(made), lambda: space.mutated(rng, space.uniform, 0.1, layers))
    else:

        def pick() -> Candidate:
            return parents[int(rng.integers(len(parents)))]

        add(settings.mutations, lambda: space.mutated(rng, pick(), settings.share, layers))
        add(settings.crossovers, lambda: space.crossed(rng, pick(), pick()))
    add(settings.population - len(made), lambda: space.drawn(rng, layers))
    return list(made)


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON keeps them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(value).items()}


def _read(path: Path | None, search: Mapping[str, Any]) -> dict[Candidate, float]:
    if path is None or not path.exists():
        return {}
    held = read_json(path)
    if {key: held.get(key) for key in search} != dict(search):
        raise GenError(f"{path} holds another search; give another folder, or the settings that it was begun with")
    return {Candidate(tuple(s), tuple(tuple(o) for o in out)): value for s, out, value in held["scored"]}


def _write(path: Path | None, search: Mapping[str, Any], known: Mapping[Candidate, float]) -> None:
    if path is not None:
        rows = [[list(c.steps), [list(o) for o in c.left_out], value] for c, value in known.items()]
        write_json(path, {**search, "scored": rows})


@dataclasses.dataclass(frozen=True)
class GridGenerator:
    """A `DiffusionGenerator` whose grid is an argument: ``params["grid"]`` holds ``times`` (K + 1,) and, by name under
    ``controls``, arrays (K, ...) of the network.

    Attributes:
      generator: what is sampled; its own grid is not used.
      steps: K.
    """

    generator: DiffusionGenerator
    steps: int

    @property
    def nfe(self) -> int | None:
        """Gives the network calls of the solver on K steps."""
        return dataclasses.replace(self.generator, sampler=self._sampler(None, {})).nfe

    @property
    def shape(self) -> tuple[int, ...]:
        """Gives the generator's shape."""
        return self.generator.shape

    @property
    def conditions(self) -> Conditions:
        """Gives the generator's conditions."""
        return self.generator.conditions

    @property
    def networks(self) -> Mapping[str, Any]:
        """Gives the generator's networks."""
        return self.generator.networks

    def _sampler(self, times: Any, extras: Mapping[str, Any]) -> Any:
        def grid(process: Any, steps: int) -> Grid:
            own = process.at(np.linspace(1.0, 0.0, steps + 1)) if times is None else times
            return Grid(own, process, extras=extras)

        return dataclasses.replace(self.generator.sampler, grid=grid, steps=self.steps)

    def __call__(self, params: GeneratorParams, keys: jax.Array, cond: Cond) -> jax.Array:
        """Does what `Generator.__call__` says."""
        grid = params["grid"]
        sampler = self._sampler(grid["times"], grid.get("controls", {}))
        own = {role: arrays for role, arrays in params.items() if role != "grid"}
        return dataclasses.replace(self.generator, sampler=sampler)(own, keys, cond)


def write_grid(path: Path, grid: Searched, about: Mapping[str, Any]) -> None:
    """Writes a grid for ``gen sample --grid FILE``, with what is said of it."""
    write_json(path, {"grid": to_json(grid), "about": dict(about)})


def read_grid(path: Path, controls: Mapping[str, Sequence[int]]) -> Searched:
    """Gives the grid of a file that `write_grid` wrote.

    Args:
      controls: shapes of the arrays that the sampled network takes, by name.

    Raises GenError for another file, and for a grid whose arrays are of another network.
    """
    held = read_json(path)
    if not isinstance(held, Mapping) or "grid" not in held:
        raise GenError(f"{path} holds no grid; give a file that gen search wrote, or one of gen list grid")
    grid = from_json(held["grid"], Any, str(path))
    if not isinstance(grid, Searched):
        raise GenError(f"{path} holds a {type(grid).__name__}, no grid; give a file that gen search wrote")
    for name, rows in grid.controls:
        if name not in controls:
            known = suggest(name, controls) if controls else "this network has none"
            raise GenError(f"{path} is for another model: its network knows no layers called '{name}'; {known}")
        if any(len(row) != controls[name][0] for row in rows):
            raise GenError(
                f"{path} is for another model: '{name}' has {len(rows[0])} entries a step, this network "
                f"{controls[name][0]}; search on this model"
            )
    return grid
