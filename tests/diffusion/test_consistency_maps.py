"""Consistency functions made of denoisers: the same answers, in each process, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.consistency_maps import TrigPrecondition, TrigVelocity, consistency_map, data_map, trig_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.flowmap import Consistency, FlowMap, jump_map
from gen.diffusion.process import EDM, Linear, TrigFlow, expand, pair
from gen.errors import GenError
from tests.distill.tiny import Tiny

NET = Tiny()
TEACHERS = [Denoiser(NET, Linear(), Predict("velocity")), Denoiser(NET, EDM(), EDMPrecondition())]
COND = {"label": jnp.array([0, 1, 2])}
X = jax.random.normal(jax.random.key(2), (3, 4, 3))
LEVEL = jnp.array([0.1, 1.0, 20.0])


def params() -> dict:
    return TEACHERS[0].net.init(jax.random.key(0))


@pytest.mark.parametrize("teacher", TEACHERS, ids=["linear", "edm"])
def test_a_student_starts_as_its_teacher(teacher: Denoiser) -> None:
    process, p = teacher.process, params()
    t = process.time_of(-2.0 * jnp.log(LEVEL))
    denoised = teacher(p, X, t, COND).denoised
    np.testing.assert_allclose(data_map(teacher)(p, X, t, jnp.float32(process.t_min), COND), denoised, rtol=1e-5)
    trig = trig_map(teacher)
    angle = trig.process.time_of(-2.0 * jnp.log(LEVEL))
    size, own = (jnp.hypot(*pair(q, u, X)) for q, u in ((trig.process, angle), (process, t)))
    np.testing.assert_allclose(trig(p, X * size / own, angle, jnp.float32(0.0), COND), denoised, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(trig(p, X, 0.0 * angle + 1e-6, jnp.float32(0.0), COND), X, atol=1e-4)
    assert jump_map(teacher).network == dataclasses.replace(NET, times=2)


def test_the_scalings_follow_the_teacher() -> None:
    assert consistency_map(TEACHERS[1]).parameterization == Consistency()
    assert consistency_map(TEACHERS[0]) == data_map(TEACHERS[0])
    native = Denoiser(NET, TrigFlow(), TrigPrecondition())
    assert trig_map(native) == FlowMap(NET, TrigFlow(), TrigVelocity(TrigPrecondition()))
    assert trig_map(TEACHERS[0]).process == TrigFlow(1.0)


def test_trigflow_is_a_process_of_velocities() -> None:
    process, inner = TrigFlow(), TrigPrecondition()
    denoiser, p, t = Denoiser(NET, process, inner), params(), process.time_of(-2.0 * jnp.log(LEVEL))
    np.testing.assert_allclose(process.sigma(t) / process.alpha(t), LEVEL, rtol=1e-5)
    np.testing.assert_allclose(process.sigma_max, process.sigma(process.t_max) / process.alpha(process.t_max))
    found = denoiser(p, X, t, COND)
    denoised = expand(jnp.cos(t), X) * X - expand(jnp.sin(t), X) * found.velocity
    np.testing.assert_allclose(found.denoised, denoised, rtol=1e-4, atol=1e-5)
    eps = jax.random.normal(jax.random.key(4), X.shape)
    exact = expand(process.dalpha(t), X) * X + expand(process.dsigma(t), X) * eps
    np.testing.assert_allclose(process.sigma_data * inner.target(process, X, eps, t), exact, rtol=1e-5)


def test_other_processes_are_refused() -> None:
    for wrong in (Denoiser(NET, Linear(), TrigPrecondition()), FlowMap(NET, Linear(), TrigVelocity())):
        call = (params(), X, LEVEL, COND) if isinstance(wrong, Denoiser) else (params(), X, LEVEL, LEVEL, COND)
        with pytest.raises(GenError, match="needs the trig-flow process"):
            wrong(*call)
    with pytest.raises(GenError, match="both are positive"):
        TrigFlow(0.0)
