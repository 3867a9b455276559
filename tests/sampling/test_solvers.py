"""Every registered solver on a Gaussian mixture whose exact denoiser is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import config_class, from_json, to_json
from gen.diffusion.ddpm import DDPM
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, VP, Linear, Trigonometric
from gen.errors import GenError
from gen.kinds import KINDS
from gen.sampling.grids import Explicit, Grid, Karras, Respaced, Uniform, inversion
from gen.sampling.integrate import Problem, integrate, nfe, states
from gen.sampling.multistep import DPMSolver, UniPC
from gen.sampling.noise import per_sample_noise, prior
from gen.sampling.solvers import DDIM, Ancestral, EDMStochastic, Euler, Heun, Renoise
from tests.sampling.mixture import denoise, distance, flow, keys

# these take their predictions for samples, which those of the mixture are not: see their own tests
OF_STUDENTS = ("renoise", "anchored", "backstep")
REGISTERED = [config_class(kind)() for kind in KINDS["solver"] if kind not in OF_STUDENTS]
OPTIONS = [
    DDIM(eta=0.5),
    DDIM(eta=1.0),
    Ancestral("large"),
    EDMStochastic(s_churn=20.0),
    EDMStochastic(s_churn=40.0, s_min=0.05, s_max=50.0, second_order=False),
    EDMStochastic(second_order=False),
    EDMStochastic(alpha=0.6),
    DPMSolver(1),
    DPMSolver(2, "heun"),
    DPMSolver(3),
    DPMSolver(2, stochastic=True),
    UniPC(3),
    UniPC(2, "bh1", uncorrected=(0, 1)),
]
SOLVERS = [pytest.param(s, id=repr(s)) for s in REGISTERED + OPTIONS]
FEW = [
    pytest.param(s, id=repr(s))
    for s in [*REGISTERED, EDMStochastic(s_churn=20.0), DDIM(eta=0.5), DPMSolver(3), DPMSolver(2, stochastic=True)]
]
PLACES = [(EDM(), Karras()), (DDPM(), Respaced()), (Linear(), Uniform()), (VP(), Karras())]


def problem(grid, x, call=None, carry=()):
    noise = per_sample_noise(keys(x.shape[0]), x.shape[1:])
    return Problem(call or denoise(grid.process), x, grid, noise, {}, carry)


def solve(solver, grid, x):
    return integrate(solver, problem(grid, x))


@dataclasses.dataclass(frozen=True)
class EqualLambda:
    """Equal steps in lambda = log(alpha / sigma) between levels that are neither pure noise nor clean."""

    def __call__(self, process, steps):
        return Grid(process.time_of(np.linspace(-4.0, 8.0, steps + 1)), process)


@pytest.mark.parametrize("solver", [p for p in SOLVERS if not p.values[0].stochastic])
@pytest.mark.parametrize("process", [Linear(), Trigonometric()], ids=repr)
def test_order_of_convergence(solver, process):
    """Multistep methods interpolate in lambda: their order is that between levels at which lambda is finite."""
    layout = EqualLambda() if isinstance(solver, DPMSolver | UniPC) else Uniform()
    x = np.linspace(-2.0, 2.0, 41)
    exact = flow(process, tuple(x), *(float(t) for t in layout(process, 32).times[[0, -1]]))
    with jax.enable_x64(True):
        errors = []
        for steps in (32, 64, 128):
            grid = layout(process, steps)
            out = jax.jit(lambda x, grid=grid: solve(solver, grid, x))(jnp.asarray(x)[:, None])
            assert out.dtype == jnp.float64
            errors.append(np.sqrt(np.mean((np.asarray(out)[:, 0] - exact) ** 2)))
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert rates.min() > solver.order - 0.2, f"errors {errors}, orders {rates}"


@pytest.mark.parametrize(
    ("solver", "process", "grid"),
    # each in one place, in turn, and in the others slowly
    [
        pytest.param(s, *place, id=f"{s}-{place[0]}", marks=() if i % 4 == j else pytest.mark.slow)
        for i, s in enumerate(REGISTERED)
        for j, place in enumerate(PLACES)
    ]
    + [
        pytest.param(s, *place, id=f"{s}-{place[0]}", marks=() if i % 2 == j else pytest.mark.slow)
        for i, s in enumerate(OPTIONS)
        for j, place in enumerate(PLACES[:2])
    ],
)
def test_samples_follow_the_data(solver, process, grid):
    grid, ks = grid(process, 200), keys(8192)
    samples = jax.jit(lambda: solve(solver, grid, prior(grid, ks, (1,))))()
    # 0.018 is exceeded by chance once in a hundred draws of 8192; the rest is the solvers' own error
    assert distance(samples) < 0.025


@pytest.mark.parametrize("solver", SOLVERS)
def test_calls_are_as_stated_and_never_at_clean_data(solver):
    grid, calls = Uniform()(VP(), 5), []
    with jax.disable_jit():
        integrate(solver, problem(grid, jnp.ones((2, 1)), denoise(VP(), calls)))
    assert len(calls) == nfe(solver, grid)
    assert min(calls) > 0.0
    assert calls[0] == pytest.approx(1.0)


@pytest.mark.parametrize("solver", FEW)
def test_trajectory_ends_in_the_result(solver):
    grid = Uniform()(Linear(), 6)
    x = prior(grid, keys(3), (2,))
    path = states(solver, problem(grid, x)).x
    assert path.shape == (6, 3, 2)
    np.testing.assert_allclose(path[-1], solve(solver, grid, x), rtol=1e-6)
    assert path.dtype == jnp.float32


@pytest.mark.parametrize("solver", FEW)
def test_times_may_be_searched_without_recompiling(solver):
    traces = []

    @jax.jit
    def sample(grid, x):
        traces.append(grid)
        return solve(solver, grid, x)

    for rho in (7.0, 5.0):
        grid = Karras(rho, 0.01, 20.0)(EDM(), 6)
        x = prior(grid, keys(4), (1,))
        np.testing.assert_allclose(sample(grid, x), solve(solver, grid, x), rtol=2e-3, atol=1e-3)
    assert len(traces) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_carry_is_threaded_through_every_call(solver):
    grid = Uniform()(Linear(), 4)
    inner = denoise(Linear())
    counts = []

    def counting(x, t, cond, step, carry):
        counts.append(int(carry))
        return inner(x, t, cond, step, carry + 1)

    with jax.disable_jit():
        integrate(solver, problem(grid, jnp.ones((2, 1)), counting, jnp.int32(0)))
    assert counts == list(range(nfe(solver, grid)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_configuration_round_trip(solver):
    assert from_json(to_json(solver)) == solver


def gaussian(process, mean, variance):
    """The exact denoiser of normal data."""

    def denoise(x, t, cond, step, carry):
        a, s = process.alpha(t), process.sigma(t)
        value = mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)
        return Prediction(value, x, t, {}, process, "x"), carry

    return denoise


STOCHASTIC = [s for s in REGISTERED + OPTIONS if s.stochastic]


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_weak_order_of_stochastic_solvers(solver):
    """On normal data every step is affine in x and its noise: mean and variance of the result, exactly."""
    process, mean, variance = Linear(), 0.7, 0.3
    start, end = 0.95, 0.05
    errors = []
    with jax.enable_x64(True):
        for steps in (128, 256, 512):  # churn is capped below 97
            grid = Grid(np.linspace(start, end, steps + 1), process)

            def last(x, noise, grid=grid):
                exact = gaussian(process, mean, variance)
                return integrate(solver, Problem(exact, x.reshape(1, 1), grid, lambda i: noise[i, None, None], {}))[
                    0, 0
                ]

            x = jnp.float64((1 - start) * mean)
            value, (slope, shares) = jax.jit(jax.value_and_grad(last, argnums=(0, 1)))(x, jnp.zeros(steps))
            spread = slope**2 * ((1 - start) ** 2 * variance + start**2) + jnp.sum(shares**2)
            exact = (1 - end) ** 2 * variance + end**2
            errors.append([abs(value - (1 - end) * mean), abs(spread - exact)])
    errors = np.maximum(errors, 1e-12)
    rates = np.log2(errors[:-1] / errors[1:])
    settled = errors[1:] < 1e-9  # exact, whatever the step
    assert np.where(settled, np.inf, rates).min() > 0.8, f"errors {errors}, orders {rates}"


def test_every_registered_solver_has_a_test_of_its_order():
    deterministic = {type(p.values[0]) for p in SOLVERS if not p.values[0].stochastic}
    covered = deterministic | {type(solver) for solver in STOCHASTIC}
    assert {config_class(kind) for kind in KINDS["solver"]} - covered == {config_class(kind) for kind in OF_STUDENTS}


def test_heun_is_the_edm_sampler_without_churn():
    grid = Karras()(EDM(), 8)
    x = prior(grid, keys(4), (3,))
    np.testing.assert_array_equal(solve(Heun(), grid, x), solve(EDMStochastic(), grid, x))


def test_ddim_with_full_noise_is_ancestral_with_the_small_variance():
    grid = Respaced()(DDPM(), 20)
    x = prior(grid, keys(4), (3,))
    np.testing.assert_allclose(solve(DDIM(1.0), grid, x), solve(Ancestral("small"), grid, x), rtol=2e-4, atol=2e-5)


def test_first_order_dpm_solver_is_ddim():
    """On flows with eta = 0 that is Euler's method too (any process for DDIM); the SDE is DDIM with full noise."""
    grid = Uniform()(Linear(), 7)
    x = prior(grid, keys(4), (3,))
    np.testing.assert_allclose(solve(DPMSolver(1), grid, x), solve(Euler(), grid, x), rtol=1e-4, atol=1e-5)
    grid = Respaced()(DDPM(), 20)
    for eta, stochastic in ((0.0, False), (1.0, True)):
        got = solve(DPMSolver(1, stochastic=stochastic), grid, x)
        np.testing.assert_allclose(got, solve(DDIM(eta), grid, x), rtol=1e-4, atol=1e-5)


