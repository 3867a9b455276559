"""SiT's paths: coefficients, conversions, losses, drifts and intervals, with the clock reversed at the edge."""

import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Predict
from gen.diffusion.objectives import Draws, VelocityMatching
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import VP, Linear, Trigonometric, expand
from gen.diffusion.transport import NoiseMatching, diffusion, forward_sde, interval
from tests.parity.conftest import fixtures

PROCESSES = {"Linear": Linear(), "GVP": Trigonometric(), "VP": VP()}
OFFICIAL = {  # the raw output of a SiT network
    "velocity": Predict("velocity", clock="reversed", sign=-1),
    "score": Predict("score", clock="reversed"),
    "noise": Predict("eps", clock="reversed"),
}
CASES = [pytest.param(fx, path, id=f"{fx}-{path}") for fx in fixtures("sit-paths*") for path in fx.config["paths"]]


class Case:
    """The fixture's arrays on our clock."""

    def __init__(self, fx, path):
        self.process = PROCESSES[path]
        self.t = jnp.float32(1.0) - jnp.asarray(fx.io["t"], jnp.float32)
        self.x, self.eps, self.raw = (jnp.asarray(fx.io[k], jnp.float32) for k in ("x1", "x0", "model_output"))
        self.x_t = jnp.asarray(fx.io[f"{path}_x_t"])

    def predicted(self, name, raw, x_t=None) -> Prediction:
        return OFFICIAL[name].prediction(self.process, raw, self.x_t if x_t is None else x_t, self.t, {})


@pytest.mark.parametrize(("fx", "path"), CASES)
def test_coefficients(fx, path):
    case = Case(fx, path)
    p, t = case.process, case.t
    fx.close(p.alpha(t), f"{path}_alpha")
    fx.close(p.sigma(t), f"{path}_sigma")
    fx.close(-p.dalpha(t), f"{path}_d_alpha")
    fx.close(-p.dsigma(t), f"{path}_d_sigma")
    drift, w0 = forward_sde(p, t)
    fx.close(-drift, f"{path}_d_alpha_over_alpha")
    fx.close(expand(drift, case.x_t) * case.x_t, f"{path}_drift")
    fx.close(w0, f"{path}_drift_var")
    for name in fx.io:
        if name.startswith(f"{path}_diffusion_"):
            form = name.removeprefix(f"{path}_diffusion_").lower()
            fx.close(jnp.broadcast_to(diffusion(p, t, form, fx.config["norm"]), t.shape), name)


@pytest.mark.parametrize(("fx", "path"), CASES)
def test_conversions(fx, path):
    case = Case(fx, path)
    p, t = case.process, case.t
    a, s = expand(p.alpha(t), case.x), expand(p.sigma(t), case.x)
    fx.close(a * case.x + s * case.eps, f"{path}_x_t")
    u = expand(p.dalpha(t), case.x) * case.x + expand(p.dsigma(t), case.x) * case.eps
    fx.close(-u, f"{path}_u_t")
    fx.close(OFFICIAL["velocity"].target(p, case.x, case.eps, t), f"{path}_u_t")
    fx.close(case.predicted("velocity", case.raw).score, f"{path}_score_from_velocity")
    fx.close(case.predicted("velocity", case.raw).eps, f"{path}_noise_from_velocity")
    fx.close(-case.predicted("score", case.raw).velocity, f"{path}_velocity_from_score")
    true = case.predicted("velocity", jnp.asarray(fx.io[f"{path}_u_t"]))
    fx.close(true.score, f"{path}_score_from_true_velocity")
    fx.close(true.eps, f"{path}_noise_from_true_velocity")
    for name in OFFICIAL:
        prediction = case.predicted(name, case.raw)
        fx.close(-prediction.velocity, f"ode_drift_{path}_{name}")
        fx.close(prediction.score, f"score_{path}_{name}")


@pytest.mark.parametrize(("fx", "path"), CASES)
def test_losses(fx, path):
    case = Case(fx, path)
    draws = Draws(case.t, case.eps)
    names = [name for name in fx.io if name.startswith(f"loss_{path}_")]
    assert names
    for name in names:
        kind, weight = name.removeprefix(f"loss_{path}_").split("_")

        def evaluate(x_t, t, cond, kind=kind):
            return case.predicted(kind, case.raw, x_t)

        objective = VelocityMatching() if kind == "velocity" else NoiseMatching(weight)
        fx.close(objective.loss(evaluate, case.process, case.x, {}, draws)[0], name)


@pytest.mark.parametrize(("fx", "path"), CASES)
def test_intervals(fx, path):
    process = PROCESSES[path]
    names = [name for name in fx.io if name.startswith(f"interval_{path}_")]
    assert names
    for name in names:
        kind = OFFICIAL[name.removeprefix(f"interval_{path}_")].output
        ends = [interval(process, kind, use) for use in ("train", "ode", "sde")]
        fx.close(np.float32([1.0 - t for low, high in ends for t in (high, low)]), name, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("fx", "path"), CASES)
def test_every_array_is_compared(fx, path):
    prefixes = (f"{path}_", f"loss_{path}_", f"ode_drift_{path}_", f"score_{path}_", f"interval_{path}_")
    inputs = {"t", "x1", "x0", "model_output"}
    of_others = tuple(p for p in fx.config["paths"] if p != path)
    rest = [
        n for n in fx.io if n not in inputs and not n.startswith(prefixes) and not set(of_others) & set(n.split("_"))
    ]
    assert rest == []
