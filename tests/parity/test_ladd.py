"""LADD's losses, gradients and sampling against the official code, through the functions that train."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import Draws
from gen.diffusion.process import EDM, Linear
from gen.distill.discriminator import ApproximateR1
from gen.distill.ladd import LADDDraws, LADDTask
from gen.nn.adversarial import Heads, PooledHead
from gen.sampling.grids import Explicit
from gen.sampling.integrate import Problem, integrate
from gen.sampling.solvers import Renoise
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_fdistill import close_heads, heads_of
from tests.parity.toys import Toy, nchw, nhwc, official, ours

LOSS, GRADIENT = {"rtol": 1e-4, "atol": 0.0}, {"rtol": 1e-3, "atol": 0.0}  # the README's tolerances
FAMILIES = [
    pytest.param(fx, name, id=f"{fx}-{name}") for fx in fixtures("ladd-losses*") for name in fx.config["families"]
]
PARTS = {"0": "conv", "1": "norm", "3": "out"}  # of the head on transformers


def pooled(fx: Fixture, prefix: str, count: int) -> tuple[Heads, dict[str, Any]]:
    found, heads = {}, []
    for i in range(count):
        layers = ours(fx.weights, f"{prefix}.{i}.")
        found[f"head{i}"] = {name: layers[index] for index, name in PARTS.items()}
        heads.append(PooledHead(layers["0"]["kernel"].shape[2]))
        out = found[f"head{i}"]["out"]
        found[f"head{i}"]["out"] = out | {"kernel": out["kernel"][0, 0]}
    return Heads(tuple(heads)), {"heads": found}


def close_pooled(fx: Fixture, head: dict[str, Any], prefix: str) -> None:
    names = set()
    for i in range(len(head["heads"])):
        layers = {index: head["heads"][f"head{i}"][name] for index, name in PARTS.items()}
        layers["3"] = layers["3"] | {"kernel": layers["3"]["kernel"][None, None]}
        for name, value in official(layers, f"{prefix}.{i}.").items():
            fx.close(value, name, rtol=3e-3 if np.size(value) == 1 else 1e-3, atol=0.0)
            names.add(name)
    assert names == {name for name in fx.io if name.startswith(f"{prefix}.")}


@pytest.mark.parametrize(("fx", "name"), FAMILIES)
def test_ladd(fx: Fixture, name: str) -> None:
    c, family = fx.config, fx.config["families"][name]
    arrays = {key.removeprefix(f"{name}_"): value for key, value in fx.io.items() if key.startswith(f"{name}_")}
    picture = lambda key: jnp.asarray(nhwc(arrays[key]))  # noqa: E731
    edm, dit = family["schedule"] == "edm", family["head"] == "dit"
    net = Toy(c["channels"], c["toy_C"], c["toy_M"], c["num_classes"])
    kind = "cls_pred_heads" if dit else "discriminator_heads"
    head, weights = (pooled if dit else heads_of)(fx, f"{name}.discriminator.{kind}", 2)
    process = EDM(sigma_data=c["sigma_data"]) if edm else Linear()
    times = tuple(family["t_list"][:-1]) if family["t_list"] else (float(arrays["t_student"][0]),)
    task = LADDTask(
        teacher=Denoiser(net, process, EDMPrecondition() if edm else Predict("velocity")),
        times=times,
        head=head,
        taps=("h", "mid"),
        r1=ApproximateR1(family["r1_w"], family["r1_alpha"], clean=True) if family["r1_w"] else None,
    )
    student, teacher = (ours(fx.weights, f"{name}.{role}.model.") for role in ("net", "teacher"))
    real, cond = picture("real"), {"y": jnp.asarray(arrays["label_onehot"])}
    judged = Draws(jnp.asarray(arrays["t"]), picture("noise"))
    other = judged if family["same"] else Draws(jnp.asarray(arrays["t_real"]), picture("noise_real"))
    extra = {"r1": picture("r1_noise")} if task.r1 else {}
    index = np.abs(np.asarray(times)[None] - arrays["t_student"][:, None]).argmin(1)
    draws = LADDDraws(picture("z"), jnp.asarray(index), judged, Draws(other.t, other.eps, extra))

    x_t, t = task.student_input(real, draws)
    fx.close(t, f"{name}_t_student", rtol=1e-6, atol=0.0)
    fx.close(nchw(x_t), f"{name}_input_student", **LOSS)
    x = jax.jit(task.generate)(student, real, cond, draws)
    fx.close(nchw(x), f"{name}_generated", **LOSS)
    logits = jax.jit(task.logits)
    fx.close(logits(teacher, weights, x, cond, judged), f"{name}_gen_logits", **LOSS)
    run = jax.jit(jax.value_and_grad(task.student_loss, has_aux=True))
    (loss, _), grads = run(student, teacher, weights, real, cond, draws)
    fx.close(loss, f"{name}_loss_gen", **LOSS)
    towards = jax.jit(jax.grad(task.gan_loss, argnums=2))(teacher, weights, x, cond, judged)
    fx.close(nchw(towards), f"{name}_dloss_dx", **GRADIENT)
    for array, value in official(grads, f"{name}_grad_net.model.").items():
        fx.close(value, array, **GRADIENT)

    run = jax.jit(jax.value_and_grad(task.discriminator_loss, has_aux=True))
    (loss, aux), grads = run(weights, teacher, student, real, cond, draws)
    fx.close(loss, f"{name}_loss_disc_total", **LOSS)
    fx.close(aux.metrics["head_loss"], f"{name}_loss_disc", **LOSS)
    fx.close(logits(teacher, weights, x, cond, judged), f"{name}_disc_logits_fake", **LOSS)
    fx.close(logits(teacher, weights, real, cond, Draws(other.t, other.eps)), f"{name}_disc_logits_real", **LOSS)
    if task.r1:
        fx.close(aux.metrics["r1"], f"{name}_loss_r1", **LOSS)
        moved = jax.jit(task.judged)(teacher, weights, real + task.r1.spread * extra["r1"], other.t, cond)
        fx.close(moved, f"{name}_disc_logits_r1", **LOSS)
    (close_pooled if dit else close_heads)(fx, grads, f"{name}_grad_discriminator.{kind}")

    if "sample" in arrays:
        noise = picture("sample_noise")
        rows = {"y": cond["y"][: noise.shape[1]]}
        grid = Explicit((*times, 0.0))(process, len(times))
        start = jnp.float32(times[0]) * noise[0]
        problem = Problem(task.denoiser.bind(student), start, grid, lambda i: noise[i + 1], rows, {})
        fx.close(nchw(jax.jit(lambda: integrate(Renoise(), problem))()), f"{name}_sample", **LOSS)
