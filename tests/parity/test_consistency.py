"""Consistency distillation and training, improved training and easy tuning: losses, gradients, schedules, samples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.consistency_maps import data_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import Consistency, FlowMap
from gen.diffusion.process import EDM, expand
from gen.distill.consistency import ConsistencyDistillationTask, ConsistencyTask, ode_step, weighting
from gen.distill.distances import Norm, PseudoHuber
from gen.distill.pairs import Doubling, Fixed, GridPairs, LogLevels, Pair, Progressive, ShrinkingPairs
from gen.sampling.flowmaps import jumps
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import Toy, nchw, nhwc, official, ours

CM, SCHEDULES = fixtures("consistency-losses*"), fixtures("ict-schedules*")
ICT, ECT = fixtures("ict-loss*"), fixtures("ect-loss*")
CASES = [pytest.param(fx, case, id=f"{fx}-{case['name']}") for fx in CM for case in fx.config["cases"]]
CLOCK = 4.0  # the toy network of these fixtures is told ln(sigma), EDM's is ln(sigma) / 4


def network(fx: Fixture, prefix: str, clock: float = CLOCK) -> tuple[Toy, Any]:
    """The toy network and its parameters below `prefix`, made for EDM's clock."""
    params = ours(fx.weights, prefix)
    params |= {name: clock * params[name] for name in ("wt", "ws") if name in params}
    kernel, middle = params["conv_in"]["kernel"], params["conv_mid"]["kernel"]
    return Toy(kernel.shape[2], kernel.shape[3], middle.shape[3], params["wy"].shape[0], 1 + ("ws" in params)), params


def check_gradient(fx: Fixture, loss: Callable[[Any], jax.Array], params: Any, prefix: str, **limits: float) -> None:
    """The gradient of a loss in the parameters that `network` gives, under official names."""
    grads = jax.jit(jax.grad(loss))(params)
    grads |= {name: CLOCK * grads[name] for name in ("wt", "ws") if name in grads}
    found = official(grads, prefix)
    assert set(found) == {name for name in fx.io if name.startswith(prefix)}
    for name, value in found.items():
        fx.close(value, name, **limits)


def image(fx: Fixture, name: str) -> jax.Array:
    return jnp.asarray(nhwc(fx.io[name]))


def edm(fx: Fixture) -> EDM:
    c = fx.config
    names = ("sigma_min", "sigma_max", "rho", "sigma_data")
    return EDM(**{name: c[name] for name in names if name in c})


def setting(fx: Fixture, case: dict) -> tuple[Any, Any, Any, Pair, Any]:
    """(task, student's parameters, everything of the teacher and target, times, condition) of a case of CD or CT."""
    process, name, index = edm(fx), case["name"], fx.io[f"{case['name']}_index"]
    toy, student = network(fx, "student.model.")
    _, target = network(fx, "target.model.")
    _, teacher = network(fx, "teacher.model.")
    law = GridPairs(Fixed(case["num_scales"]))
    assert int(fx.io[f"{name}_num_scales"]) == case["num_scales"]
    settings: dict[str, Any] = {
        "flow_map": FlowMap(toy, process, Consistency()),
        "pairs": law,
        "distance": Norm(case["norm"]),
        "weight": case["weight"],
        "target_decay": 0.9,
    }
    if case["teacher"]:
        task: Any = ConsistencyDistillationTask(teacher=Denoiser(toy, process, EDMPrecondition()), **settings)
    else:
        task = ConsistencyTask(**settings)
    below = jnp.asarray(case["num_scales"] - 2 - index)
    times = law.pick(law.schedule(process, 0, 1), below)
    return task, student, {"teacher": teacher, "target": target}, times, {"y": jnp.asarray(fx.io["label_onehot"])}


@pytest.mark.parametrize(("fx", "case"), [c for c in CASES if not c.values[1]["name"].startswith("pd")])
def test_cd_and_ct(fx: Fixture, case: dict) -> None:
    name, (task, student, others, times, cond) = case["name"], setting(fx, case)
    fx.close(times.t, f"{name}_t")
    fx.close(times.r, f"{name}_t_next")
    x, eps = image(fx, "x_start"), image(fx, f"{name}_noise")

    def losses(params: Any) -> jax.Array:
        return task.losses(params, others, {"target": others["target"]}, x, cond, times, eps)

    fx.close(jax.jit(losses)(student), f"{name}_loss_per_sample")
    limits = {"rtol": 1e-4 if case["weight"] == "uniform" else 2e-3, "atol": 1e-7}
    check_gradient(fx, lambda p: losses(p).mean(), student, f"{name}_grad.model.", **limits)


