"""EDM's importer where published files do not reach: resampling filters and chains of other numbers."""

import jax
import numpy as np
import pytest

from gen.diffusion.backbones.edm_unet import SongUNetConfig
from gen.diffusion.ddpm import DDPM
from gen.nn.network import Network
from gen.pretrained import edm
from gen.sampling.edm_samplers import ablation_sampler


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (2, 3, 3, 2), (1, 5, 10, 10, 5, 1)])
def test_filters_are_read_off_the_file(taps: tuple[int, ...]) -> None:
    config = SongUNetConfig(8, width=8, mult=(1, 1), blocks=1, emb=1, attention=(), encoder="skip", taps=taps)
    weights = edm.IMPORTER.save(config, Network(config).init(jax.random.key(0)))
    assert edm.IMPORTER.infer(weights) == config


def test_chains_of_other_numbers() -> None:
    """u_(j-1)^2 + 1 = (u_j^2 + 1) / max(abar(j - 1) / abar(j), C_1), abar(j) = sin^2(pi j / (2 M (1 + C_2)))."""
    steps, c_1, c_2 = 50, 0.02, 0.05
    abar = np.sin(0.5 * np.pi * np.arange(steps + 1) / steps / (1.0 + c_2)) ** 2
    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1.0) / max(abar[j - 1] / abar[j], c_1) - 1.0)
    denoiser = edm.precondition("iDDPMPrecond", SongUNetConfig(), M=steps, C_1=c_1, C_2=c_2)
    np.testing.assert_allclose(edm.levels(denoiser), u, rtol=1e-9, atol=1e-12)
    assert isinstance(denoiser.process, DDPM)
    sampler = ablation_sampler(6, discretization="iddpm", M=steps, C_1=c_1, C_2=c_2)
    grid = sampler.times(sampler.process)
    known = u[(u >= 0.002) & (u <= 81.0)]
    picked = known[np.round(np.arange(6) * (len(known) - 1) / 5).astype(int)]
    np.testing.assert_allclose(grid.sigma[:-1] / grid.alpha[:-1], picked, rtol=1e-9)
