"""Consistency models: pairs of times, targets, stages, what is refused, and students of a known distribution."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.consistency_maps import consistency_map, data_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import FlowMap, jump_map
from gen.diffusion.process import EDM, Linear, expand
from gen.distill.consistency import ConsistencyDistillationTask, ConsistencyTask, TruncatedTask
from gen.distill.distances import Norm, Perceptual, PseudoHuber
from gen.distill.pairs import Doubling, Fixed, GridPairs, LogLevels, Progressive, ShrinkingPairs, snapped
from gen.errors import GenError
from gen.sampling.flowmaps import FlowMapSampler
from gen.tokenizers.losses import LPIPS
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.test_dmd2 import DENOISER, batch, teacher
from tests.training.keys import Uses

EDM_TEACHER = Denoiser(DENOISER.network, EDM(), EDMPrecondition())
OPTIM = OptimConfig(lr=1e-3)
TRAINING = ConsistencyTask(
    flow_map=consistency_map(EDM_TEACHER), pairs=GridPairs(Progressive(2, 8)), target_decay=0.9, optim=OPTIM
)
DISTILLATION = ConsistencyDistillationTask(
    flow_map=data_map(DENOISER), teacher=DENOISER, pairs=GridPairs(Fixed(6)), optim=OPTIM
)
TRUNCATED = TruncatedTask(flow_map=data_map(EDM_TEACHER), optim=OPTIM)


def draws(law: Any, process: Any, step: int, steps: int, count: int = 512) -> tuple[Any, Any]:
    schedule = law.schedule(process, step, steps)
    return law.draw(jax.random.key(3), process, count, schedule), schedule


@pytest.mark.parametrize("law", [GridPairs(Doubling(4, 32), mean=-1.1), GridPairs(Progressive(2, 32))])
@pytest.mark.parametrize("process", [EDM(), Linear()], ids=["edm", "linear"])
def test_growing_grids_keep_their_shapes_and_draw_neighbours(law: GridPairs, process: Any) -> None:
    shapes = set()
    for step in (0, 50, 99):
        pair, schedule = draws(law, process, step, 100)
        shapes.add(tuple(sorted((name, value.shape) for name, value in schedule.items())))
        times, mass = law.table(process, law.curriculum.points(step, 100))
        index = np.searchsorted(times.astype(np.float32), np.asarray(pair.r))
        np.testing.assert_allclose(pair.t, times.astype(np.float32)[index + 1], rtol=1e-6)
        np.testing.assert_allclose(pair.gap, np.diff(times)[index], rtol=1e-5)
        found = np.bincount(index, minlength=len(mass)) / len(index)
        assert np.abs(found - mass).max() < 0.1
    assert len(shapes) == 1
    assert law.curriculum.points(99, 100) > law.curriculum.points(0, 100)
    assert law.derived
    assert not GridPairs().derived


def test_shrinking_pairs_close_in_stages_and_end_above_their_floor() -> None:
    law = ShrinkingPairs(double=10, q=4.0, limit=0.99, floor=0.002)
    gaps = []
    for step in (0, 10, 40):
        pair, _ = draws(law, EDM(), step, 100)
        assert (pair.r >= 0.002 - 1e-7).all()
        assert (pair.t > pair.r).all()
        np.testing.assert_allclose(pair.gap, pair.t - pair.r, rtol=2e-2, atol=1e-6)
        gaps.append(float((pair.gap / pair.t).mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert law.left(law.stage(40)) == pytest.approx(0.01)
    linear, _ = draws(law, Linear(), 40, 100)
    edm, _ = draws(law, EDM(), 40, 100)
    np.testing.assert_allclose(linear.t / (1.0 - linear.t), edm.t, rtol=1e-3)  # the same noise levels


def test_levels_are_distributed_as_told() -> None:
    u = jnp.linspace(0.001, 0.999, 999)
    np.testing.assert_allclose(jnp.log(LogLevels(-1.0, 2.0).levels(u[499:500])), -1.0, atol=1e-5)
    for law in (LogLevels(-1.0, 2.0, low=0.1, high=3.0), LogLevels(0.0, 0.2, 0.01, 1.0, 80.0)):
        found = law.levels(u)
        assert (jnp.diff(found) > 0.0).all()
        assert law.low is not None
        assert law.low < found[0] < found[-1] < (law.high or 0.0)


def test_levels_on_a_grid_stay_two() -> None:
    table = np.array([1.0, 2.0, 4.0])
    t, r = snapped(table, jnp.array([1.1, 3.9, 2.6]), jnp.array([0.9, 3.8, 1.0]))
    np.testing.assert_array_equal(t, [2.0, 4.0, 2.0])
    np.testing.assert_array_equal(r, [1.0, 2.0, 1.0])


def test_the_target_at_clean_data_is_the_data() -> None:
    x, cond = batch()["latent"], {"label": batch()["label"]}
    found = TRUNCATED.f(teacher(), x, jnp.zeros(len(x)), cond)
    np.testing.assert_array_equal(found, x)
    a_little = TRAINING.f(teacher(), x, jnp.full(len(x), 0.002), cond)
    np.testing.assert_allclose(a_little, x, rtol=1e-5, atol=1e-6)


def test_the_teachers_step_leads_along_its_flow() -> None:
    """A student that is the teacher's exact consistency function has no loss: normal data, whose flow is known."""
    x, eps = jax.random.normal(jax.random.key(0), (2, 8, 4, 3))
    pair, _ = draws(DISTILLATION.pairs, Linear(), 0, 1, 8)
    cond, frozen = {"label": batch()["label"]}, {"teacher": teacher()}
    x_t = expand(1.0 - pair.t, x) * x + expand(pair.t, x) * eps
    fine = x_t
    for i in range(64):
        now = pair.t + (pair.r - pair.t) * i / 64
        fine = fine + expand((pair.r - pair.t) / 64, x) * DENOISER(frozen["teacher"], fine, now, cond).velocity
    heun = DISTILLATION.earlier(frozen, x, x_t, eps, pair, cond)
    euler = dataclasses.replace(DISTILLATION, solver="euler").earlier(frozen, x, x_t, eps, pair, cond)
    assert jnp.abs(heun - fine).max() < 0.2 * jnp.abs(euler - fine).max()


