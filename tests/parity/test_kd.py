"""Regression on stored teacher trajectories against the official losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.process import EDM, Linear
from gen.distill.kd import KDTask, regression_loss
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import Toy, nchw, nhwc, official, ours

LOSS, ARRAY = {"rtol": 1e-5, "atol": 0.0}, {"rtol": 1e-4, "atol": 0.0}  # the README's tolerances


@pytest.mark.parametrize("fx", fixtures("kd-loss*"), ids=str)
def test_kd(fx: Fixture) -> None:
    for name, family in fx.config["families"].items():
        check_family(fx, name, family)


def check_family(fx: Fixture, name: str, family: dict) -> None:
    c = fx.config
    net = Toy(c["channels"], c["toy_C"], c["toy_M"], c["num_classes"])
    if family["schedule"] == "edm":
        process, parameterization = EDM(sigma_data=c["sigma_data"]), EDMPrecondition()
    else:
        process, parameterization = Linear(), Predict("velocity")
    several = f"{name}_ids" in fx.io
    if several:  # the official default is equally spaced
        times = tuple((family["t_list"] or np.linspace(0.999, 0.0, family["steps"] + 1).tolist())[:-1])
    else:
        times = (float(fx.io[f"{name}_t_student"][0]),)
    task = KDTask(teacher=Denoiser(net, process, parameterization), times=times)
    params = ours(fx.weights, f"{name}.net.model.")
    real = jnp.asarray(nhwc(fx.io[f"{name}_real"]))
    cond = {"y": jnp.asarray(fx.io[f"{name}_label_onehot"])}
    stored = f"{name}_path" if f"{name}_path" in fx.io else f"{name}_noise"
    path = jnp.asarray(nhwc(fx.io[stored])).reshape(len(real), -1, *real.shape[1:])
    index = jnp.asarray(fx.io[f"{name}_ids"]) if several else jnp.zeros(len(real), jnp.int32)
    x_t, t = task.student_input(path, index)
    fx.close(nchw(x_t), f"{name}_input_student", rtol=0.0, atol=0.0)
    fx.close(t, f"{name}_t_student", **LOSS)
    x = task.denoiser(params, x_t, t, cond).denoised
    fx.close(nchw(x), f"{name}_generated", **ARRAY)
    (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, path, index, real, cond)
    fx.close(loss, f"{name}_loss", **LOSS)
    fx.close(nchw(jax.grad(regression_loss)(x, real)), f"{name}_dloss_dx", **ARRAY)
    found = official(grads, f"{name}_grad_net.model.")
    assert set(found) == {k for k in fx.io if k.startswith(f"{name}_grad_")}
    for array, value in found.items():
        fx.close(np.asarray(value), array, **ARRAY)
