"""Interpolant transport (Ma et al. 2024, SiT): forward SDE, diffusion coefficients, safe intervals and losses.

The official clock runs from noise at 0 to data at 1; everything here is on our clock (data at 0).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gen.diffusion.objectives import Draws, Evaluate, TimesAndNoise, mean_over_data, noised
from gen.diffusion.prediction import PredictionKind
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.network import Cond

__all__ = ["DiffusionForm", "NoiseMatching", "diffusion", "forward_sde", "interval"]

DiffusionForm = Literal["sbdm", "sigma", "linear", "decreasing", "increasing-decreasing", "constant"]


def forward_sde(process: Any, t: Any) -> tuple[Any, Any]:
    """Gives (f, w0) of the forward SDE dx = f x dt + sqrt(2 w0) dB that has the process's marginals.

    f = alpha' / alpha and w0 = sigma sigma' - sigma^2 f; both infinite where alpha is 0.
    """
    f = process.dalpha(t) / process.alpha(t)
    sigma = process.sigma(t)
    return f, sigma * process.dsigma(t) - f * sigma**2


def diffusion(process: Any, t: Any, form: DiffusionForm = "sigma", norm: float = 1.0) -> Any:
    """Gives the freely chosen w(t) of the reverse SDE (SiT section 2.4 and its code); like t, non-negative.

    Args:
      form: ``sbdm`` norm w0 (the forward SDE's own), ``sigma`` norm sigma(t), ``linear`` norm t, ``decreasing``
        (1 - norm cos(pi t))^2 / 4, ``increasing-decreasing`` norm sin(pi t)^2, ``constant`` norm.

    Raises GenError for a form that is not known.
    """
    xp = jnp if isinstance(t, jax.Array) else np
    match form:
        case "sbdm":
            return norm * forward_sde(process, t)[1]
        case "sigma":
            return norm * process.sigma(t)
        case "linear":
            return norm * xp.asarray(t)
        case "decreasing":
            return 0.25 * (1.0 - norm * xp.cos(math.pi * t)) ** 2
        case "increasing-decreasing":
            return norm * xp.sin(math.pi * t) ** 2
        case "constant":
            return xp.full_like(t, norm)
        case _:
            raise GenError(f"diffusion form '{form}' is unknown; expected one of {', '.join(DiffusionForm.__args__)}")


def interval(
    process: Any,
    kind: PredictionKind,
    use: Literal["train", "ode", "sde"],
    *,
    form: DiffusionForm = "sigma",
    last_step: float = 0.04,
    eps: float | None = None,
) -> tuple[float, float]:
    """Gives the times (data end, noise end) between which SiT trains or integrates.

    A velocity on a path that reaches pure noise needs no margin; other predictions divide by alpha or sigma.

    Args:
      kind: what the network predicts.
      use: training, the probability flow or the reverse SDE.
      form: the SDE's diffusion coefficient.
      last_step: length of the SDE's last, separate step at the data end; 0 for none.
      eps: the margin; None for the official default (1e-3, or 1e-5 to train on VP).
    """
    pure = abs(float(process.alpha(process.t_max))) < 1e-9
    if pure and kind == "velocity":
        eps = 0.0
    elif eps is None:
        eps = 1e-5 if use == "train" and not pure else 1e-3
    divides = kind != "velocity" or (use == "sde" and form == "sbdm")
    low = (last_step or eps) if use == "sde" else eps
    return low, process.t_max - (eps if pure and divides else 0.0)


@dataclasses.dataclass(frozen=True)
class NoiseMatching(TimesAndNoise):
    """Mean W |eps_hat - eps|^2, the loss of SiT's noise and score models (a score times -sigma is a noise).

    Attributes:
      weight: ``none`` W = 1, ``velocity`` (w0 / sigma)^2 (equal to velocity matching), ``likelihood`` w0 / sigma^2.
      times: how times are drawn.
    """

    weight: Literal["none", "velocity", "likelihood"] = "none"
    times: TimeSampler = TimeSampler()

    def loss(
        self, evaluate: Evaluate, process: Any, x: jax.Array, cond: Cond, draws: Draws
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        prediction = evaluate(noised(process, x, draws), draws.t, cond)
        errors = mean_over_data(jnp.square(prediction.eps - draws.eps))
        if self.weight == "none":
            return errors, {"noise_mse": errors}
        w0, sigma = forward_sde(process, draws.t)[1], process.sigma(draws.t)
        weight = jnp.square(w0 / sigma) if self.weight == "velocity" else w0 / jnp.square(sigma)
        return weight * errors, {"noise_mse": errors}
