"""CTM's samplers against the official code: straight jumps, jumps with fresh noise, the diagonal by Heun's method."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.flowmap import FlowMap, Jump
from gen.diffusion.process import EDM
from gen.sampling.flowmaps import jumps
from gen.sampling.grids import Karras
from gen.sampling.integrate import Problem, integrate
from gen.sampling.solvers import Heun
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import Toy, nchw, nhwc, ours

FOUND = fixtures("ctm-gamma-sampling*")
CASES = [
    pytest.param(fx, name.removesuffix("_output"), id=f"{fx}-{name.removesuffix('_output')}")
    for fx in FOUND
    for name in fx.io
    if name.endswith("_output")
]


def student(fx: Fixture) -> tuple[FlowMap, Any, dict[str, jax.Array]]:
    """The flow map, its parameters and the condition; the toy network's clock is ln t, EDM's is ln(t) / 4."""
    params = ours(fx.weights, "student.model.")
    params |= {"wt": 4.0 * params["wt"], "ws": 4.0 * params["ws"]}
    kernel, middle = params["conv_in"]["kernel"], params["conv_mid"]["kernel"]
    toy = Toy(kernel.shape[2], kernel.shape[3], middle.shape[3], params["wy"].shape[0], times=2)
    config = fx.config
    process = EDM(config["sigma_min"], config["sigma_max"], config["rho"], config["sigma_data"])
    return FlowMap(toy, process, Jump()), params, {"y": jnp.asarray(fx.io["label_onehot"])}


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_samples(fx: Fixture, case: str) -> None:
    flow_map, params, cond = student(fx)
    config = fx.config
    karras = Karras(config["rho"], config["sigma_min"], config["sigma_max"])
    x = config["sigma_max"] * jnp.asarray(nhwc(fx.io["z"]))
    if case == "gamma_ind":
        times = karras(flow_map.process, config["gamma_ind_steps"]).times
        first, second = (float(times[int(fx.io[f"gamma_ind_{k}"])]) for k in (1, 2))
        x = flow_map(params, x, times[0], first, cond)
        x = x + np.sqrt(second**2 - first**2) * nhwc(fx.io["gamma_ind_draw"])
        out = flow_map(params, x, second, times[-2], cond)
    elif match := re.fullmatch(r"heun(\d+)", case):
        grid, denoise = karras(flow_map.process, int(match[1])), flow_map.diagonal().bind(params)
        out = integrate(Heun(), Problem(denoise, x, grid, lambda i: x, cond))
    else:
        times = fx.io[f"{case}_sigmas"].astype(np.float64)[:-1]
        draws = jnp.asarray(nhwc(fx.io.get(f"{case}_draws", fx.io["z"][None])))
        gamma = float(fx.io.get(f"{case}_gamma", 0.0))
        out = jax.jit(lambda x: jumps(flow_map, params, x, times, lambda i: draws[i], cond, gamma))(x)
    fx.close(nchw(out), f"{case}_output")