def test_an_averaged_target_follows_and_a_skipped_step_leaves_it() -> None:
    state = TRAINING.init(jax.random.key(0), {}, None)
    jax.tree.map(np.testing.assert_array_equal, state.aux["target"], state.params["student"])
    program, schedule = jax.jit(TRAINING.update), TRAINING.inputs(3, 10)
    assert schedule["target_decay"] == pytest.approx(0.9 ** (2 / (TRAINING.pairs.curriculum.points(3, 10) - 1)))
    new, metrics = program(state, {}, batch(), schedule, jax.random.key(1))
    share = 1.0 - float(schedule["target_decay"])
    trees = (new.aux["target"], state.aux["target"], new.params["student"])
    for target, old, now in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(target, old + share * (now - old), rtol=1e-4, atol=1e-7)
    assert float(metrics["skipped"]) == 0.0
    broken = batch() | {"latent": jnp.full_like(batch()["latent"], jnp.nan)}
    kept, metrics = program(state, {}, broken, schedule, jax.random.key(1))
    assert float(metrics["skipped"]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, kept.aux["target"], state.aux["target"])


def test_truncated_training_goes_on_from_the_first_stages_average() -> None:
    first = dataclasses.replace(TRAINING, flow_map=data_map(EDM_TEACHER), emas=(Constant(0.9),))
    state = first.init(jax.random.key(0), {}, None)
    state = dataclasses.replace(state, ema={"student": teacher(5)})
    second = TRUNCATED.init(jax.random.key(1), {}, state)
    for tree in (second.params["student"], second.aux["below"]):
        jax.tree.map(np.testing.assert_array_equal, tree, teacher(5))
    pair, factor = TRUNCATED.draw(jax.random.key(0), batch()["latent"], TRUNCATED.inputs(0, 1))
    np.testing.assert_allclose(np.unique(np.asarray(factor)), [0.1 * 8 / 2, 8 / 6], rtol=1e-6)
    np.testing.assert_allclose(pair.t[factor < 1.0], 1.0, rtol=1e-6)
    assert (pair.t >= 1.0).all()


