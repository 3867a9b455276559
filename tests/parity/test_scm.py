"""Continuous-time consistency models: tangents, losses, gradients, times and samples against FastGen's functions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.consistency_maps import TrigPrecondition, trig_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.process import TrigFlow, expand, pair
from gen.distill.pairs import LogLevels
from gen.distill.scm import SCDTask, SCMTask, normalised, scm_loss, squared_error, tangent
from gen.sampling.flowmaps import jumps
from gen.sampling.guidance import ClassifierFree
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_consistency import edm, image
from tests.parity.toys import Toy, nchw, official, ours

FOUND = fixtures("scm-ct-loss*", "scm-cd-loss*")
CASES = [pytest.param(fx, name, id=f"{fx}-{name}") for fx in FOUND for name in fx.config["cases"]]
# the READMEs' tolerances; finite differences of the official code are compared at 1e-2
LOSS, ARRAY, DERIVATIVE, ROUGH = ({"rtol": r, "atol": 0.0} for r in (1e-4, 1e-4, 1e-3, 1e-2))


def networks(fx: Fixture) -> dict[str, Any]:
    """Parameters of the networks that the fixture has, and of the head of the student's learned weight."""
    roles = {name.partition(".")[0] for name in fx.weights}
    found = {role: ours(fx.weights, f"{role}.model.") for role in roles}
    heads = {role: params.pop("logvar_linear") for role, params in found.items()}
    return found | {"head": {"kernel": heads["net"]["scale"], "bias": heads["net"]["bias"]}}


def make(fx: Fixture, case: dict, nets: dict[str, Any]) -> SCMTask:
    process = edm(fx)
    kernel, middle = nets["net"]["conv_in"]["kernel"], nets["net"]["conv_mid"]["kernel"]
    toy = Toy(kernel.shape[2], kernel.shape[3], middle.shape[3], nets["net"]["wy"].shape[0])
    if case["param"] == "edm":
        teacher = Denoiser(toy, process, EDMPrecondition())
    else:
        teacher = Denoiser(toy, TrigFlow(process.sigma_data, process.sigma_max), TrigPrecondition())
    settings: dict[str, Any] = {
        "flow_map": trig_map(teacher, process.sigma_max),
        "warmup": case["warmup_steps"],
        "c": case["c"],
        "scaling": "mean" if case["rms_norm"] else "sum",
    }
    if not fx.config["use_cd"]:
        return SCMTask(**settings)
    return SCDTask(teacher=teacher, guidance=ClassifierFree(case.get("guidance") or 1.0), **settings)


def head(fx: Fixture, params: Any, weights: Any, clock: jax.Array) -> jax.Array:
    """The toy network's learned logarithm of the variance, which shares its time layer."""
    pre = jnp.tanh(clock[:, None] * params["wt"] + params["bt"])
    return (pre @ weights["kernel"].T + weights["bias"])[:, 0]


@pytest.mark.parametrize(("fx", "name"), CASES)
def test_loss(fx: Fixture, name: str) -> None:
    case, nets = fx.config["defaults"] | fx.config["cases"][name], networks(fx)
    task, process = make(fx, case, nets), edm(fx)
    level = jnp.asarray(fx.io["t"])
    if case.get("quantize"):
        table = np.asarray(process.at(np.linspace(0.0, 1.0, 1000)))
        level = jnp.asarray(table[np.abs(table - np.asarray(level)[:, None]).argmin(1)], jnp.float32)
        fx.close(level, f"{name}_sigma_t")
    t = jnp.arctan2(level, process.sigma_data)
    fx.close(t, f"{name}_t_hat" if case.get("quantize") else "t_hat")
    x, eps = image(fx, "x_start"), image(fx, "noise")
    label = jnp.asarray(fx.io["label_onehot"])
    cond = {"y": label, "null": jnp.zeros_like(label)}
    a, s = pair(task.flow_map.process, t, x)
    x_t = a * x + s * eps
    if not case.get("quantize"):
        fx.close(nchw(x_t), "x_t_hat", **ARRAY)
    velocity = task.velocity(nets, x, eps, x_t, t, cond)
    known = [k for k in (f"{name}_dxt_dt", "dxt_dt") if k in fx.io]
    if known and (known[0] != "dxt_dt" or not fx.config["use_cd"]):
        fx.close(nchw(velocity), known[0], **ARRAY)
    r = task.schedules(case["iteration"], 1)["r"]
    fx.close(r, f"{name}_r")
    found, data = task.derivative(nets["net"], x_t, t, velocity, cond), process.sigma_data
    fx.close(nchw(found.value / data), f"{name}_F_theta", **ARRAY)
    fx.close(nchw(found.tangent / data), f"{name}_F_jvp", **(ROUGH if case["fd"] else DERIVATIVE))
    clock = 0.25 * jnp.log(level) if case["param"] == "edm" else t
    logvar = head(fx, nets["net"], nets["head"], clock)
    fx.close(logvar, f"{name}_logvar", **ARRAY)
    if f"{name}_tangent" in fx.io:
        g = normalised(tangent(found.value, found.tangent, velocity, x_t, t, r), task.c, task.scaling)
        fx.close(nchw(g), f"{name}_tangent", **DERIVATIVE)
    check_loss(fx, name, case, task, nets, (x, cond, t, eps, r), clock)


