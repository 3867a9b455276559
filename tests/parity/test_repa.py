"""REPA against the official code: projected features, losses with alignment, gradients, samplers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.aligned import AlignedConfig
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import Aligned, Draws
from gen.diffusion.process import Linear, Trigonometric
from gen.diffusion.times import TimeSampler
from gen.diffusion.train import DenoiserTask
from gen.pretrained import sit
from gen.pretrained.systems import locate
from gen.sampling.grids import Grid, Uniform
from gen.sampling.guidance import ClassifierFree, Interval
from gen.sampling.integrate import Problem, integrate
from gen.sampling.sde import EulerMaruyama
from gen.sampling.solvers import Euler, Heun
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc

PATHS = {"linear": Linear(), "cosine": Trigonometric()}
STEPS = {"ode_euler": 6, "ode_heun": 4, "sde": 6}  # as the fixture's description says


def model(fx: Fixture) -> tuple[AlignedConfig, dict[str, Any]]:
    """The fixture's network and projectors through the importer."""
    args = fx.config["args"]
    assert locate(None, fx.weights).importer is sit.REPA
    config = sit.REPA.infer(fx.weights, heads=args["num_heads"], encoder_depth=args["encoder_depth"])
    assert config.widths == tuple(args["z_dims"])
    assert config.hidden == args["projector_dim"]
    _, params, report = sit.REPA.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    saved = sit.REPA.save(config, params)
    assert all(np.array_equal(saved[name], array) for name, array in fx.weights.items())
    return config, params


def denoiser(config: AlignedConfig, path: str = "linear") -> Denoiser:
    return Denoiser(config, PATHS[path], Predict("velocity", learned_variance=config.network.learned_variance))


@pytest.mark.parametrize("fx", fixtures("repa-alignment*"), ids=str)
def test_forward(fx: Fixture) -> None:
    config, params = model(fx)
    x, t, cond = jnp.asarray(nhwc(fx.io["fwd_x_t"])), jnp.asarray(fx.io["fwd_t"]), {"label": jnp.asarray(fx.io["y"])}
    taps = tuple(f"aligned_{i}" for i in range(len(config.widths)))
    prediction = denoiser(config)(params, x, t, cond, taps=taps)
    fx.close(nchw(prediction.velocity), "fwd_out")
    features = denoiser(config).features(params, x, t, cond, taps)
    for i, tap in enumerate(taps):
        fx.close(prediction.extra[tap], f"fwd_projected_{i}")
        fx.close(features[tap], f"fwd_projected_{i}")


@pytest.mark.parametrize("law", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fx", fixtures("repa-alignment*"), ids=str)
def test_loss(fx: Fixture, path: str, law: Any) -> None:
    config, params = model(fx)
    objective = Aligned(encoders=len(config.widths))
    task = DenoiserTask(denoiser=dataclasses.replace(denoiser(config, path), objective=objective), dropout=0.0)
    x, eps = jnp.asarray(nhwc(fx.io["x"])), jnp.asarray(nhwc(fx.io["noise"]))
    z = jnp.asarray(fx.io["uniform_draws" if law == "uniform" else "normal_draws"])
    draws = Draws(TimeSampler(law).times(PATHS[path], z), eps)
    cond = {"label": jnp.asarray(fx.io["y"])}
    cond |= {f"encoder_{i}": jnp.asarray(fx.io[f"encoder_features_{i}"]) for i in range(len(config.widths))}
    kept = jnp.zeros(len(x), bool)
    if (path, law) == ("linear", "uniform"):
        call = jax.value_and_grad(lambda p: task.loss(p, x, cond, draws, kept), has_aux=True)
        (total, aux), gradients = jax.jit(call)(params)
        fx.close(total, "total_coeff_0.5")
        official = sit.REPA.save(config, gradients)
        for name in [name for name in fx.io if name.startswith("grad:")]:
            fx.close(official[name.removeprefix("grad:")], name)
    else:
        _, aux = jax.jit(lambda p: task.loss(p, x, cond, draws, kept))(params)
    fx.close(aux.metrics["alignment"], f"proj_loss_{path}_{law}")
    fx.close(aux.metrics["velocity_mse"], fx.io[f"denoising_loss_{path}_{law}"].mean())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("fx", fixtures("repa-alignment*"), ids=str)
def test_sampling(fx: Fixture, kind: str, guided: bool) -> None:
    config, params = model(fx)
    net, steps = denoiser(config), STEPS[kind]
    grid: Grid = Uniform(end=0.04 if kind == "sde" else 0.0)(net.process, steps)
    guidance: Any = ClassifierFree()
    low, high = fx.config["guidance_low"], fx.config["guidance_high"]
    inside = [i for i, t in enumerate(grid.times[:-1]) if low <= t <= high]
    if guided and inside:
        # Heun's second evaluation keeps the decision of the step's start
        guidance = Interval(ClassifierFree(max(1.0, fx.config["cfg_scale"])), inside[0], inside[-1] + 1, by="step")
    denoise = guidance(net.bind(params), lambda c: net.net.apply(params, c, method="null"))
    solver: Any = {"ode_euler": Euler(), "ode_heun": Heun(), "sde": EulerMaruyama("linear")}[kind]
    draws = jnp.asarray(nhwc(fx.io["sde_noise"]))
    x, cond = jnp.asarray(nhwc(fx.io["sample_z"])), {"label": jnp.asarray(fx.io["sample_y"])}
    out = jax.jit(lambda x: integrate(solver, Problem(denoise, x, grid, lambda i: draws[i], cond, {})))(x)
    plain = "sde_plain" if kind == "sde" else kind
    fx.close(nchw(out), f"{kind}_cfg" if guided else plain)
