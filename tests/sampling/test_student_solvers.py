"""Solvers of distilled students, on a student that knows the sample of every point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.cosine import Cosine
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, Linear
from gen.sampling.grids import Karras, Uniform
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.noise import per_sample_noise, prior
from gen.sampling.student_solvers import Anchored, Backstep
from tests.sampling.mixture import keys

SAMPLE = 0.7
GRIDS = [Uniform()(Linear(), 4), Uniform()(Cosine(), 4), Karras()(EDM(), 4)]
SOLVERS = [Anchored(), Anchored(second_order=True), Backstep()]


def problem(grid, count=4):
    def denoise(x, t, cond, step, carry):
        return Prediction(jnp.full_like(x, SAMPLE), x, t, {}, grid.process, "x"), carry

    ks = keys(count)
    return Problem(denoise, prior(grid, ks, (3,)), grid, per_sample_noise(ks, (3,)), {})


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("grid", GRIDS, ids=["linear", "cosine", "edm"])
def test_a_student_that_knows_its_sample_makes_it(solver, grid) -> None:
    found = jax.jit(lambda: integrate(solver, problem(grid)))()
    np.testing.assert_allclose(found, SAMPLE, atol=1e-3)
    assert from_json(to_json(solver)) == solver
    assert nfe(solver, grid) == (7 if solver == SOLVERS[1] else 4)


def test_points_on_the_way_have_the_noise_of_their_time() -> None:
    """Anchored ones the noise of the start, backsteps fresh noise: x_t = alpha x + sigma z at every time."""
    grid = Uniform()(Cosine(), 5)
    for solver, fresh in ((Anchored(), False), (Backstep(), True)):
        own = problem(grid, 4000)
        path = jax.jit(lambda s=solver, p=own: states(s, p).x)()
        start = np.asarray(own.x) / grid.sigma[0]
        for x, a, s in zip(path[:-1], grid.alpha[1:], grid.sigma[1:], strict=False):
            z = (np.asarray(x) - a * SAMPLE) / s
            assert abs(z.std() - 1.0) < 0.03
            same = np.mean(z * start)
            assert same > 0.9 if not fresh else same < 0.9
