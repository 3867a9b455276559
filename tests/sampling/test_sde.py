"""The reverse SDE on a Gaussian mixture: marginals for every coefficient, last steps, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.process import VP, Linear
from gen.errors import GenError
from gen.sampling.grids import Uniform
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.noise import per_sample_noise, prior
from gen.sampling.sde import EulerMaruyama
from gen.sampling.solvers import Euler
from tests.sampling.mixture import denoise, distance, keys


def problem(grid, x, calls=None):
    return Problem(denoise(grid.process, calls), x, grid, per_sample_noise(keys(x.shape[0]), x.shape[1:]), {})


def solve(solver, grid, x):
    return integrate(solver, problem(grid, x))


@pytest.mark.parametrize(
    "solver",
    [
        EulerMaruyama("linear", 2.0),
        EulerMaruyama("decreasing"),
        EulerMaruyama("increasing-decreasing"),
        EulerMaruyama("constant", 0.5),
        EulerMaruyama(second_order=True),
        EulerMaruyama(last="tweedie"),
        EulerMaruyama(last="euler"),
    ],
    ids=repr,
)
def test_samples_follow_the_data_whatever_the_coefficient(solver):
    assert from_json(to_json(solver)) == solver
    grid, ks = Uniform(end=0.01)(Linear(), 250), keys(8192)
    samples = jax.jit(lambda: solve(solver, grid, prior(grid, ks, (1,))))()
    assert distance(samples) < 0.025


def test_without_noise_it_is_euler_on_the_probability_flow():
    grid = Uniform()(Linear(), 7)
    x = prior(grid, keys(3), (2,))
    np.testing.assert_allclose(solve(EulerMaruyama(norm=0.0), grid, x), solve(Euler(), grid, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("last", ["mean", "tweedie", "euler", "none"])
@pytest.mark.parametrize("second_order", [False, True])
def test_calls_and_trajectory(last, second_order):
    grid, calls = Uniform(end=0.1)(Linear(), 4), []
    if last == "none":
        grid = type(grid)(grid.times[:-1], grid.process)
    solver = EulerMaruyama(last=last, second_order=second_order)
    x = prior(grid, keys(3), (2,))
    with jax.disable_jit():
        whole = states(solver, problem(grid, x, calls)).x
    assert len(calls) == nfe(solver, grid)
    assert whole.shape == (grid.steps, 3, 2)
    np.testing.assert_allclose(whole[-1], solve(solver, grid, x), rtol=1e-5, atol=1e-5)
    again = jax.jit(lambda grid, x: states(solver, problem(grid, x)).x)(grid, x)
    np.testing.assert_allclose(again, whole, rtol=1e-4, atol=1e-4)


def test_the_last_step_adds_no_noise():
    grid = Uniform(end=0.1)(Linear(), 3)
    x = jnp.ones((1, 1))

    def at(value):
        noise = jnp.zeros(3).at[2].set(value)
        return integrate(
            EulerMaruyama(), Problem(denoise(Linear()), x, grid, lambda i: noise[i] + jnp.zeros((1, 1)), {})
        )

    np.testing.assert_array_equal(at(0.0), at(5.0))


def test_refusals():
    with pytest.raises(GenError, match="form sbdm is infinite at pure noise"):
        solve(EulerMaruyama("sbdm"), Uniform()(Linear(), 4), jnp.ones((2, 1)))
    assert np.isfinite(solve(EulerMaruyama("sbdm"), Uniform()(VP(), 20), jnp.ones((2, 1)))).all()
    with pytest.raises(GenError, match="norm -1"):
        EulerMaruyama(norm=-1.0)
