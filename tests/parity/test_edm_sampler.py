"""EDM's samplers: every case of the fixture, in float64 call by call, and in float32."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.prediction import Prediction
from gen.sampling.edm_samplers import ablation_sampler, edm_sampler
from gen.sampling.integrate import Problem, integrate
from tests.parity.conftest import fixtures

CASES = [pytest.param(fx, case, id=f"{fx}-{case}") for fx in fixtures("edm-sampler*") for case in fx.config["cases"]]


def sampler_of(fx: Any, case: str) -> Any:
    spec = fx.config["cases"][case]
    net = spec["net"]
    levels: tuple[float, ...] = ()
    if net["round_sigma"] != "identity":
        name = net["round_sigma"].split()[-1]
        levels = tuple(float(v) for v in fx.io[name])
    high = math.inf if net["sigma_max"] < 0 else net["sigma_max"]
    make = {"edm_sampler": edm_sampler, "ablation_sampler": ablation_sampler}[spec["function"]]
    return make(**spec["kwargs"], net_range=(net["sigma_min"], high), levels=levels)


def denoiser(fx: Any, process: Any, dtype: Any, calls: list | None = None) -> Any:
    """The README's stand-in network, on the clock of `process`."""
    s2, mix = fx.config["s2"], fx.config["mix"]
    labels = jnp.asarray(fx.io["labels"], dtype)
    bias = 0.05 * jnp.sum(jnp.arange(1, labels.shape[1] + 1) * labels, axis=1)[:, None, None, None]

    def denoise(x, t, cond, step, carry):
        a = process.alpha(t)
        inner, sigma = x / a, process.sigma(t) / a
        if calls is not None:
            calls.append((np.asarray(inner), float(sigma)))
        d = inner * s2 / (sigma**2 + s2) + mix * jnp.sin(inner / (1 + sigma)) + bias
        return Prediction(d, x, t, {}, process, "x"), carry

    return denoise


def run(fx: Any, case: str, dtype: Any, calls: list | None = None) -> jax.Array:
    sampler = sampler_of(fx, case)
    grid = sampler.times(sampler.process)
    noises = jnp.asarray(fx.io[f"{case}.noises"], dtype)
    x = jnp.asarray(fx.io["latents"], dtype) * jnp.asarray(grid.sigma[0], dtype)

    def sample(x: jax.Array) -> jax.Array:
        denoise = denoiser(fx, sampler.process, dtype, calls)
        return integrate(sampler.solver, Problem(denoise, x, grid, lambda i: noises[i], {}))

    return jax.jit(sample)(x)


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_float64_calls_and_result(fx, case):
    with jax.enable_x64(True):
        calls: list[tuple[np.ndarray, float]] = []
        with jax.disable_jit():
            out = run(fx, case, jnp.float64, calls)
        fx.close(np.asarray([sigma for _, sigma in calls]), f"{case}.call_sigma", rtol=1e-9, atol=0)
        assert len(calls) == sampler_of(fx, case).nfe(None)
        fx.close(np.stack([x for x, _ in calls]), f"{case}.call_x", rtol=1e-9, atol=0)
        fx.close(out, f"{case}.out", rtol=1e-9, atol=0)
        fx.close(run(fx, case, jnp.float64), f"{case}.out", rtol=1e-9, atol=0)


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_float32_result(fx, case):
    vp = "vp" in (fx.config["cases"][case]["kwargs"].get(k) for k in ("scaling", "schedule"))
    fx.close(run(fx, case, jnp.float32), f"{case}.out", rtol=1e-3 if vp else 1e-4)
