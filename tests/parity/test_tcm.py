"""Truncated consistency models, both stages: pairs, losses, gradients and tables, through the functions that train."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.consistency_maps import data_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.process import expand
from gen.distill.consistency import ConsistencyDistillationTask, ConsistencyTask, TruncatedTask, Weight, weighting
from gen.distill.distances import Norm, PseudoHuber
from gen.distill.pairs import LogLevels, ShrinkingPairs
from gen.sampling.guidance import ClassifierFree
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_consistency import edm, image, network
from tests.parity.toys import nchw, official, ours

FOUND = fixtures("tcm-losses*")
LOSS, ARRAY, TABLE = {"rtol": 1e-3, "atol": 0.0}, {"rtol": 1e-4, "atol": 0.0}, {"rtol": 1e-5, "atol": 0.0}
GRADIENT = {"rtol": 2e-3, "atol": 0.0}  # the README's tolerances
# official names of the weights on the distance
WEIGHTS: dict[str, Weight] = {
    "default": "inverse-gap",
    "c_out": "c-out",
    "c_out_sq": "c-out-squared",
    "sigma_sq": "snr",
    "sqrt": "inverse-root-gap",
    "one": "uniform",
}
STAGES = [
    pytest.param(fx, stage, name, id=f"{fx}-{name}")
    for fx in FOUND
    for stage in (1, 2)
    for name in fx.config[f"stage{stage}"]
]


def condition(fx: Fixture) -> dict[str, jax.Array]:
    label = jnp.asarray(fx.io["label_onehot"])
    return {"y": label, "null": jnp.zeros_like(label)}


def settings(fx: Fixture, case: dict) -> dict[str, Any]:
    """What a case says of a task."""
    toy, _ = network(fx, "net.model.", 1.0)
    c = fx.config
    distance: Any = Norm("sum-l2") if case["squared"] and not case["huber"] else PseudoHuber(case["huber"])
    return {
        "flow_map": data_map(Denoiser(toy, edm(fx), EDMPrecondition())),
        "distance": distance,
        "weight": WEIGHTS[case["weighting"]],
        "pairs": ShrinkingPairs(
            truncated(fx),
            floor=max(c["sigma_min"], case["min_r"]),
            count=1000 if case["quantize"] else None,
        ),
    }


def truncated(fx: Fixture) -> LogLevels:
    freedom, mean, scale, low, high = fx.config["log_t"]["paper"]
    return LogLevels(mean, scale, freedom, low, high)


def check(fx: Fixture, name: str, losses: Any, factor: Any, params: Any) -> None:
    loss, grads = jax.jit(jax.value_and_grad(lambda p: (factor * losses(p)).mean()))(params)
    fx.close(loss, f"{name}_loss", **LOSS)
    found = official(grads, f"{name}_grad_net.model.")
    assert set(found) == {k for k in fx.io if k.startswith(f"{name}_grad_")}
    for array, value in found.items():
        fx.close(value, array, **GRADIENT)


@pytest.mark.parametrize(("fx", "stage", "name"), [c for c in STAGES if c.values[1] == 1])
def test_first_stage(fx: Fixture, stage: int, name: str) -> None:
    case = fx.config["stage_defaults"] | fx.config[f"stage{stage}"][name]
    given, frozen = settings(fx, case), {"teacher": ours(fx.weights, "teacher.model.")}
    params, cond, x, eps = ours(fx.weights, "net.model."), condition(fx), image(fx, "x_start"), image(fx, "noise")
    if case.get("cd"):
        teacher = Denoiser(given["flow_map"].network, edm(fx), EDMPrecondition())
        guidance = ClassifierFree(case["guidance"] or 1.0)
        task: Any = ConsistencyDistillationTask(teacher=teacher, guidance=guidance, solver="euler", **given)
    else:
        task = ConsistencyTask(**given)
    times = task.pairs.pairs(edm(fx), jnp.asarray(fx.io["s1_t"]), np.float32(1.0 - case["ratio"]))
    fx.close(times.t, f"{name}_t", **TABLE)
    fx.close(times.r, f"{name}_r", **TABLE)
    x_t = x + expand(times.t, x) * eps
    fx.close(nchw(task.f(params, x_t, times.t, cond)), f"{name}_D_t", **ARRAY)
    x_r = task.earlier(frozen, x, x_t, eps, times, cond)
    fx.close(nchw(task.target(params, {}, x_r, times.r, cond)), f"{name}_D_r", **ARRAY)

    def losses(params: Any) -> jax.Array:
        return task.losses(params, frozen, {}, x, cond, times, eps)

    fx.close(losses(params), f"{name}_loss_per_sample", **LOSS)
    check(fx, name, losses, 1.0, params)


@pytest.mark.parametrize(("fx", "stage", "name"), [c for c in STAGES if c.values[1] == 2])
def test_second_stage(fx: Fixture, stage: int, name: str) -> None:
    c = fx.config
    case = c["stage_defaults"] | {"w_boundary": c["w_boundary"]} | c[f"stage{stage}"][name]
    assert truncated(fx).low == c["transition_t"]
    task = TruncatedTask(share=c["boundary_prob"], boundary=case["w_boundary"], **settings(fx, case))
    params, below = (ours(fx.weights, f"stage2.{part}.model.") for part in ("net", "cm_teacher"))
    cond, x, eps, mask = condition(fx), image(fx, "x_start"), image(fx, "noise"), fx.io["s2_boundary_mask"] == 1
    levels = task.pairs.levels.levels(jnp.asarray(fx.io["s2_time_u"]))
    times, factor = task.pairs_of(levels, jnp.asarray(fx.io["s2_permutation"]), np.float32(1.0 - case["ratio"]))
    fx.close(times.t, "s2_t", **ARRAY)
    fx.close(times.r, f"{name}_r", **ARRAY)
    x_t, x_r = (x + expand(t, x) * eps for t in (times.t, times.r))
    fx.close(nchw(task.f(params, x_t, times.t, cond)), f"{name}_D_t", **ARRAY)
    fx.close(nchw(task.target(params, {"below": below}, x_r, times.r, cond)), f"{name}_D_r", **ARRAY)

    def losses(params: Any) -> jax.Array:
        return task.losses(params, {}, {"below": below}, x, cond, times, eps)

    found = losses(params)
    fx.close(found, f"{name}_per_sample", **LOSS)
    fx.close(found[~mask].mean(), f"{name}_loss_consistency", **LOSS)
    fx.close(found[mask].mean(), f"{name}_loss_boundary", **LOSS)
    check(fx, name, losses, factor, params)


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_tables(fx: Fixture) -> None:
    c, process = fx.config, edm(fx)
    probe, r = jnp.asarray(fx.io["probe_t"]), jnp.asarray(fx.io["probe_r_weights"])
    for ratio in c["probe_ratio"]:
        law = ShrinkingPairs(floor=c["clamp_min"])
        fx.close(law.pairs(process, probe, np.float32(1.0 - ratio)).r, f"probe_r_ratio_{ratio:g}", **TABLE)
    for name, weight in WEIGHTS.items():
        fx.close(weighting(weight, probe, probe - r, process.sigma_data), f"probe_weight_{name}", **TABLE)
    for name, (q, limit, kimg, batch, begun) in c["schedule"].items():
        law = ShrinkingPairs(q=q, limit=limit, double=1000.0 * kimg / batch, begun=begun)
        stages = [law.stage(int(i)) for i in fx.io["sched_iteration"]]
        fx.close(np.array(stages, np.int32), f"sched_{name}_stage")
        fx.close(np.array([1.0 - law.left(stage) for stage in stages]), f"sched_{name}_ratio", **TABLE)
    for name, (freedom, mean, scale, low, high) in c["log_t"].items():
        levels = LogLevels(mean, scale, freedom, low, high).levels(jnp.asarray(fx.io["time_u"]))
        fx.close(levels, f"time_log_t_{name}", **ARRAY)


@pytest.mark.parametrize("fx", FOUND, ids=str)
def test_both_models_make_one_function(fx: Fixture) -> None:
    """The student from the transition on, the frozen model below."""
    case = fx.config["stage_defaults"]
    task = TruncatedTask(**settings(fx, case))
    params, below = (ours(fx.weights, f"stage2.{part}.model.") for part in ("net", "cm_teacher"))
    t, x = jnp.asarray(fx.io["blend_t"]), image(fx, "x_start")
    x_t = x + expand(t, x) * image(fx, "noise")
    fx.close(nchw(task.target(params, {"below": below}, x_t, t, condition(fx))), "blend_out", **ARRAY)
