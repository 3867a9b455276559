"""Run-time controls of a denoiser: constant ones, those of each step, and under another process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.process import EDM, Linear
from gen.errors import GenError
from gen.sampling.grids import Grid, Karras
from gen.sampling.integrate import Problem, integrate
from gen.sampling.solvers import Euler, Heun

DENOISER = Denoiser(SongUNetConfig(4, width=8, mult=(1, 2), emb=1, blocks=1, attention=()), EDM(), EDMPrecondition())
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


@pytest.fixture(scope="module")
def params():
    leaves, tree = jax.tree.flatten(DENOISER.net.init(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def skips(params):
    """How many skips the network scales."""
    return DENOISER.net.apply(params, method="controls")["skips"]


def test_skip_scales_of_every_step_without_recompiling(params, skips):
    """Both calls of a step of Heun's method take the step's own entry."""
    grid, traces = Karras(sigma_max=2.0)(EDM(), 3), []

    @jax.jit
    def sample(scales, constant):
        traces.append(1)
        denoise = DENOISER.bind(params, {"skips": constant}, {} if scales is None else {"skips": scales})
        return integrate(Heun(), Problem(denoise, X, grid, None, {}))

    @jax.jit
    def by_hand(scales):
        x, t = X, jnp.asarray(grid.times, jnp.float32)
        for i in range(3):
            slope = DENOISER(params, x, t[i], {}, controls={"skips": scales[i]}).velocity
            point = x + (t[i + 1] - t[i]) * slope
            if i < 2:
                slope = (slope + DENOISER(params, point, t[i + 1], {}, controls={"skips": scales[i]}).velocity) / 2
            x = x + (t[i + 1] - t[i]) * slope
        return x

    ones, rising = jnp.ones(skips), jnp.linspace(0.5, 1.5, 3 * skips[0]).reshape(3, *skips)
    for scales in (rising, jnp.ones_like(rising)):
        np.testing.assert_allclose(sample(scales, ones), by_hand(scales), rtol=1e-4, atol=1e-4)
    assert len(traces) == 1
    constant = sample(None, 0.7 * ones)
    np.testing.assert_allclose(constant, by_hand(jnp.full_like(rising, 0.7)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_denoiser_under_another_process_offers_the_same(params, skips):
    controls, t = {"skips": jnp.linspace(0.5, 1.5, skips[0])}, jnp.float32(0.6)
    seen = DENOISER.under(Linear())
    plain, bound = (seen.bind(params, c)(X, t, {}, jnp.int32(0), ())[0].denoised for c in (None, controls))
    own = DENOISER(params, X / 0.4, 0.6 / 0.4, {}, controls=controls).denoised
    np.testing.assert_allclose(bound, own, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(bound) - np.asarray(plain)).max() > 1e-3
    assert DENOISER.under(EDM()) is DENOISER


def test_steps_and_entries_agree(params):
    grid = Grid(np.array([2.0, 1.0, 0.0]), EDM(), extras={"skips": jnp.ones((3, 2))})
    with pytest.raises(GenError, match="'skips' is for 3 steps; expected one entry for each of 2"):
        integrate(Euler(), Problem(DENOISER.bind(params), X, grid, None, {}))
