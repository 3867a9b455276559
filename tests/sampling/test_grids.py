"""Grids: their values, their ends, and what they refuse."""

import numpy as np
import pytest

from gen.config import config_class, from_json, to_json
from gen.diffusion.ddpm import DDPM
from gen.diffusion.process import EDM, VE, VP, EDMFamily, Linear, Trigonometric
from gen.errors import GenError
from gen.kinds import KINDS
from gen.sampling.grids import (
    ChainLevels,
    Explicit,
    Karras,
    Matched,
    Respaced,
    Searched,
    Snapped,
    Spaced,
    Uniform,
    inversion,
    space_timesteps,
)

EXAMPLES = {
    "uniform": (Uniform(shift=3.0), VP()),
    "karras": (Karras(), EDM()),
    "respaced": (Respaced(), DDPM()),
    "searched": (Searched((1.0, 0.7, 0.4, 0.2, 0.0), Linear(), (("blocks", ((1.0, 0.0),) * 4),)), Linear()),
    "explicit": (Explicit((1.0, 0.7, 0.4, 0.2, 0.0)), Linear()),
    "chain": (ChainLevels(), DDPM("cosine")),
    "spaced": (Spaced(), DDPM()),
    "matched": (Matched(Uniform(), VP()), VE(sigma_max=200.0)),
    "snapped": (Snapped(Karras(sigma_min=0.1), (0.1, 1.0, 3.0, 9.0, 20.0, 80.0)), EDM()),
}


@pytest.mark.parametrize("kind", KINDS["grid"])
def test_every_grid_falls_from_noise_to_data(kind):
    config, process = EXAMPLES[kind]
    assert isinstance(config, config_class(kind))
    grid = config(process, 4)
    assert grid.steps == 4
    assert grid.process == process
    assert isinstance(grid.times, np.ndarray)
    assert grid.times.dtype == np.float64
    assert grid.times[-1] == 0.0
    assert np.all(np.diff(grid.times) < 0)
    assert grid.sigma[-1] == 0.0
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize("process", [Linear(), Trigonometric(), VP(), DDPM(), EDM(), VE(), EDMFamily()], ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_uniform_and_karras_fit_every_process(process, steps):
    uniform = Uniform()(process, steps)
    assert uniform.steps == steps
    assert uniform.times[0] == process.t_max
    karras = Karras(sigma_min=0.02, sigma_max=50.0)(process, steps)
    np.testing.assert_allclose(karras.sigma[0] / karras.alpha[0], 50.0, rtol=1e-4)
    if steps > 1:
        np.testing.assert_allclose(karras.sigma[-2] / karras.alpha[-2], 0.02, rtol=1e-4)


def test_karras_values():
    """Karras et al. 2022, eq. 5, written out."""
    expected = [(80 ** (1 / 7) + i / 2 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(3)]
    np.testing.assert_allclose(Karras()(EDM(), 3).times, [*expected, 0.0], rtol=1e-12)
    np.testing.assert_allclose(Uniform()(EDM(), 3).times, [*expected, 0.0], rtol=1e-12)


def test_uniform_shift_moves_log_snr():
    process = Linear()
    plain, shifted = Uniform(start=0.9)(process, 8), Uniform(shift=3.0, start=0.9)(process, 8)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = 0.5 * (process.logsnr(shifted.times) - process.logsnr(plain.times))[:-1]
    np.testing.assert_allclose(change, -np.log(3.0))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("5", [0, 5, 10, 14, 19]),  # strides of 4.75, halves to even
        ("ddim5", [0, 4, 8, 12, 16]),
        ("2,3", [0, 9, 10, 14, 19]),
        ("1,1", [0, 10]),
        ("20", list(range(20))),
    ],
)
def test_space_timesteps(spec, expected):
    np.testing.assert_array_equal(space_timesteps(20, spec), expected)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Spaced("leading"), [750, 500, 250, 0]),
        (Spaced("leading", offset=1), [751, 501, 251, 1]),
        (Spaced("leading", end_point=True), [800, 600, 400, 200]),
        (Spaced("linspace"), [999, 666, 333, 0]),
        (Spaced("linspace", end_point=True), [999, 749, 500, 250]),
        (Spaced("trailing"), [999, 749, 499, 249]),
    ],
    ids=repr,
)
def test_spaced_indices(grid, expected):
    np.testing.assert_allclose(DDPM().index(grid(DDPM(), 4).times[:-1]), expected)


