"""Solvers against golden trajectories on a Gaussian mixture: every input of the denoiser, and the result.

In float32 with the states of the fixture, and in float64 against its float64 recomputation.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.ddpm import DDPM
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import VE, EDMFamily, Linear, Trigonometric
from gen.sampling.grids import Grid, Karras, Spaced, Uniform
from gen.sampling.integrate import Problem, integrate, states
from gen.sampling.multistep import DPMSolver, UniPC
from gen.sampling.solvers import DDIM, Euler, Heun, Renoise
from tests.parity.conftest import Fixture, fixtures

FOUND = fixtures("solver-dpmpp*", "solver-unipc*", "solver-ddim-euler-heun*")
CASES = [pytest.param(fx, case, id=f"{fx}-{case}") for fx in FOUND for case in fx.config["cases"]]
RATIO = EDMFamily("linear", "vp", sigma_max=1e6)  # variance preserving, with sigma / alpha as its time
KINDS = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "velocity", "sample": "x"}

COMMON = {"prediction_type": "epsilon", "lower_order_final": True, "stochastic_sampling": False}
MULTISTEP = {"solver_order": 2, "timestep_spacing": "linspace"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "solver-dpmpp": MULTISTEP | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    "solver-unipc": MULTISTEP | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": []},
    "DDIM": {"timestep_spacing": "leading"},
    "HeunDiscrete": {"timestep_spacing": "linspace"},
    "FlowMatchEulerDiscrete": {"prediction_type": "flow_prediction", "time_shift_type": "exponential"},
    "FlowMatchHeunDiscrete": {"prediction_type": "flow_prediction"},
}
OTHER_GRIDS = ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "rescale_betas_zero_snr")


@dataclasses.dataclass
class Case:
    """One case: its denoiser, and what that was asked."""

    fx: Fixture
    name: str
    calls: list = dataclasses.field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The case over what its scheduler does by default."""
        spec = self.fx.config["cases"][self.name]
        scheduler = next((name for name in DEFAULTS if self.fx.name.startswith(name)), spec.get("scheduler"))
        return COMMON | DEFAULTS.get(scheduler, {}) | spec

    def array(self, name: str) -> np.ndarray:
        return self.fx.io[f"{self.name}.{name}"]

    @property
    def flow(self) -> bool:
        return "Flow" in self.spec.get("scheduler", "") or self.spec.get("use_flow_sigmas", False)

    def denoised(self, x: np.ndarray, a: float, b: float) -> np.ndarray:
        """The mixture's E[x | x_t] in float64."""
        means = self.fx.io["gmm_means"].astype(np.float64)
        weights, variance = self.fx.io["gmm_weights"], float(self.fx.io["gmm_variance"])
        total = a * a * variance + b * b
        away = x.astype(np.float64)[:, None] - a * means[None]
        axes = tuple(range(2, away.ndim))
        logs = np.log(weights) - np.sum(away**2, axis=axes) / (2 * total)
        shares = np.exp(logs - logs.max(axis=1, keepdims=True))
        shares = (shares / shares.sum(axis=1, keepdims=True)).reshape(shares.shape + (1,) * (means.ndim - 1))
        return np.sum(shares * (means[None] + a * variance / total * away), axis=1)

    def denoise(self, process: Any, times: Any) -> Any:
        """A Denoise that gives the case's raw output; `times` are those of its calls, in order."""
        pending = iter(np.asarray(times, np.float64))

        def denoise(x, t, cond, step, carry):
            exact = next(pending)
            assert float(t) == pytest.approx(exact, rel=1e-6, abs=1e-7)
            a, b = float(process.alpha(exact)), float(process.sigma(exact))
            state, kind = np.asarray(x), KINDS[self.spec["prediction_type"]]
            if isinstance(process, VE):  # states without the scaling that the network's input has
                scale = 1 / math.sqrt(1 + b * b)
                d = self.denoised(scale * state, scale, scale * b)
                raw = {"x": d, "eps": (state - d) / b, "v": scale * ((state - d) / b) - scale * b * d}[kind]
                value, kind = d, "x"
            else:
                d = self.denoised(state, a, b)
                eps = (state - a * d) / b
                raw = value = {"x": d, "eps": eps, "v": a * eps - b * d, "velocity": eps - d}[kind]
            prediction = Prediction(jnp.asarray(value, x.dtype), x, t, {}, process, kind)
            self.calls.append((state, raw, prediction.denoised))
            return prediction, carry

        return denoise

    def run(self, dtype: Any) -> np.ndarray:
        """The final state, from the stored start."""
        self.calls.clear()
        x = jnp.asarray(self.array("samples")[0], dtype)
        stored = self.fx.io.get(f"{self.name}.noise")

        def noise(i):
            return jnp.asarray(stored[int(i)], dtype)

        if self.spec.get("scheduler") == "DDIM":  # published steps do not always go to the next level
            clock = [self.array(n).astype(np.float64) for n in ("alpha_bar", "alpha_bar_prev")]
            times = np.stack([2 / math.pi * np.arctan2(np.sqrt(1 - v), np.sqrt(v)) for v in clock], axis=1)
            for i, pair in enumerate(times):
                grid = Grid(pair, Trigonometric())
                one = self.denoise(Trigonometric(), pair[:1])
                x = integrate(DDIM(self.spec["eta"]), Problem(one, x, grid, lambda _, i=i: noise(i), {}))
            return np.asarray(x)
        solver, process = solver_of(self.spec), Linear() if self.flow else RATIO
        times = self.array("sigmas").astype(np.float64)
        evaluated = times[:-1]
        if isinstance(solver, Heun):  # inner levels stand twice: at the end of a step and at the start of the next
            times = np.append(times[0], times[1::2])
            process = process if self.flow else VE()
        found = states(solver, Problem(self.denoise(process, evaluated), x, Grid(times, process), noise, {}))
        if isinstance(solver, UniPC):
            self.corrected = np.asarray(found.memory[0])
        return np.asarray(found.x[-1])


