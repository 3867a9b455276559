"""Continuous-time consistency models: the tangent is the derivative of f, and students of a known distribution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.consistency_maps import data_map, trig_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.process import EDM, expand
from gen.distill.scm import SCDTask, SCMTask, normalised, tangent
from gen.errors import GenError
from gen.sampling.flowmaps import FlowMapSampler
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.test_dmd2 import DENOISER, batch, teacher

TEACHERS = {"linear": DENOISER, "edm": Denoiser(DENOISER.network, EDM(), EDMPrecondition())}


def task(name: str = "linear", **settings: Any) -> SCDTask:
    return SCDTask(flow_map=trig_map(TEACHERS[name]), teacher=TEACHERS[name], optim=OptimConfig(1e-3), **settings)


@pytest.mark.parametrize("name", ["linear", pytest.param("edm", marks=pytest.mark.slow)])
def test_the_tangent_is_the_change_of_f_along_the_flow(name: str) -> None:
    """cos t df/dt, by differences along the teacher's velocity."""
    scd, params, cond = task(name), teacher(3), {"label": batch()["label"]}
    t = jnp.linspace(0.3, 1.3, 8)
    x_t = jax.random.normal(jax.random.key(1), (8, 4, 3))
    v = scd.velocity({"teacher": teacher()}, x_t, x_t, x_t, t, cond)
    found = scd.derivative(params, x_t, t, v, cond)
    g = tangent(found.value, found.tangent, v, x_t, t, 1.0)
    h, zero = 3e-3, jnp.zeros_like(t)
    ends = [scd.flow_map(params, x_t + sign * h * v, t + sign * h, zero, cond) for sign in (1.0, -1.0)]
    np.testing.assert_allclose(g, expand(jnp.cos(t), x_t) * (ends[0] - ends[1]) / (2.0 * h), rtol=3e-2, atol=3e-3)


def test_normalised_tangents_are_short() -> None:
    g = 100.0 * jax.random.normal(jax.random.key(0), (3, 4, 5))
    for scaling, size in (("sum", 1.0), ("mean", np.sqrt(20.0))):
        lengths = jnp.linalg.norm(normalised(g, 0.1, scaling).reshape(3, -1), axis=1)  # type: ignore[arg-type]
        np.testing.assert_allclose(lengths, size, rtol=1e-2)


def test_a_step_trains_student_and_weight_and_warms_up() -> None:
    scd = task(warmup=10, weight_optim=OptimConfig(1e-2))
    frozen = {"teacher": teacher()}
    state = scd.init(jax.random.key(0), frozen, None)
    program = jax.jit(scd.update)
    assert [float(scd.inputs(step, 100)["r"]) for step in (0, 5, 10, 50)] == [0.0, 0.5, 1.0, 1.0]
    new, metrics = program(state, frozen, batch(), scd.inputs(5, 100), jax.random.key(1))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), new.params, state.params)
    assert all(jax.tree.leaves(changed))
    assert {"student/loss", "student/tangent", "weight/loss"} <= set(metrics)
    np.testing.assert_allclose(metrics["student/loss"], metrics["weight/loss"], rtol=1e-5)
    assert set(scd.export(new)) == {"net"}
    following = scd.init(jax.random.key(0), frozen, new)
    jax.tree.map(np.testing.assert_array_equal, following.params["student"], new.params["student"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SCMTask(flow_map=data_map(DENOISER)), "trig_map"),
        (lambda: task(warmup=0), "both are positive"),
        (lambda: task(scaling="none"), "scaling"),
        (lambda: task().init(jax.random.key(0), {}, None), "needs the frozen role 'teacher'"),
    ],
)
def test_bad_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(GenError, match=words):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SCMTask, SCDTask])
def test_a_students_one_step_is_nearer_than_four_of_its_teacher(kind: type[SCMTask]) -> None:
    """At the paper's levels: what f is spreads from the data upwards, so that low noise has to be seen often."""
    trained = kind(
        flow_map=trig_map(toy2d.DENOISER),
        warmup=500,
        optim=OptimConfig(1e-3, betas=(0.9, 0.99), schedule="cosine", clip=1.0),
        weight_optim=OptimConfig(1e-2),
        emas=(Constant(0.98, warmup=True),),
        **({"teacher": toy2d.DENOISER} if kind is SCDTask else {}),
    )
    toy2d.check_toy(trained, 2000, sampler=FlowMapSampler())
