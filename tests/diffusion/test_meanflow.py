"""MeanFlow and shortcut models: the flow maps of any denoiser, draws, targets, a teacher's velocity, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.flowmap import AverageVelocity, FlowMap
from gen.diffusion.meanflow import MeanFlowTask, average_map
from gen.diffusion.objectives import Draws
from gen.diffusion.process import EDM, VP, Linear
from gen.diffusion.shortcut import ShortcutTask, bootstrap_halvings
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.sampling.flowmaps import FlowMapSampler
from gen.sampling.guidance import ClassifierFree
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.tiny import Tiny

TEACHER = Denoiser(Tiny(), Linear())
MAP = FlowMap(Tiny(times=2), Linear())
SHORT = FlowMap(Tiny(times=2), Linear(), AverageVelocity("halvings", finest=8))
X = jax.random.normal(jax.random.key(0), (8, 4, 3))
COND = {"label": jnp.arange(8, dtype=jnp.int32) % 3}
T = jnp.linspace(0.1, 0.9, 8)


@pytest.mark.parametrize(
    "teacher",
    [
        Denoiser(toy2d.Plane(), Linear(), Predict("velocity", scale=3.0)),
        Denoiser(toy2d.Plane(), Linear(), Predict("velocity", "reversed", sign=-1)),
        Denoiser(toy2d.Plane(), EDM(), Predict("x")),
        Denoiser(toy2d.Plane(), VP(), Predict("eps")),
    ],
    ids=["flow", "reversed", "edm", "vp"],
)
def test_a_flow_map_starts_as_any_teacher(teacher: Denoiser) -> None:
    """Its average velocity is the teacher's velocity, whatever the length, for the second time starts silent."""
    flow_map = average_map(teacher)
    task = MeanFlowTask(flow_map=flow_map, teacher=teacher)
    frozen = {"teacher": teacher.net.init(jax.random.key(0))}
    params = task.start(jax.random.key(1), frozen, None)["student"]
    x, cond = jax.random.normal(jax.random.key(2), (8, 1, 2)), {"label": COND["label"] % 2}
    u = flow_map.value(params, x, T, 0.5 * T, cond).value
    v = teacher.under(Linear())(frozen["teacher"], x, T, cond).velocity
    np.testing.assert_allclose(u, v, rtol=1e-3, atol=1e-3)
    learned = task.velocity(frozen, x, x, cond, Draws(T, x))
    np.testing.assert_allclose(learned, v, rtol=1e-4, atol=1e-4)


def test_draws_are_ordered_and_the_first_rows_are_instants() -> None:
    task = MeanFlowTask(flow_map=MAP, instant=0.5, dropout=0.3)
    draws = task.draw(jax.random.key(0), X)
    t, s, dropped = draws.t, draws.extra["s"], draws.extra["dropped"]
    np.testing.assert_array_equal(t[:4], s[:4])
    assert (s[4:] < t[4:]).all()
    assert (np.diff(np.asarray(dropped).astype(int)) <= 0).all()  # the first rows


def test_guidance_of_the_network_itself_is_classifier_free_guidance_of_its_target() -> None:
    """omega v + (1 - omega - kappa) v_u + kappa v_c; outside of its times, and where the condition is dropped, v."""
    task = MeanFlowTask(flow_map=MAP, omega=0.5, kappa=0.3, guided_to=0.6)
    params, v = MAP.net.init(jax.random.key(1)), -X
    draws = Draws(T, X, {"s": T, "dropped": jnp.arange(8) < 2})
    found = task.guided(params, v, X, COND, draws)
    null = {"label": jnp.full(8, 3)}
    v_u, v_c = (MAP.value(params, X, T, T, c).value for c in (null, COND))
    expected = jnp.where(((T <= 0.6) & (jnp.arange(8) >= 2))[:, None, None], 0.5 * v + 0.2 * v_u + 0.3 * v_c, v)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bootstrap_rows_share_the_lengths() -> None:
    np.testing.assert_array_equal(bootstrap_halvings(8, 128), [6, 5, 4, 3, 2, 1, 0, 0])
    np.testing.assert_array_equal(bootstrap_halvings(3, 128), [0, 0, 0])
    np.testing.assert_array_equal(bootstrap_halvings(16, 8, biased=True), [2, 2, 1, 1, 1, 1] + [0] * 10)
    draws = ShortcutTask(flow_map=SHORT, every=2).draw(jax.random.key(0), X)
    lengths = np.asarray(draws.t - draws.extra["s"])
    np.testing.assert_allclose(lengths, [0.25, 0.5, 1.0, 1.0] + [0.125] * 4, rtol=1e-6)
    np.testing.assert_allclose(draws.t / lengths, np.round(draws.t / lengths), atol=1e-5)


