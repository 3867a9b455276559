"""The evolutionary search: its operators, that it finds what is best and goes on, its grids and their files."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import EDM, Linear
from gen.errors import GenError
from gen.nn.network import Network
from gen.sampling.generator import DiffusionGenerator, Sampler
from gen.sampling.grids import Searched
from gen.sampling.search import Candidate, Evolution, GridGenerator, SearchSpace, evolve, read_grid, write_grid
from gen.sampling.solvers import Heun

POOL = tuple(float(t) for t in np.arange(1, 101) / 100)
SPACE = SearchSpace(POOL, 3, layers=6, most=0.5, budget=14)
SMALL = Evolution(20, 6, 5, 10, 5, layers_from=1)


def distance(candidate: Candidate) -> float:
    """Best at the times 0.9, 0.4, 0.2, with layer 2 left out of each step."""
    times = SPACE.times(candidate)[:-1]
    return float(np.abs(times - [0.9, 0.4, 0.2]).sum() + 0.1 * SPACE.runs(candidate)[:, 2].sum())


def test_operators_stay_in_the_space() -> None:
    rng = np.random.default_rng(0)
    candidates = [SPACE.uniform, *(SPACE.drawn(rng, True) for _ in range(20))]
    for _ in range(100):
        a, b = (candidates[int(rng.integers(len(candidates)))] for _ in range(2))
        candidates += [SPACE.mutated(rng, a, 0.5, True), SPACE.crossed(rng, a, b)]
    for c in candidates[1:]:
        assert len(set(c.steps)) == 3
        assert list(c.steps) == sorted(c.steps, reverse=True)
        assert all(len(out) <= 3 and list(out) == sorted(set(out)) for out in c.left_out)
    assert all(SPACE.runs(c).sum() <= 14 for c in candidates[1:21])
    assert SPACE.uniform.steps == (99, 66, 33)
    # layers stay with the step that they were drawn for
    parent = Candidate((90, 50, 10), ((1, 4), (2,), (3,)))
    for c in (SPACE.crossed(rng, parent, parent) for _ in range(5)):
        assert c == parent


def test_finds_what_is_best_and_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[Candidate] = []

    def score(candidate: Candidate) -> float:
        calls.append(candidate)
        return distance(candidate)

    whole = evolve(SPACE, SMALL, score, tmp_path / "whole.json")
    assert len(set(calls)) == len(calls)  # none is scored twice
    assert whole[0][1] < 0.5 * distance(SPACE.uniform)
    assert whole[0][1] == min(distance(c) for c in calls)

    def interrupted(candidate: Candidate) -> float:
        if len(calls) == 40:
            raise KeyboardInterrupt
        return score(candidate)

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evolve(SPACE, SMALL, interrupted, tmp_path / "part.json")
    assert evolve(SPACE, SMALL, score, tmp_path / "part.json") == whole
    with pytest.raises(GenError, match="holds another search"):
        evolve(SPACE, Evolution(20, 5, 5, 10, 5), score, tmp_path / "part.json")


NET = DiTConfig((4,), 2, 1, 8, 2, 2, num_classes=0, remat="none", scan=False)


def test_one_program_serves_all_candidates_and_agrees_with_the_grid() -> None:
    """Times and layers are arguments; the grid of a file gives the same samples."""
    leaves, tree = jax.tree.flatten(Network(NET).init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])
    base = DiffusionGenerator(Denoiser(NET, Linear()), Sampler(Heun(), steps=7))
    generator, traces = GridGenerator(base, 2), []

    @jax.jit
    def call(params, keys):
        traces.append(1)
        return generator(params, keys, {})

    keys, seen = jax.random.split(jax.random.key(2), 3), []
    for times, runs in (((1.0, 0.5, 0.0), ((1.0, 1.0), (1.0, 1.0))), ((1.0, 0.3, 0.0), ((0.0, 1.0), (1.0, 0.0)))):
        arrays = {"times": np.asarray(times, np.float32), "controls": {"blocks": np.asarray(runs, np.float32)}}
        found = call({"net": params, "grid": arrays}, keys)
        grid = Searched(times, Linear(), (("blocks", runs),))
        plain = DiffusionGenerator(base.denoiser, Sampler(Heun(), grid, 2))({"net": params}, keys, {})
        np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)
        seen.append(np.asarray(found))
    assert len(traces) == 1
    assert np.abs(seen[0] - seen[1]).max() > 1e-2
    assert generator.nfe == 3


def test_files_of_grids(tmp_path: Path) -> None:
    grid = Searched((1.0, 0.3, 0.0), Linear(), (("blocks", ((0.0, 1.0), (1.0, 1.0))),))
    path = tmp_path / "grid.json"
    write_grid(path, grid, {"model": "m"})
    assert read_grid(path, {"blocks": (2,)}) == grid
    assert grid(Linear(), 2).extras["blocks"].shape == (2, 2)
    with pytest.raises(GenError, match="for another model: 'blocks' has 2 entries a step, this network 3"):
        read_grid(path, {"blocks": (3,)})
    with pytest.raises(GenError, match="knows no layers called 'blocks'"):
        read_grid(path, {"keep": (2,)})
    with pytest.raises(GenError, match="was searched on the process Linear"):
        grid(EDM(), 2)
    with pytest.raises(GenError, match="has 2 steps and 3 were asked"):
        grid(Linear(), 3)
    path.write_text("{}")
    with pytest.raises(GenError, match="holds no grid"):
        read_grid(path, {})


def test_bad_searches_are_refused() -> None:
    with pytest.raises(GenError, match="over 200 of 100 times"):
        SearchSpace(POOL, 200)
    with pytest.raises(GenError, match="leaves out 50% of 0 layers"):
        SearchSpace(POOL, 3, most=0.5)
    with pytest.raises(GenError, match="3 steps run at least 9"):
        SearchSpace(POOL, 3, layers=6, most=0.5, budget=8)
    with pytest.raises(GenError, match="does not evolve"):
        Evolution(population=10)
    with pytest.raises(GenError, match="probability 0"):
        Evolution(share=0.0)