def test_renoise_ends_in_the_prediction_and_follows_samples():
    """With D = a draw of the data, as a consistency model gives it, every step's state has the right marginal."""
    grid, draws = Uniform()(Linear(), 3), jnp.linspace(-1.0, 2.0, 4)[:, None]

    def consistency(x, t, cond, step, carry):
        return Prediction(draws + step, x, t, {}, Linear(), "x"), carry

    noise = per_sample_noise(keys(4), (1,))
    path = states(Renoise(), Problem(consistency, jnp.ones((4, 1)), grid, noise, {})).x
    for i in range(3):
        t = grid.times[i + 1]
        np.testing.assert_allclose(path[i], (1 - t) * (draws + i) + t * noise(i), rtol=1e-5, atol=1e-6)


def test_ancestral_step_against_the_chain_formulas():
    """Posterior of the spaced chain by betas (Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15)."""
    chain, kept = DDPM(), [100, 400, 900]
    abar = np.cumprod(1.0 - chain.betas)[kept]
    previous = np.append(1.0, abar[:-1])
    betas = 1.0 - abar / previous
    variance = betas * (1.0 - previous) / (1.0 - abar)
    log_small = np.log(np.append(variance[1], variance[1:]))
    raw, d = 0.3, 0.2
    grid = Explicit((*(float(chain.time(k)) for k in reversed(kept)), 0.0))(chain, 3)

    def constant(x, t, cond, step, carry):
        return Prediction(jnp.full_like(x, d), x, t, {"variance": jnp.full_like(x, raw)}, chain, "x"), carry

    x = np.float64(1.7)
    noise = np.array([0.5, -1.0, 0.7])
    draws = jnp.asarray(noise, jnp.float32)
    path = states(Ancestral("learned"), Problem(constant, jnp.full((1, 1), x), grid, lambda i: draws[i], {})).x
    for step, k in enumerate(reversed(range(3))):
        mean = betas[k] * np.sqrt(previous[k]) / (1 - abar[k]) * d
        mean += (1 - previous[k]) * np.sqrt(1 - betas[k]) / (1 - abar[k]) * x
        share = (raw + 1) / 2
        std = np.exp(0.5 * (share * np.log(betas[k]) + (1 - share) * log_small[k]))
        x = mean + (k > 0) * std * noise[step]
        np.testing.assert_allclose(path[step, 0, 0], x, rtol=1e-5)