def solver_of(spec: dict[str, Any]) -> Any:
    if "predict_x0" in spec:
        off = tuple(spec["disable_corrector"])
        return UniPC(spec["solver_order"], spec["solver_type"], spec["lower_order_final"], off)
    if "algorithm_type" in spec:
        stochastic = spec["algorithm_type"] == "sde-dpmsolver++"
        return DPMSolver(spec["solver_order"], spec["solver_type"], stochastic, spec["lower_order_final"])
    if "Heun" in spec["scheduler"]:
        return Heun()
    return Renoise() if spec["stochastic_sampling"] else Euler()


@pytest.mark.parametrize(("fx", "name"), CASES)
def test_every_state_in_float32(fx: Fixture, name: str) -> None:
    case = Case(fx, name)
    loose = 3e-5 if "Heun" in case.spec.get("scheduler", "") else 5e-5 if name.endswith("_full") else 1e-5
    samples = case.array("samples")
    with jax.enable_x64(True), jax.disable_jit():
        out = case.run(np.float32)
    assert out.dtype == np.float32
    limit = loose * (max(1.0, float(np.abs(samples).max())) if fx.name.startswith("solver-ddim") else 1.0)
    fx.close(out, samples[-1], rtol=0, atol=limit)
    fx.close(np.stack([x for x, *_ in case.calls]), samples[:-1], rtol=0, atol=limit)
    if f"{name}.corrected" in fx.io:
        fx.close(case.corrected, f"{name}.corrected", rtol=0, atol=limit)


@pytest.mark.parametrize(("fx", "name"), CASES)
def test_result_in_float64(fx: Fixture, name: str) -> None:
    case = Case(fx, name)
    with jax.enable_x64(True), jax.disable_jit():
        out = case.run(np.float64)
    fx.close(out, f"{name}.final64", rtol=0, atol=1e-8 if fx.name.startswith("solver-unipc") else 1e-9)
    fx.close(np.stack([raw for _, raw, _ in case.calls]), f"{name}.model_out", rtol=1e-4, atol=1e-4)
    if f"{name}.denoised" in fx.io:
        fx.close(np.stack([d for *_, d in case.calls]), f"{name}.denoised", rtol=1e-4, atol=1e-4)


