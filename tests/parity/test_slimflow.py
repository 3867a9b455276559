"""SlimFlow: its network, annealing reflow, flow-guided distillation and samplers against the official code."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.process import Linear
from gen.distill.slimflow import AnnealingReflowTask, FlowGuidedTask, loss_weight
from gen.pretrained.slimflow import IMPORTER, denoiser
from gen.pretrained.systems import locate
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, nfe
from gen.sampling.solvers import Euler, Heun
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_rectified_flow import QUICK, StandIn
from tests.parity.toys import nchw, nhwc, walk


def loaded(fx: Fixture, prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """Network and parameters under a prefix; saved again they are the file."""
    weights = {k.removeprefix(prefix): v for k, v in fx.weights.items() if k.startswith(prefix)}
    network, params, _ = IMPORTER.load(weights, IMPORTER.infer(weights, size=fx.config["image_size"]))
    assert (network.width, network.blocks, network.mult) == (
        fx.config["nf"],
        fx.config["num_res_blocks"],
        tuple(fx.config["ch_mult"]),
    )
    assert network.attention == tuple(s for s in fx.config["attn_resolutions"] if s <= network.size)
    saved = IMPORTER.save(network, params)
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(saved[name], value, rtol=0.0, atol=1e-5 if name == "sigmas" else 0.0)
    return network, params


@pytest.mark.parametrize("fx", fixtures("slimflow-ncsnpp*"), ids=str)
def test_network(fx: Fixture) -> None:
    network, params = loaded(fx)
    assert locate(None, fx.weights).importer is IMPORTER
    flow = denoiser(network)
    x, t = jnp.asarray(nhwc(fx.io["x"])), 1.0 - jnp.asarray(fx.io["t"])
    fx.close(flow.parameterization.inputs(Linear(), x, t)[1][0], "time_cond")
    fx.close(nchw(-jax.jit(flow, compiler_options=QUICK)(params, x, t, {}).velocity), "y")


@pytest.mark.parametrize("fx", fixtures("slimflow-losses*"), ids=str)
def test_losses(fx: Fixture) -> None:
    network, student = loaded(fx, "student.")
    _, teacher = loaded(fx, "teacher.")
    flow = denoiser(network)
    call = jax.jit(flow, compiler_options=QUICK)
    x, z = (jnp.asarray(nhwc(fx.io[name])) for name in ("data", "noise"))
    for name in (k.removeprefix("weights.") for k in fx.io if k.startswith("weights.")):
        if name != "t":
            fx.close(loss_weight(1.0 - jnp.asarray(fx.io["weights.t"]), name), f"weights.{name}")
    _annealing(fx, flow, student, x, z)
    _distillation(fx, flow, call, student, teacher, x, z)
    _samplers(fx, lambda x, t: call(student, x, jnp.full(len(x), t), {}))


def _annealing(fx: Fixture, flow: Any, student: Any, x: jax.Array, z: jax.Array) -> None:
    horizon, _, law = fx.config["x0_randomness"].removeprefix("warmup_").partition(" ")
    task = AnnealingReflowTask(teacher=flow, flip=True, annealing=law.strip("()"), horizon=int(horizon))
    fx.close(np.float32([task.beta(k) for k in fx.io["beta_steps"]]), "beta_values")
    loss = jax.jit(task.loss, compiler_options=QUICK)
    for flip in (0, 1):
        name = f"anneal_flip{flip}"
        fresh = jnp.asarray(nhwc(fx.io[f"{name}.fresh_noise"]))
        beta = jnp.float32(task.beta(int(fx.io["anneal_step"])))
        data, noise = task.pair(x, z, fresh, jnp.full(len(x), bool(flip)), beta)
        fx.close(nchw(data), f"{name}.pair_data")
        fx.close(nchw(noise), f"{name}.pair_noise")
        t = task.time(jnp.asarray(fx.io[f"{name}.t_uniform"]))
        fx.close(1.0 - t, f"{name}.t")
        wide = t[:, None, None, None]
        fx.close(nchw((1.0 - wide) * data + wide * noise), f"{name}.xt")
        fx.close(nchw(data - noise), f"{name}.target")
        fx.close(loss(student, data, noise, {}, t)[0], f"{name}.loss")


def _distillation(fx: Fixture, flow: Any, call: Any, student: Any, teacher: Any, x: jax.Array, z: jax.Array) -> None:
    between = tuple(1.0 - t for t in reversed(fx.config["teacher_t_range"]))
    own = FlowGuidedTask(teacher=flow, between=between)
    tasks = {
        "distill_l2": own,
        "distill_lpips": dataclasses.replace(own, squared=0.0, perceptual=StandIn()),
        "distill_lpips_l2": dataclasses.replace(own, perceptual=StandIn()),
    }

    def guide(z: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return flow(teacher, z, t, cond).velocity

    frozen: dict[str, Any] = {"stand-in": {}}
    for name, task in tasks.items():
        fresh = jnp.asarray(nhwc(fx.io[f"{name}.fresh_noise"]))
        t = task.takeover(jnp.asarray(fx.io[f"{name}.t_uniform"]))
        run = jax.jit(
            jax.value_and_grad(lambda p, d, task=task: task.loss(p, guide, frozen, *d), has_aux=True),
            compiler_options=QUICK,
        )
        (loss, aux), grads = run(student, (x, z, {}, fresh, t))
        fx.close(loss, f"{name}.loss_total")
        fx.close(aux.metrics["pair_loss"], f"{name}.loss_distill")
        fx.close(aux.metrics["two_step_loss"], f"{name}.loss_two_step")
        official = IMPORTER.save(flow.network, grads)
        last = max(
            (k for k in official if k.endswith(".bias") and k.count(".") == 2), key=lambda k: int(k.split(".")[1])
        )
        fx.close(official[last], f"{name}.grad_last_bias")
        fx.close(official["all_modules.2.weight"], f"{name}.grad_first_conv")
    fx.close(1.0 - t, "two_step.t")
    v = call(student, fresh, jnp.full(len(x), own.times[0]), {}).velocity
    point, onward, target = own.two_steps(lambda z, t, cond: call(teacher, z, t, cond).velocity, fresh, v, t, {})
    for array, value in {"student_v": v, "teacher_v": onward, "target_v": target}.items():
        fx.close(-nchw(value), f"two_step.{array}")
    fx.close(nchw(point), "two_step.x_t")


def _samplers(fx: Fixture, call: Any) -> None:
    z, edge = jnp.asarray(nhwc(fx.io["sample.z"])), fx.config["eps"]
    fx.close(nchw(0.5 * (call(z, 1.0 - edge).denoised + 1.0)), "sample.one_step")
    for name in sorted(k for k in fx.io if k.startswith("sample.euler") and not k.endswith(".nfe")):
        n = int(name.removeprefix("sample.euler"))
        x = z
        for i in range(n):  # the official steps are 1 / N long, its times a little closer
            x = x - call(x, (1.0 - edge) * (1.0 - i / n)).velocity / n
        fx.close(nchw(0.5 * (x + 1.0)), name)
        assert nfe(Euler(), Grid(np.linspace(1.0 - edge, 0.0, n + 1), Linear())) == fx.io[f"{name}.nfe"]
    for name in sorted(k for k in fx.io if k.startswith("sample.heun") and not k.endswith(".nfe")):
        n = int(name.removeprefix("sample.heun"))
        grid = Grid(1.0 - np.linspace(edge, 1.0, n + 1), Linear())
        problem = Problem(lambda x, t, *rest: (call(x, t), ()), z, grid, lambda i: z, {})
        fx.close(nchw(0.5 * (walk(Heun(), problem)[-1] + 1.0)), name)
