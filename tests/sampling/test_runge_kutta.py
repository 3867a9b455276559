"""Fixed-step Runge-Kutta methods: order on a velocity with a closed solution, calls, and likelihoods by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.prediction import Prediction
from gen.diffusion.process import Linear
from gen.errors import GenError
from gen.sampling.grids import Grid, Uniform
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.likelihood import bits_per_dimension, log_likelihood, rademacher
from gen.sampling.runge_kutta import RungeKutta
from tests.sampling.mixture import keys

METHODS = [RungeKutta("midpoint"), RungeKutta("trapezoid"), RungeKutta("rk4")]


def growing(x, t, cond, step, carry):
    """dx / dt = (1 + 2 t) x: x(t) = x(0) exp(t + t^2); defined at both ends."""
    return Prediction((1.0 + 2.0 * t) * x, x, t, {}, Linear(), "velocity"), carry + 1


@pytest.mark.parametrize("solver", METHODS, ids=repr)
def test_order_and_calls(solver):
    with jax.enable_x64(True):
        x, errors = jnp.ones((2, 3), jnp.float64), []
        for steps in (8, 16, 32):
            grid = Uniform()(Linear(), steps)
            out = jax.jit(lambda x, grid=grid: states(solver, Problem(growing, x, grid, None, {}, 0)).x)(x)
            assert out.shape == (steps, 2, 3)
            errors.append(float(jnp.abs(out[-1] - np.exp(-2.0)).max()))
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert rates.min() > solver.order - 0.2, f"errors {errors}, orders {rates}"
    assert nfe(solver, grid) == 32 * {"midpoint": 2, "trapezoid": 2, "rk4": 4}[solver.method]


def test_likelihood_of_a_gaussian():
    """Data N(m, d^2) under the linear flow: the velocity is affine, so that the divergence needs no luck."""
    mean, deviation, process = 0.3, 0.7, Linear()

    def denoise(x, t, cond, step, carry):
        a, s = process.alpha(t), process.sigma(t)
        variance = (a * deviation) ** 2 + s**2
        data = mean + a * deviation**2 / variance * (x - a * mean)
        eps = s / variance * (x - a * mean)
        return Prediction(eps - data, x, t, {}, process, "velocity"), carry

    x = jnp.array([[[0.1, -0.4], [0.9, 0.3]], [[1.5, 0.0], [0.3, 0.3]]])
    grid = Grid(np.linspace(0.0, 1.0, 41), process)

    def likelihood(x):
        problem = Problem(denoise, x, grid, rademacher(keys(2), x.shape[1:]), {})
        return log_likelihood(problem, functools.partial(integrate, RungeKutta("rk4")))

    found, latent = jax.jit(likelihood)(x)
    exact = -0.5 * (jnp.square((x - mean) / deviation) + np.log(2 * np.pi * deviation**2)).sum((1, 2))
    np.testing.assert_allclose(found, exact, rtol=1e-4)
    np.testing.assert_allclose(latent, (x - mean) / deviation, rtol=1e-3, atol=1e-4)


def test_bits_per_dimension():
    """A uniform density on [-1, 1] knows nothing of 256 levels: 8 bits."""
    np.testing.assert_allclose(bits_per_dimension(jnp.array([12 * np.log(0.5)]), 12), [8.0], rtol=1e-6)


def test_signs_depend_on_their_own_key_and_step():
    probe = rademacher(keys(4), (3, 5))
    assert set(np.unique(probe(0))) == {-1.0, 1.0}
    assert not np.array_equal(probe(0), probe(1))
    np.testing.assert_array_equal(rademacher(keys(4)[2:], (3, 5))(0), probe(0)[2:])


def test_unknown_method():
    with pytest.raises(GenError, match="unknown Runge-Kutta method 'heun'; known: midpoint, trapezoid, rk4"):
        RungeKutta("heun")
