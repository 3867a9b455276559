"""EDM's training losses. VP's and VE's are noise matching under their own processes, EDM's is `EDMLoss`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.objectives import Draws, EDMLoss, noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, VE, VP
from gen.diffusion.transport import NoiseMatching
from tests.parity.conftest import fixtures
from tests.parity.toys import nchw, nhwc

CASES = [pytest.param(fx, case, id=f"{fx}-{case}") for fx in fixtures("edm-losses*") for case in ("edm", "vp", "ve")]


def setting(fx: Any, case: str) -> tuple[Any, Any, jax.Array]:
    """(process, objective, times) of a case, the times from the stored draws."""
    o, io = fx.config[case], fx.io
    if case == "edm":
        objective = EDMLoss(o.get("P_mean", -1.2), o.get("P_std", 1.2))
        draw = jnp.asarray(io["edm.normal_draw"]).reshape(-1)
        return EDM(sigma_data=o.get("sigma_data", 0.5)), objective, jnp.exp(objective.mean + objective.std * draw)
    u = jnp.asarray(io[f"{case}.uniform_draw"]).reshape(-1)
    if case == "vp":
        low = o.get("beta_min", 0.1)
        vp = VP(low, low + o.get("beta_d", 19.9), t_min=o.get("epsilon_t", 1e-5))
        return vp, NoiseMatching(), vp.at(1.0 - u)
    ve = VE(o.get("sigma_min", 0.02), o.get("sigma_max", 100.0))
    return ve, NoiseMatching(), ve.at(u)


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_loss(fx, case):
    process, objective, t = setting(fx, case)
    x = jnp.asarray(nhwc(fx.io["images"]))
    labels = jnp.asarray(fx.io["labels"])
    bias = 0.05 * jnp.sum(jnp.arange(1, labels.shape[1] + 1) * labels, axis=1)[:, None, None, None]
    s2, mix = fx.config["s2"], fx.config["mix"]

    def evaluate(x_t: jax.Array, t: jax.Array, cond: Any) -> Prediction:
        alpha = process.alpha(t)[:, None, None, None]
        level = process.sigma(t)[:, None, None, None] / alpha
        clean = x_t / alpha  # the official clock: x + level noise
        d = clean * s2 / (level**2 + s2) + mix * jnp.sin(clean / (1 + level)) + bias
        return Prediction(d, x_t, t, {}, process, "x")

    draws = Draws(t, jnp.asarray(nhwc(fx.io[f"{case}.noise_draw"])))
    level = process.sigma(t) / process.alpha(t)
    fx.close(level, f"{case}.sigma")
    fx.close(nchw(noised(process, x, draws) / process.alpha(t)[:, None, None, None]), f"{case}.noised")
    losses, _ = objective.loss(evaluate, process, x, {}, draws)
    # official losses are sums over an image, ours are means
    pixels = math.prod(x.shape[1:])
    fx.close(pixels * losses, fx.io[f"{case}.loss"].sum((1, 2, 3)))
    fx.close(pixels * losses.mean(), f"{case}.loss_scalar")
    # an error of one in every pixel shows the weight
    off, _ = objective.loss(lambda x_t, t, cond: Prediction(x + 1.0, x_t, t, {}, process, "x"), process, x, {}, draws)
    fx.close(off, f"{case}.weight")


def test_levels_are_drawn_as_officially():
    """Medians of 20000 draws: e^-1.2 for EDM, VP's level at t = 1/2, the geometric middle for VE."""
    x = jnp.zeros((20000, 1))
    vp, ve = VP(t_min=1e-5), VE()
    middle = float(vp.sigma(0.5) / vp.alpha(0.5))
    for objective, process, median in (
        (EDMLoss(), EDM(), math.exp(-1.2)),
        (NoiseMatching(), vp, middle),
        (NoiseMatching(), ve, math.sqrt(0.02 * 100)),
    ):
        t = objective.draw(jax.random.key(0), process, x).t
        np.testing.assert_allclose(np.median(process.sigma(t) / process.alpha(t)), median, rtol=0.1)
