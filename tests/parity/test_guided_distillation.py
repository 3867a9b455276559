"""Guided distillation against an independent implementation: targets, both stages, samplers, the scale's embedding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.edm_embeddings import positional
from gen.diffusion.backbones.guided import SCALE, GuidedConfig
from gen.diffusion.cosine import Cosine
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.process import expand
from gen.distill.guided_distillation import GuidedTask
from gen.distill.progressive_distillation import ProgressiveTask, halves, weighted_error
from gen.sampling.grids import Grid
from gen.sampling.integrate import Problem, integrate
from gen.sampling.solvers import DDIM
from gen.sampling.student_solvers import Backstep
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_progressive_distillation import network
from tests.parity.toys import official, ours


@pytest.mark.parametrize("fx", fixtures("guided-distillation*"), ids=str)
def test_guided(fx: Fixture) -> None:
    c, classes = fx.config, fx.config["num_classes"]
    process = Cosine(c["logsnr_min"], c["logsnr_max"])
    plain = network(c, process, null=1)
    teacher = Denoiser(plain, process, Predict("v"))
    # the toy takes w / w_max, the network of a guided student factor (w - 1) at our scale, which is the paper's + 1
    own = GuidedConfig(dataclasses.replace(plain, times=2), 1.0 / c["w_max"])
    guided = Denoiser(own, process, Predict("v"))
    task = GuidedTask(teacher=teacher, student=guided, scales=(1.0 + c["w_min"], 1.0 + c["w_max"]))
    params = ours(fx.weights, "teacher.")
    names = {"student.ww": "student.ws"}
    student = {"network": ours({names.get(k, k): v for k, v in fx.weights.items()}, "student.")}

    x, eps = jnp.asarray(fx.io["x"]), jnp.asarray(fx.io["noise"])
    null = jnp.broadcast_to(jax.nn.one_hot(classes, classes + 1), (len(x), classes + 1))
    cond = {"y": jax.nn.one_hot(fx.io["label"], classes + 1), "null": null}
    t, scale = jnp.asarray(fx.io["u"]), 1.0 + jnp.asarray(fx.io["w"])
    a, s = process.alpha(t), process.sigma(t)
    z = expand(a, x) * x + expand(s, x) * eps
    fx.close(2.0 * jnp.log(a / s), "logsnr")
    fx.close(z, "z")
    for name, given in (("cond", cond), ("uncond", plain_null(cond))):
        prediction = teacher(params, z, t, given)
        fx.close(prediction.value, f"v_{name}")
        fx.close(prediction.denoised, f"x_{name}")
    target = task.guided(params, z, t, cond, scale)
    fx.close(target, "x_target")
    fx.close(expand(a, z) * (z - expand(a, z) * target) / expand(s, z) - expand(s, z) * target, "v_target")
    found = guided(student, z, t, {**cond, SCALE: scale}).denoised
    fx.close(found, "student_x")
    fx.close(weighted_error(found, target, a, s), "loss_per_sample")
    (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(student, params, x, cond, t, eps, scale)
    fx.close(loss, "loss")
    for array, value in official(grads["network"], "grad.").items():
        fx.close(value, array.replace("grad.ws", "grad.ww"))

    steps = int(fx.io["stage2_num_steps"])
    assert steps == c["stage2_student_steps"]
    halving = ProgressiveTask(teacher=teacher, student=guided, steps=steps)
    at = halves(process, steps, jnp.asarray(fx.io["stage2_i"]))
    z = expand(at.a, x) * x + expand(at.s, x) * eps
    fx.close(z, "stage2_z")
    known = {**cond, SCALE: scale}
    wanted, middle, _ = halving.target(guided, student, z, at, known)
    fx.close(middle, "stage2_z_mid")
    fx.close(wanted, "stage2_x_target")
    noise = jnp.asarray(fx.io["sampler_noise"])
    draws = jnp.asarray(fx.io["stochastic_draws"])
    for name in sorted(k for k in fx.io if k.startswith(("deterministic", "stochastic")) and k != "stochastic_draws"):
        kind, n = name.rstrip("0123456789"), int(name[len(name.rstrip("0123456789")) :])
        solver = DDIM() if kind == "deterministic" else Backstep()
        grid = Grid(np.linspace(1.0, 0.0, n + 1), process)
        problem = Problem(guided.bind(student), noise, grid, lambda i: draws[i], known)
        fx.close(integrate(solver, problem), name)
    for name in (k for k in fx.io if k.startswith("emb_dim")):
        dim, _, factor = name.removeprefix("emb_dim").partition("_scale")
        w = jnp.asarray(fx.io["emb_w"]) * float(factor or 1000.0)
        # EDM's networks embed both times so: sines first
        features = jnp.roll(positional(w, int(dim), endpoint=True)[:, : int(dim) // 2 * 2], int(dim) // 2, axis=-1)
        fx.close(jnp.pad(features, ((0, 0), (0, int(dim) % 2))), name, atol=1e-3)


def plain_null(cond: dict[str, Any]) -> dict[str, Any]:
    return {"y": cond["null"], "null": cond["null"]}