@pytest.mark.parametrize("task", [TRAINING, DISTILLATION, TRUNCATED], ids=["ct", "cd", "tcm"])
def test_every_draw_has_a_key_of_its_own(task: ConsistencyTask) -> None:
    uses = Uses()
    jax.block_until_ready(task.draw(uses.key(0), batch()["latent"], task.inputs(0, 10))[0].t)
    assert uses.repeated() == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dataclasses.replace(TRAINING, flow_map=jump_map(EDM_TEACHER)), "give it a consistency function"),
        (lambda: dataclasses.replace(TRAINING, target_decay=1.5), "between 0 and 1, or None"),
        (lambda: dataclasses.replace(TRAINING, pairs=ShrinkingPairs()), "follows the curriculum of a grid"),
        (lambda: dataclasses.replace(TRAINING, weight="none"), "weight"),
        (
            lambda: dataclasses.replace(DISTILLATION, teacher=EDM_TEACHER),
            "share trajectories only where both are equal",
        ),
        (lambda: DISTILLATION.init(jax.random.key(0), {}, None), "needs the frozen role 'teacher'"),
        (lambda: TRUNCATED.init(jax.random.key(0), {}, None), "make it the second stage of one"),
        (lambda: dataclasses.replace(TRUNCATED, pairs=GridPairs()), "end below at the transition"),
        (lambda: dataclasses.replace(TRUNCATED, share=0.0), "share is 0"),
        (lambda: TRUNCATED.draw(jax.random.key(0), batch(2)["latent"], {"left": 0.5}), "it needs some of both kinds"),
        (lambda: Fixed(1), "expected at least 2"),
        (lambda: Progressive(5, 3), "no fewer in the end"),
        (lambda: LogLevels(low=1.0), "both ends rising, or neither"),
        (lambda: LogLevels(freedom=1.0), "truncate it by low and high"),
        (lambda: ShrinkingPairs(q=1.0), "expected a factor above 1"),
        (lambda: PseudoHuber(-1.0), "at least 0"),
        (lambda: Norm("l3"), "form"),
        (lambda: Perceptual(LPIPS()).expect({}), "needs the frozen role 'lpips-vgg'"),
    ],
)
def test_bad_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(GenError, match=words):
        make()


def test_norms_of_equal_samples_have_no_gradient() -> None:
    x = jnp.ones((2, 3))
    for distance in (PseudoHuber(0.0), PseudoHuber(), Norm("l2"), Norm("sum-l2")):
        value, grad = jax.value_and_grad(lambda y, d=distance: d({}, x, y).sum())(x)
        np.testing.assert_array_equal(value, 0.0)
        np.testing.assert_array_equal(grad, 0.0)
    far = PseudoHuber(0.0)({}, x, jnp.zeros_like(x))
    np.testing.assert_allclose(far, np.sqrt(3.0), rtol=1e-6)


def falling(lr: float) -> dict[str, Any]:
    return {"optim": OptimConfig(lr, schedule="cosine", clip=1.0), "emas": (Constant(0.98, warmup=True),)}


ONE = FlowMapSampler()
TOYS = {
    "cd": ConsistencyDistillationTask(
        flow_map=data_map(toy2d.DENOISER),
        teacher=toy2d.DENOISER,
        pairs=GridPairs(Fixed(13)),
        distance=Norm(),
        weight="uniform",
        **falling(2e-3),
    ),
    "ect": ConsistencyTask(
        flow_map=data_map(toy2d.DENOISER),
        pairs=ShrinkingPairs(LogLevels(0.0, 1.6), double=300),
        distance=PseudoHuber(0.03),
        **falling(2e-3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("cd", 1000), ("ect", 1500)])
def test_a_students_one_step_is_nearer_than_four_of_its_teacher(name: str, steps: int) -> None:
    toy2d.check_toy(TOYS[name], steps, sampler=ONE)


@pytest.mark.slow
def test_truncated_training_in_two_stages() -> None:
    first = toy2d.train(TOYS["ect"], {"teacher": toy2d.teacher()}, 1200)
    pairs = ShrinkingPairs(LogLevels(0.0, 1.2, 2.0, 1.0, 80.0), begun=1200, double=300)
    second = TruncatedTask(flow_map=data_map(toy2d.DENOISER), pairs=pairs, distance=PseudoHuber(0.03), **falling(1e-3))
    toy2d.check_toy(second, 1200, sampler=ONE, previous=first)


def test_flow_maps_start_anew_without_a_teacher() -> None:
    task = dataclasses.replace(TRAINING, target_decay=None)
    fresh = task.init(jax.random.key(4), {}, None).params["student"]
    taken = task.init(jax.random.key(4), {"teacher": teacher()}, None).params["student"]
    jax.tree.map(np.testing.assert_array_equal, taken, teacher())
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (fresh, taken)), strict=True))
    assert isinstance(task.models()["net"].config, FlowMap)
    assert (task.classes_at, DISTILLATION.classes_at) == ("flow_map.network.num_classes", "")