def check_loss(fx: Fixture, name: str, case: dict, task: SCMTask, nets: dict, given: Any, clock: jax.Array) -> None:
    """Losses, and their gradients in the network and in the head."""
    x, cond, t, eps, r = given
    prior = 1.0 / (task.flow_map.process.sigma_data * jnp.tan(t)) if case["prior"] else jnp.ones_like(t)
    limits = ROUGH if case["fd"] else LOSS
    fx.close(task.errors(nets["net"], nets, *given)[0], f"{name}_unweighted_per_sample", **limits)

    def losses(trained: Any) -> jax.Array:
        error, _ = task.errors(trained["net"], nets, x, cond, t, eps, r)
        size = x[0].size
        logvar = head(fx, trained["net"], trained["head"], clock)
        scaling = "mean" if case["divide_D"] else "sum"
        return scm_loss(error, logvar, prior, size, scaling)

    trained = {"net": nets["net"], "head": nets["head"]}
    fx.close(losses(trained), f"{name}_loss_per_sample", **limits)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: losses(p).mean()))(trained)
    fx.close(loss, f"{name}_loss", **limits)
    found = official(grads["net"], f"{name}_grad_net.model.")
    for leaf, value in (("weight", grads["head"]["kernel"]), ("bias", grads["head"]["bias"])):
        found[f"{name}_grad_net.model.logvar_linear.{leaf}"] = np.asarray(value)
    expected = {k for k in fx.io if k.startswith(f"{name}_grad_")}
    assert expected <= set(found)
    assert expected == set(found) or case["fd"]
    for array in expected:
        fx.close(found[array], array, **DERIVATIVE)


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_times_and_samples(fx: Fixture) -> None:
    c, nets = fx.config, networks(fx)
    for name, (mean, std, high) in c["time"].items():
        law = LogLevels(mean, std, low=c["sigma_min"], high=high)
        fx.close(law.levels(jnp.asarray(fx.io["time_u"])), f"time_{name}", **ARRAY)
    task = make(fx, c["defaults"] | {"param": "edm"}, nets)
    process = task.flow_map.process
    first, again = (image(fx, f"sample_{name}") for name in ("noise", "noise2"))
    cond = {"y": jnp.asarray(fx.io["label_onehot"][: len(first)])}
    middle = float(process.time_of(-2.0 * np.log(c["sample_t_mid"])))
    x = float(process.sigma(process.t_max)) * first
    for count, times in ((1, (process.t_max, 0.0)), (2, (process.t_max, middle, 0.0))):
        out = jumps(task.flow_map, nets["net"], x, np.array(times), lambda i: again, cond, 1.0)
        fx.close(nchw(out), f"sample_{count}step", **ARRAY)


def test_the_learned_weight_balances_errors() -> None:
    """The loss is least where exp(logvar) is the weighted error; the error's gradient is that of the tangent."""
    error, level = jnp.array([0.5, 2.0]), jnp.array([1.0, 4.0])
    best = jnp.log(error / level)
    grad = jax.grad(lambda v: scm_loss(error, v, 1.0 / level, 8, "sum").sum())
    np.testing.assert_allclose(grad(best), 0.0, atol=1e-6)
    F, g = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(jax.grad(lambda F: squared_error(F, g).sum())(F), -2.0 * g / 4, rtol=1e-5)
    assert expand(level, F[:2]).shape == (2, 1)