def test_cosine_grid_is_uniform_in_the_angle():
    grid = Matched(Uniform(), Trigonometric())(Linear(), 8)
    angles = np.arctan2(grid.sigma, grid.alpha)
    np.testing.assert_allclose(np.diff(angles), -np.pi / 16, rtol=1e-6)


def test_respaced_networks_see_original_indices():
    process = DDPM()
    grid = Respaced("ddim50")(process, 50)
    np.testing.assert_allclose(process.index(grid.times[:-1]), np.arange(980, -1, -20))
    np.testing.assert_allclose(grid.alpha[:-1] ** 2, np.cumprod(1 - process.betas)[980::-20])


def test_matched_levels_are_those_of_the_other_process():
    other, process = VP(), Trigonometric()
    grid = Matched(Uniform(), other)(process, 6)
    inner = Uniform()(other, 6)
    np.testing.assert_allclose(grid.sigma[:-1] / grid.alpha[:-1], inner.sigma[:-1] / inner.alpha[:-1])


def test_inversion_runs_from_the_first_noisy_time():
    grid = Karras()(EDM(), 5)
    np.testing.assert_array_equal(inversion(grid).times, grid.times[-2::-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform()(Linear(), 0), "0 steps"),
        (lambda: Uniform(start=0.2, end=0.5), "start > end"),
        (lambda: Uniform(start=1.5), "1 >= start"),
        (lambda: Uniform(shift=-1.0), "shift -1"),
        (lambda: Uniform()(DDPM(), 1500), "does not fall strictly"),
        (lambda: Karras()(DDPM("scaled-linear"), 20), "noise levels within the process's range"),
        (lambda: Karras(sigma_min=2.0, sigma_max=1.0), "sigma_max > sigma_min"),
        (lambda: Karras(sigma_max=200.0)(EDM(), 3), "lower the grid's noise end"),
        (lambda: Respaced()(VP(), 5), "needs the discrete ddpm process"),
        (lambda: Respaced("ddim999")(DDPM(), 999), "no integer stride"),
        (lambda: Respaced("fast")(DDPM(), 5), "not understood"),
        (lambda: Respaced()(DDPM(steps=100), 101), "between 1 and 100"),
        (lambda: Respaced("10,10")(DDPM(), 10), "has 20 steps and 10 were asked"),
        (lambda: Explicit((1.0, 0.5, 0.0))(Linear(), 3), "has 2 steps and 3"),
        (lambda: Explicit((1.0, 0.5, 0.6, 0.0))(Linear(), 3), "does not fall strictly"),
        (lambda: Explicit((1.2, 0.0))(Linear(), 1), "lower the grid's noise end"),
        (lambda: Explicit((float("nan"), 0.0))(Linear(), 1), "not finite"),
        (lambda: Explicit((1.0,))(Linear(), 0), "at least a start and an end"),
        (lambda: ChainLevels()(Linear(), 3), "needs the ddpm process"),
        (lambda: Spaced()(Linear(), 3), "needs the ddpm process"),
        (lambda: Spaced("evenly")(DDPM(), 3), "expected linspace, leading or trailing"),
        (lambda: ChainLevels(sigma_min=1.0, sigma_max=1.01)(DDPM(), 30), "levels in the range"),
        (lambda: Snapped(Karras(), (1.0, 10.0))(EDM(), 8), "does not fall strictly"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(GenError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