@pytest.mark.parametrize(("fx", "case"), [c for c in CASES if c.values[1]["name"].startswith("pd")])
def test_progressive_distillation_on_karras_levels(fx: Fixture, case: dict) -> None:
    """Two Euler steps of the teacher; the student's data prediction is brought to the one that jumps as far at once."""
    process, name = edm(fx), case["name"]
    toy, student = network(fx, "student.model.")
    _, teacher = network(fx, "teacher.model.")
    denoiser, cond = Denoiser(toy, process, EDMPrecondition()), {"y": jnp.asarray(fx.io["label_onehot"])}
    steps = fx.io[f"{name}_index"][:, None] + np.array([0.0, 0.5, 1.0])
    t, middle, end = jnp.asarray(process.at(1.0 - steps / case["num_scales"]), jnp.float32).T
    for time, label in ((t, "t"), (middle, "t_mid"), (end, "t_next")):
        fx.close(time, f"{name}_{label}")
    x, eps = image(fx, "x_start"), image(fx, f"{name}_noise")
    x_t = x + expand(t, x) * eps

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        return denoiser(teacher, x, t, cond).velocity

    reached = ode_step(velocity, ode_step(velocity, x_t, t, middle, "euler"), middle, end, "euler")
    target = x_t - expand(t / (end - t), x) * (reached - x_t)

    def losses(params: Any) -> jax.Array:
        found = denoiser(params, x_t, t, cond).denoised
        return weighting(case["weight"], t, t - end, process.sigma_data) * Norm(case["norm"])({}, found, target)

    fx.close(losses(student), f"{name}_loss_per_sample")
    check_gradient(fx, lambda p: losses(p).mean(), student, f"{name}_grad.model.", rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("fx", CM, ids=str)
def test_functions_and_samples(fx: Fixture) -> None:
    process = edm(fx)
    toy, student = network(fx, "student.model.")
    flow_map, cond = FlowMap(toy, process, Consistency()), {"y": jnp.asarray(fx.io["label_onehot"])}
    sigma, x = jnp.asarray(fx.io["f_sigma"]), image(fx, "f_input")
    inner, times = flow_map.parameterization.inputs(process, x, sigma, sigma)
    fx.close(nchw(toy_raw(flow_map, student, inner, times, cond)), "f_raw")
    fx.close(nchw(flow_map(student, x, sigma, process.t_min, cond)), "f_output")
    probe = jnp.asarray(fx.io["sigma_probe"])
    one, zero = jnp.ones((len(probe), 1)), jnp.zeros((len(probe), 1))
    for kind, parameterization in (
        ("boundary", Consistency()),
        ("edm", data_map(denoiser(toy, process)).parameterization),
    ):
        fx.close(parameterization.value(process, zero, one, probe)[:, 0], f"{kind}_c_skip")
        fx.close(parameterization.value(process, one, zero, probe)[:, 0], f"{kind}_c_out")
        fx.close(parameterization.inputs(process, one, probe, probe)[0][:, 0], f"{kind}_c_in")
    for name in sorted(k.removesuffix("_ts") for k in fx.io if k.endswith("_ts")):
        points, which = int(fx.io[f"{name}_steps"]), fx.io[f"{name}_ts"]
        times = np.asarray(process.at(1.0 - which / (points - 1)))
        draws = jnp.asarray(nhwc(fx.io[f"{name}_draws"]))
        out = jumps(
            flow_map, student, 80.0 * image(fx, f"{name}_z"), times, lambda i, d=draws: d[i], cond, 1.0, clip=True
        )
        fx.close(nchw(out), f"{name}_output")


def denoiser(toy: Toy, process: EDM) -> Denoiser:
    return Denoiser(toy, process, EDMPrecondition())


def toy_raw(flow_map: FlowMap, params: Any, x: jax.Array, times: Any, cond: Any) -> jax.Array:
    return flow_map.net(params, x, times, cond)[0]


@pytest.mark.parametrize("fx", CM, ids=str)
def test_curriculum(fx: Fixture) -> None:
    c = fx.config["schedule"]
    curriculum, steps = Progressive(c["start_scales"], c["end_scales"]), fx.io["sched_step"].tolist()
    found = np.array([curriculum.points(step, c["total"]) for step in steps], np.int32)
    fx.close(found, "sched_num_scales")
    fx.close(np.array([curriculum.decay(c["start_ema"], step, c["total"]) for step in steps]), "sched_ema")
    assert curriculum.most >= found.max()


@pytest.mark.parametrize("fx", SCHEDULES, ids=str)
def test_ict_schedules(fx: Fixture) -> None:
    c = fx.config
    for row in c["schedules"]:
        curriculum, name = Doubling(row["s0"], row["s1"]), f"N_{row['name']}"
        points = [curriculum.points(step, row["K"]) for step in fx.io[f"{name}_step"].tolist()]
        fx.close(np.array(points, np.int32), f"{name}_value")
        assert curriculum.every(row["K"]) == int(fx.io[f"{name}_K_prime"])
    for name in (k.removesuffix("_sigma") for k in fx.io if k.endswith("_sigma")):
        points = len(fx.io[f"{name}_sigma"])
        law = GridPairs(Fixed(points), c["P_mean"], c["P_std"])
        process = EDM(c["sigma_min"], c["sigma_max"], c["rho"])
        rows = law.schedule(process, 0, 1)
        fx.close(rows["grid"], f"{name}_sigma")
        fx.close(1.0 / rows["gap"], f"{name}_weight")
        fx.close(law.table(process, points)[1], f"{name}_prob")
        np.testing.assert_allclose(rows["below"][: points - 2], np.cumsum(fx.io[f"{name}_prob"])[:-1], rtol=1e-4)
    distance = PseudoHuber()
    for name in (k.removesuffix("_value") for k in fx.io if k.startswith("huber_") and k.endswith("_value")):
        a, b = image(fx, f"{name}_a"), image(fx, f"{name}_b")
        fx.close(distance({}, a, b), f"{name}_value")
        assert float(fx.io[f"{name}_c"]) == pytest.approx(c["c_coefficient"] * np.sqrt(a[0].size), rel=1e-6)
        fx.close(nchw(jax.grad(lambda a, b=b: distance({}, a, b).sum())(a)), f"{name}_grad_a")


@pytest.mark.parametrize("fx", ICT, ids=str)
def test_ict_loss(fx: Fixture) -> None:
    c = fx.config
    (prefix,) = {name[: name.index("wt")] for name in fx.weights if name.endswith("wt")}
    toy, params = network(fx, prefix)
    process = EDM(c["sigma_min"], sigma_data=c["sigma_data"])
    law = GridPairs(Fixed(c["num_points"]), -1.1, 2.0)
    task = ConsistencyTask(flow_map=FlowMap(toy, process, Consistency()), pairs=law, distance=PseudoHuber(c["c"]))
    np.testing.assert_allclose(PseudoHuber(c["c"]).c, 0.00054 * np.sqrt(3.0) * c["resolution"], rtol=1e-6)
    x, eps = image(fx, "x"), image(fx, "noise")
    times = law.pick(law.schedule(process, 0, 1), jnp.asarray(fx.io["index"]))
    cond = {"y": jnp.asarray(fx.io["label_onehot"])}

    def losses(params: Any) -> jax.Array:
        return task.losses(params, {}, {}, x, cond, times, eps)

    for name, value in (("sigma_high", times.t), ("sigma_low", times.r)):
        fx.close(value, name)
    for name, t in (("student_output", times.t), ("target_output", times.r)):
        fx.close(nchw(task.f(params, x + expand(t, x) * eps, t, cond)), name)
    fx.close(losses(params), "loss_per_sample")
    check_gradient(fx, lambda p: losses(p).mean(), params, f"grad.{prefix}", rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("fx", ECT, ids=str)
def test_ect_loss(fx: Fixture) -> None:
    c = fx.config
    (prefix,) = {name[: name.index("wt")] for name in fx.weights if name.endswith("wt")}
    toy, params = network(fx, prefix, 1.0)
    cond = {"y": jnp.asarray(fx.io["label_onehot"])}
    x, eps = image(fx, "x"), image(fx, "noise")
    for name, case in c["cases"].items():
        law = ShrinkingPairs(
            LogLevels(c["P_mean"], c["P_std"]), case["q"], k=c["k"] if case["adj"] == "sigmoid" else 0.0, b=c["b"]
        )
        task = ConsistencyTask(flow_map=data_map(denoiser(toy, EDM())), pairs=law, distance=PseudoHuber(case["c"]))
        level = jnp.exp(c["P_mean"] + c["P_std"] * jnp.asarray(fx.io["t_normal_draw"]))
        times = law.pairs(EDM(), level, np.float32(law.left(case["stage"])))

        def losses(params: Any, task: Any = task, times: Pair = times) -> jax.Array:
            return task.losses(params, {}, {}, x, cond, times, eps)

        fx.close(times.t, f"{name}_t")
        fx.close(times.r, f"{name}_r")
        fx.close(losses(params), f"{name}_loss_per_sample")
        grads = official(jax.jit(jax.grad(lambda p, f=losses: f(p).mean()))(params), f"{name}_grad.{prefix}")
        assert set(grads) == {k for k in fx.io if k.startswith(f"{name}_grad")}
        for array, value in grads.items():
            fx.close(value, array, rtol=1e-3, atol=1e-7)