def chain_of(fx: Fixture) -> DDPM:
    table = fx.config["vp_table"]
    schedule = {"linear": "linear", "scaled_linear": "scaled-linear"}[table["beta_schedule"]]
    return DDPM(schedule, table["num_train_timesteps"], ends=(table["beta_start"], table["beta_end"]))


def levels(fx: Fixture, name: str) -> np.ndarray | None:
    """The noise levels that our grids give for the case, without the end; None where no grid of ours is meant."""
    case = Case(fx, name)
    spec, n = case.spec, case.spec["num_inference_steps"]
    multistep = "solver_order" in spec
    if any(spec.get(name) for name in OTHER_GRIDS) or (case.flow and spec.get("use_karras_sigmas")):
        return None
    if case.flow:
        shift = spec.get("flow_shift", spec.get("shift", 1.0))
        if spec.get("use_dynamic_shifting"):
            shift = math.exp(spec["mu"]) if spec["time_shift_type"] == "exponential" else spec["mu"]
        if spec.get("shift_terminal"):
            return None
        ends = {"start": 1.0, "end": 0.0}
        if "predict_x0" in spec:
            ends["end"] = 1.0 - 0.999 * (n - 1) / n
        elif multistep:
            ends["start"] = 0.999
        elif "sigmas" not in spec:  # published: the smallest level is shifted twice
            ends["end"] = shift * 0.001 / (1 + (shift - 1) * 0.001)
        return Uniform(shift, **ends)(Linear(), n).times[:-1]
    chain = chain_of(fx)
    bar = np.cumprod(1 - chain.betas)
    table, spacing = np.sqrt((1 - bar) / bar), spec["timestep_spacing"]
    if multistep or spacing == "linspace":  # Karras's levels run between the ends of these
        ends = table[[0, -1]]
    else:
        times = Spaced(spacing, spec.get("steps_offset", 0), multistep)(chain, n).times[[-2, 0]]
        ends = chain.sigma(times) / chain.alpha(times)
    if spec.get("use_karras_sigmas"):
        return Karras(7.0, *map(float, ends))(RATIO, n).times[:-1]
    if spec.get("scheduler") == "HeunDiscrete" and spacing == "linspace":
        return None  # not rounded to the chain's indices
    times = Spaced(spacing, spec.get("steps_offset", 0), multistep)(chain, n).times[:-1]
    return chain.sigma(times) / chain.alpha(times)


@pytest.mark.parametrize(("fx", "name"), CASES)
def test_noise_levels_are_those_of_our_grids(fx: Fixture, name: str) -> None:
    ours, case = levels(fx, name), Case(fx, name)
    if case.spec.get("scheduler") == "DDIM":
        bar = case.array("alpha_bar").astype(np.float64)
        with np.errstate(divide="ignore"):
            stored = np.sqrt((1 - bar) / bar)
    else:
        stored = case.array("sigmas")[:-1]
        stored = stored[np.append(True, np.diff(stored) != 0)] if "Heun" in case.spec.get("scheduler", "") else stored
    assert len(np.unique(stored)) == case.spec["num_inference_steps"]
    clock = case.array("timesteps")
    if case.flow:  # in steps of the chain, whole ones for the multistep solvers
        whole = clock.dtype.kind == "i"
        found = chain_of(fx).steps * case.array("sigmas")[:-1].astype(np.float64)
        np.testing.assert_allclose(clock, np.trunc(found) if whole else found, rtol=0, atol=1.0 if whole else 2e-4)
    elif ours is not None and not case.spec.get("use_karras_sigmas"):
        chain, levels_ = chain_of(fx), ours if len(clock) == len(ours) else np.append(ours[0], np.repeat(ours[1:], 2))
        np.testing.assert_allclose(clock, chain.index(chain.time_of(-2 * np.log(levels_))), rtol=0, atol=1e-2)
    if ours is not None:
        # float32 tables: their 1 - alpha_bar is off most near clean data
        np.testing.assert_allclose(stored, ours, rtol=1e-3 if not case.flow else 3e-6)