def test_encoding_and_decoding_return_the_start():
    with jax.enable_x64(True):
        grid = Uniform()(Linear(), 800)
        x = jnp.linspace(-1.5, 1.5, 9)[:, None]
        back = inversion(grid)
        assert np.all(np.diff(back.times) > 0)
        encoded = solve(DDIM(), back, x * Linear().alpha(back.times[0]))
        decoded = solve(DDIM(), grid, encoded)
    assert np.abs(np.asarray(decoded) - np.asarray(x)).max() < 0.02
    assert np.abs(np.asarray(encoded) - np.asarray(x)).max() > 0.2


def test_a_sample_depends_on_its_own_key_alone():
    grid = Karras()(EDM(), 6)
    solver, ks = EDMStochastic(s_churn=10.0), keys(5)

    def sample(ks):
        x = prior(grid, ks, (4,))
        return integrate(solver, Problem(denoise(EDM()), x, grid, per_sample_noise(ks, (4,)), {}))

    np.testing.assert_allclose(sample(ks)[3:], sample(ks[3:]), rtol=1e-5, atol=1e-6)
    noise = per_sample_noise(ks, (4,))
    assert not np.allclose(noise(0), noise(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(eta=2.0), "eta 2"),
        (lambda: EDMStochastic(alpha=0.0), "alpha 0"),
        (lambda: EDMStochastic(s_churn=-1.0), "s_churn -1"),
        (lambda: DPMSolver(4), "order 4; expected 1 to 3"),
        (lambda: DPMSolver(3, stochastic=True), "order 3; expected 1 to 2"),
        (lambda: UniPC(0), "order 0; expected 1 or more"),
        (lambda: solve(Ancestral("learned"), Uniform()(Linear(), 2), jnp.ones((1, 1))), "predicts no variance"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(GenError, match=message):
        make()
