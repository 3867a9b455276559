"""SiT's network and samplers against the official code: SDE, ODE, guidance, likelihood."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.sit import parameterization
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.diffusion.transport import interval
from gen.pretrained import sit
from gen.sampling.grids import Explicit, Grid
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, integrate, states
from gen.sampling.likelihood import log_likelihood
from gen.sampling.runge_kutta import RungeKutta
from gen.sampling.sde import EulerMaruyama
from gen.sampling.solvers import Euler
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sit_paths import PROCESSES

SOLVERS = {
    "euler": Euler(),
    "heun2": RungeKutta("trapezoid"),
    "midpoint": RungeKutta("midpoint"),
    "rk4": RungeKutta("rk4"),
}
RUNS = [pytest.param(fx, k, id=f"{fx}-{k}") for fx in fixtures("sit-sampling*") for k in fx.config["runs"]]


def model(fx: Fixture) -> tuple[DiTConfig, dict[str, Any]]:
    """The fixture's network through the importer."""
    args = fx.config["args"]
    config = sit.IMPORTER.infer(fx.weights, heads=args["num_heads"])
    expected = (args.get("input_size", 32), args.get("in_channels", 4), args.get("patch_size", 2))
    assert (config.size[0], config.channels, config.patch) == expected
    expected = (args.get("hidden_size", 1152), args.get("depth", 28), args.get("learn_sigma", True))
    assert (config.width, config.depth, config.learned_variance) == expected
    _, params, report = sit.IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    saved = sit.IMPORTER.save(config, params)
    assert all(np.array_equal(saved[name], array) for name, array in fx.weights.items())
    return config, params


def denoiser(config: DiTConfig, path: str = "Linear", prediction: Any = "velocity") -> Denoiser:
    return Denoiser(config, PROCESSES[path], parameterization(config, prediction))


@pytest.mark.parametrize("fx", fixtures("sit-sampling*"), ids=str)
def test_forward_and_guidance(fx: Fixture) -> None:
    config, params = model(fx)
    net = denoiser(config)
    z, cond = jnp.asarray(nhwc(fx.io["z"])), {"label": jnp.asarray(fx.io["y"])}
    t = jnp.float32(1.0) - jnp.asarray(fx.io["fwd_t"])
    fx.close(nchw(-net(params, z, t, cond).velocity), "fwd_out")
    null = net.net.apply(params, cond, method="null")
    guidance = ClassifierFree(2.5, channels=3)
    guided, _ = guidance(net.bind(params), lambda c: null)(z, t, cond, jnp.int32(0), {})
    unconditional = net(params, z, t, null).velocity
    second = jnp.concatenate([guided.velocity[..., :3], unconditional[..., 3:]], axis=-1)
    fx.close(-nchw(jnp.concatenate([guided.velocity, second])), "cfg_fwd_out")


@pytest.mark.parametrize(("fx", "key"), RUNS)
def test_sampling(fx: Fixture, key: str) -> None:
    config, params = model(fx)
    run = fx.config["runs"][key]
    net = denoiser(config, run["path"], run["prediction"])
    kind = net.parameterization.output
    z, cond, count = jnp.asarray(nhwc(fx.io["z"])), {"label": jnp.asarray(fx.io["y"])}, run["num_steps"]
    draws = jnp.asarray(nhwc(fx.io["sde_noise"]))
    if run["kind"] == "sde":
        last = (run["last_step"] or "none").lower()
        form, size = run["diffusion_form"].lower(), run.get("last_step_size", 0.0) if run["last_step"] else 0.0
        low, high = interval(net.process, kind, "sde", form=form, last_step=size)
        times = np.linspace(high, low, count)
        solver: Any = EulerMaruyama(form, run["diffusion_norm"], last, run["sampling_method"] == "Heun")
        grid = Explicit(tuple(times if last == "none" else np.append(times, 0.0)))
    else:
        low, high = interval(net.process, kind, "ode")
        # what the adaptive steps approximate, in many fixed ones
        parts = 1 if run["method"] in SOLVERS else 48
        grid = Explicit(tuple(np.linspace(high, low, (count - 1) * parts + 1)))
        solver = SOLVERS.get(run["method"], RungeKutta("rk4"))
    made = grid(net.process, len(grid.times) - 1)
    sample = jax.jit(lambda x: states(solver, Problem(net.bind(params), x, made, lambda i: draws[i], cond)).x)
    path = sample(z)
    if run["kind"] == "ode":
        fx.close(1.0 - made.times[::parts], f"{key}_t")
        path = jnp.concatenate([z[None], path[parts - 1 :: parts]])
    elif last == "none":
        path = jnp.concatenate([path, path[-1:]])
    loose = run["kind"] == "ode" and parts > 1  # adaptive steps are taken to a relative 1e-3 each
    fx.close(nchw(path), key, rtol=1e-2 if loose else None)


@pytest.mark.parametrize("fx", fixtures("sit-sampling*"), ids=str)
def test_likelihood(fx: Fixture) -> None:
    config, params = model(fx)
    net = denoiser(config)
    signs = 2.0 * jnp.asarray(nhwc(fx.io["lik_rademacher01"])) - 1.0
    grid = Grid(np.linspace(0.0, 1.0, len(signs) + 1), Linear())
    x, cond = jnp.asarray(nhwc(fx.io["lik_x"])), {"label": jnp.asarray(fx.io["y"])}

    def likelihood(x: jax.Array) -> Any:
        problem = Problem(net.bind(params), x, grid, lambda i: signs[i], cond)
        return log_likelihood(problem, functools.partial(integrate, Euler()))

    log_p, latent = jax.jit(likelihood)(x)
    fx.close(nchw(latent), "lik_latent")
    fx.close(log_p, "lik_logp")


def test_a_file_of_sit_must_be_asked_for() -> None:
    """Its names and shapes are DiT's; read as the wrong one it would give noise."""
    assert sit.IMPORTER.signature == ()
    network = DiTConfig((4, 4), 3, 2, 16, 1, 2, num_classes=5)
    assert sit.generator(network).denoiser.parameterization.clock == "reversed"
    doubled = dataclasses.replace(network, learned_variance=True)
    assert sit.generator(doubled).denoiser.parameterization.learned_variance
    assert sit.generator(network).nfe == 250
