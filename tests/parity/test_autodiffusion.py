"""Searched sub-chains of a DDPM chain: the constants that the official code derives anew, and uniform sequences."""

import numpy as np
import pytest

from gen.diffusion.chain import Chain
from gen.diffusion.ddpm import DDPM
from gen.sampling.grids import Respaced, Searched, space_timesteps
from tests.parity.conftest import Fixture, fixtures

TABLES = {
    "betas": "beta",
    "alphas_cumprod": "abar",
    "alphas_cumprod_prev": "abar_prev",
    "posterior_variance": "variance",
    "posterior_log_variance_clipped": "log_variance",
    "posterior_mean_coef1": "mean_data",
    "posterior_mean_coef2": "mean_keep",
}


@pytest.mark.parametrize("fx", fixtures("autodiffusion-respacing*"), ids=str)
def test_constants_of_a_sequence(fx: Fixture) -> None:
    process = DDPM(fx.config["schedule"], len(fx.io["betas_full"]))
    fx.close(process.betas, "betas_full")
    for k, sequence in enumerate(fx.config["sequences"]):
        falling = sorted(sequence, reverse=True)
        times = (*(float(process.time(np.float64(i))) for i in falling), 0.0)
        grid = Searched(times, process)(process, len(sequence))
        # the solver's own chain is that of the grid's times: the network gets the original indices
        kept = tuple(np.round(process.index(grid.times[:-1])).astype(int)[::-1].tolist())
        np.testing.assert_array_equal(kept, fx.io[f"seq{k}_timestep_map"])
        chain = Chain(process, kept)
        for official, ours in TABLES.items():
            fx.close(chain.tables[ours], f"seq{k}_{official}")
        fx.close(grid.alpha[:-1][::-1] ** 2, f"seq{k}_alphas_cumprod")


@pytest.mark.parametrize("fx", fixtures("autodiffusion-respacing*"), ids=str)
def test_uniform_sequences(fx: Fixture) -> None:
    for name in (name for name in fx.io if name.startswith("space_")):
        spec = name.removeprefix("space_").replace("_", ",")
        found = space_timesteps(1000, spec)
        fx.close(found, name)
        grid = Respaced(spec)(DDPM(), len(found))
        np.testing.assert_allclose(DDPM().index(grid.times[:-1])[::-1], fx.io[name])
