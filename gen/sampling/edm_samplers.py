"""The official EDM samplers' arguments in our nouns (Karras et al. 2022; ``generate.py`` of NVlabs/edm).

Arguments keep their official names, meanings and defaults; the result is a `Sampler` (process, grid, solver,
steps), to be used on any denoiser.
"""

import math
from typing import Any, Literal

from gen.diffusion.ddpm import DDPM
from gen.diffusion.process import EDM, VE, VP, EDMFamily
from gen.sampling.generator import Sampler
from gen.sampling.grids import ChainLevels, Karras, Matched, Snapped, Uniform
from gen.sampling.solvers import EDMStochastic

__all__ = ["ablation_sampler", "edm_sampler"]

BETA_D, BETA_MIN = 19.9, 0.1  # of the published VP models


def edm_sampler(
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    net_range: tuple[float, float] = (0.0, math.inf),
    levels: tuple[float, ...] = (),
) -> Sampler:
    """Gives Heun's method with churn on the rho grid (alg. 2).

    Args:
      net_range: lowest and highest noise level of the network; the grid is clipped to it.
      levels: noise levels to which everything is rounded, for networks that know only those.
    """
    low, high = _clipped(sigma_min, sigma_max, net_range)
    solver = EDMStochastic(S_churn, S_min, _finite(S_max), S_noise)
    # the process reaches as far up as churn can lift the first level
    process = EDM(sigma_min=low, sigma_max=2.0 * high)
    return Sampler(solver, _snapped(Karras(rho, low, high), levels), num_steps, process=process)


def ablation_sampler(
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    solver: Literal["euler", "heun"] = "heun",
    discretization: Literal["vp", "ve", "iddpm", "edm"] = "edm",
    schedule: Literal["vp", "ve", "linear"] = "linear",
    scaling: Literal["vp", "none"] = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    net_range: tuple[float, float] = (0.0, math.inf),
    levels: tuple[float, ...] = (),
) -> Sampler:
    """Gives the generalised sampler of the ablations (table 1 and algorithm 3 of the appendix)."""
    vp = VP(BETA_MIN, BETA_MIN + BETA_D)
    default = {
        "vp": (_level(vp, epsilon_s), _level(vp, 1.0)),
        "ve": (0.02, 100.0),
        "iddpm": (0.002, 81.0),
        "edm": (0.002, 80.0),
    }[discretization]
    low, high = _clipped(
        default[0] if sigma_min is None else sigma_min, default[1] if sigma_max is None else sigma_max, net_range
    )
    # the VP betas that reach exactly this range
    beta_d = 2.0 * (math.log1p(low**2) / epsilon_s - math.log1p(high**2)) / (epsilon_s - 1.0)
    beta_min = math.log1p(high**2) - 0.5 * beta_d
    grid: Any = {
        "vp": Matched(Uniform(), VP(beta_min, beta_min + beta_d, t_min=epsilon_s)),
        "ve": Matched(Uniform(), VE(low, high)),
        "iddpm": Matched(ChainLevels(low, high), DDPM("cosine", M, C_2, 1.0 - C_1)),
        "edm": Karras(rho, low, high),
    }[discretization]
    process = EDMFamily(schedule, scaling, low, 2.0 * high, beta_min, beta_d)
    method = EDMStochastic(S_churn, S_min, _finite(S_max), S_noise, solver == "heun", alpha)
    return Sampler(method, _snapped(grid, levels), num_steps, process=process)


def _clipped(low: float, high: float, net_range: tuple[float, float]) -> tuple[float, float]:
    return max(low, net_range[0]), min(high, net_range[1])


def _level(process: Any, t: float) -> float:
    return float(process.sigma(t) / process.alpha(t))


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _snapped(grid: Any, levels: tuple[float, ...]) -> Any:
    return Snapped(grid, levels) if levels else grid