def test_two_jumps_make_the_target_of_one() -> None:
    task = ShortcutTask(flow_map=SHORT, every=1, limit=100.0)
    params, t, s = SHORT.net.init(jax.random.key(1)), jnp.full(8, 0.75), jnp.full(8, 0.25)
    velocity = task.two_jumps(params, X, COND, t, s)
    middle = SHORT(params, X, t, 0.5, COND)
    end = SHORT(params, middle, jnp.full(8, 0.5), s, COND)
    np.testing.assert_allclose(X - 0.5 * velocity, end, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    meanflow = {"flow_map": MAP}
    for message, make in {
        "there is none; give a teacher": lambda: MeanFlowTask(**meanflow, guidance=ClassifierFree(2.0)),
        "teacher's data are \\(8, 3\\)": lambda: MeanFlowTask(**meanflow, teacher=Denoiser(Tiny(size=(8,)), Linear())),
        "without a teacher; leave them at 1 and 0": lambda: MeanFlowTask(**meanflow, teacher=TEACHER, omega=2.0),
        "kappa is 1": lambda: MeanFlowTask(**meanflow, kappa=1.0),
        "expected a share": lambda: MeanFlowTask(**meanflow, instant=1.5),
        "takes the halvings": lambda: ShortcutTask(**meanflow),
        "halve times from 0 to 1": lambda: ShortcutTask(flow_map=dataclasses.replace(SHORT, process=EDM())),
        "not reached by halving": lambda: AverageVelocity("halvings", finest=12),
        "one row in 0": lambda: ShortcutTask(flow_map=SHORT, every=0),
        "frozen role 'teacher'": lambda: MeanFlowTask(**meanflow, teacher=TEACHER).start(jax.random.key(0), {}, None),
    }.items():
        with pytest.raises(GenError, match=message):
            make()


# In the plane the squared error of one sample says little about its mean: the paper's weight by 1 / S, made for
# thousands of dimensions, would draw the regression to single modes. Uniform times reach t = 1, where sampling starts.
TOY: dict[str, Any] = {
    "dropout": 0.0,
    "optim": OptimConfig(5e-3, schedule="cosine", clip=1.0),
    "emas": (Constant(0.99, warmup=True),),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "instant", "steps"), [(None, 0.5, 6000), (toy2d.DENOISER, 0.25, 3000)], ids=["scratch", "teacher"]
)
def test_meanflow_matches_the_data_in_one_step(teacher: Denoiser | None, instant: float, steps: int) -> None:
    task = MeanFlowTask(
        flow_map=average_map(toy2d.DENOISER), teacher=teacher, instant=instant, times=TimeSampler(), power=0.0, **TOY
    )
    frozen = (lambda params: {"teacher": params}) if teacher else lambda params: {}
    toy2d.check_toy(task, steps, sampler=FlowMapSampler(), frozen=frozen)


@pytest.mark.slow
def test_a_shortcut_model_matches_the_data_in_one_step() -> None:
    task = ShortcutTask(
        flow_map=average_map(toy2d.DENOISER, "halvings"), teacher=toy2d.DENOISER, every=2, biased=True, **TOY
    )
    toy2d.check_toy(task, 6000, sampler=FlowMapSampler())
