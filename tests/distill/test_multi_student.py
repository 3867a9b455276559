import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.partitioned import Partitioned, class_means, clustered, contiguous, shuffled
from gen.data.sources import ArraySource
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import EDMLoss
from gen.diffusion.process import EDM, Linear
from gen.distill.dmd2 import DMD2Task
from gen.distill.multi_student import MultiStudentTask, ScoreMatchingTask
from gen.errors import GenError
from gen.nn.network import Network, Stacked, param_shapes
from gen.sampling.generator import OneStepGenerator
from gen.sampling.router import Routed, RoutedGenerator, Students, served
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill.test_dmd2 import DENOISER, NET, teacher
from tests.distill.tiny import Tiny

OPTIM = OptimConfig(lr=1e-3, eps=1e-3)
INNER = DMD2Task(teacher=DENOISER, optim=OPTIM, fake_optim=OPTIM, ratio=2, emas=(Constant(0.9),))
TASK = MultiStudentTask(INNER, (0, 1, 0))
LABELS = np.asarray([0, 2, 2, 0, 1, 1, 1, 1], np.int32)


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {"latent": jnp.asarray(rng.normal(size=(8, 4, 3)).astype(np.float32)), "label": jnp.asarray(LABELS)}


@pytest.fixture(scope="module")
def trained() -> tuple:
    """The state before and after an update of all students, and its metrics."""
    frozen = {"teacher": teacher()}
    state = jax.jit(lambda key: TASK.init(key, frozen, None))(jax.random.key(0))
    run = jax.jit(TASK.programs["student"])
    return state, *run(state, frozen, batch(), TASK.inputs(0, 2), jax.random.key(3))


def test_every_student_trains_as_it_would_alone(trained: tuple) -> None:
    """With its rows of the batch and its key, whatever the others do."""
    state, after, metrics = trained
    frozen, rows = {"teacher": teacher()}, batch()
    keys = jax.random.split(jax.random.key(3), 2)
    alone = jax.jit(INNER.programs["student"])
    losses = []
    for k in range(2):
        start = INNER.init(jax.random.key(0), frozen, None)
        own = {name: value[4 * k : 4 * k + 4] for name, value in rows.items()}
        single, found = alone(start, frozen, own, INNER.inputs(0, 2), keys[k])
        mine = jax.tree.map(lambda leaf, k=k: leaf[k], after.params["students"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, single.params)
        np.testing.assert_allclose(metrics[f"student/loss@{k}"], found["student/loss"], rtol=1e-4)
        losses.append(float(found["student/loss"]))
    np.testing.assert_allclose(metrics["student/loss"], np.mean(losses), rtol=1e-4)
    assert TASK.export(after)["students"]["inner"]["kernel"].shape == (2, 3, 16)
    assert int(state.step) == int(after.step) == 0  # the engine counts


def test_a_stage_goes_on_from_students_or_from_a_single_one(trained: tuple) -> None:
    _, after, _ = trained
    frozen = {"teacher": teacher()}
    following = TASK.init(jax.random.key(1), frozen, after)
    start, end = following.params["students"]["student"], after.params["students"]["student"]
    jax.tree.map(np.testing.assert_array_equal, start, end)
    matched = ScoreMatchingTask(teacher=DENOISER, student=DENOISER, optim=OPTIM)
    single = matched.init(jax.random.key(2), frozen, None)
    both = TASK.init(jax.random.key(1), frozen, single).params["students"]["student"]
    for k in range(2):
        mine = jax.tree.map(lambda leaf, k=k: leaf[k], both)
        jax.tree.map(np.testing.assert_array_equal, mine, single.params["student"])


def test_the_router_gives_every_sample_to_its_student() -> None:
    """As many of each class as may be: the samples are those of the students alone."""
    students = TASK.students
    params = Network(students.network).init(jax.random.key(0))
    generator = Routed().generator(TASK.models(), None)
    assert (generator.nfe, generator.shape) == (1, (4, 3))
    run = jax.jit(lambda keys, label: generator({"students": params}, keys, {"label": label}))
    keys = jax.random.split(jax.random.key(4), 6)
    for labels in ([0, 1, 2, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 2, 0, 0, 1]):
        label = jnp.asarray(labels, jnp.int32)
        found = run(keys, label)
        for k in range(2):
            own = {"net": jax.tree.map(lambda leaf, k=k: leaf[k], params)}
            alone = OneStepGenerator(DENOISER, 1.0)(own, keys, {"label": label})
            mine = np.asarray(TASK.partition)[labels] == k
            np.testing.assert_allclose(found[mine], alone[mine], rtol=1e-5, atol=1e-6)


def test_an_equal_share_is_served_at_a_time() -> None:
    rows, taken = served(jnp.asarray([0, 0, 0, 1, 2]), 2)  # the last one is done
    assert (rows.shape, taken.tolist()) == ((2, 3), [[True] * 3, [True, False, False]])
    assert (rows[0].tolist(), int(rows[1, 0])) == ([0, 1, 2], 3)


def test_stacked_networks_have_their_arrays_on_a_leading_axis() -> None:
    stacked, one = param_shapes(Stacked(NET, 3)), param_shapes(NET)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, (3, *b.shape)), stacked, one)
    drawn = Network(Stacked(NET, 3)).init(jax.random.key(0))["inner"]["kernel"]
    assert (drawn[0] != drawn[1]).any()


def test_score_matching_moves_a_small_student_towards_its_teacher() -> None:
    small = dataclasses.replace(DENOISER, network=Tiny(width=8))
    task = ScoreMatchingTask(teacher=DENOISER, student=small, optim=OptimConfig(lr=1e-2))
    frozen, rows = {"teacher": teacher()}, batch()
    state = task.init(jax.random.key(0), frozen, None)
    run, losses = jax.jit(task.programs["student"], donate_argnums=0), []
    for step in range(40):
        state, metrics = run(state, frozen, rows, task.inputs(step, 40), jax.random.key(step))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert task.models()["net"].config == small


def test_score_matching_weighs_noise_levels_as_edm_does() -> None:
    edm = Denoiser(NET, EDM(), EDMPrecondition(), EDMLoss())
    task = ScoreMatchingTask(teacher=edm, student=edm, optim=OPTIM)
    x, cond = batch()["latent"], {"label": batch()["label"]}
    mine, its = teacher(1), teacher(2)
    draws = EDMLoss().draw(jax.random.key(0), edm.process, x)
    loss, _ = task.loss(mine, its, x, cond, draws)
    x_t, sigma = x + draws.t[:, None, None] * draws.eps, np.asarray(draws.t)
    error = jnp.square(edm(mine, x_t, draws.t, cond).denoised - edm(its, x_t, draws.t, cond).denoised).mean((1, 2))
    np.testing.assert_allclose(loss, np.mean((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error), rtol=1e-4)


def test_partitions_are_even_and_cover_all_classes() -> None:
    assert contiguous(10, 3) == (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
    for partition in (contiguous(10, 3), shuffled(10, 3), clustered(np.random.default_rng(0).normal(size=(10, 2)), 3)):
        assert sorted(np.bincount(partition)) == [3, 3, 4]
    assert shuffled(10, 3) != contiguous(10, 3)
    far = np.asarray([[0.0], [9.0], [0.1], [9.1], [0.2], [9.2]])
    found = clustered(far, 2)
    assert found in ((0, 1) * 3, (1, 0) * 3)
    with pytest.raises(GenError, match="3 classes in 4 parts"):
        contiguous(3, 4)


@dataclasses.dataclass(frozen=True)
class Six:
    """Six records of three classes."""

    def source(self) -> ArraySource:
        return ArraySource(latent=np.arange(12.0).reshape(6, 2), label=np.arange(6) % 3)

    def batches(self, **where: int) -> Iterator[dict[str, np.ndarray]]:
        raise AssertionError

    def identity(self) -> str:
        return "six"


def test_batches_hold_the_parts_one_after_the_other() -> None:
    data = Partitioned(Six(), (0, 1, 0))
    rows = next(data.batches(batch=4, seed=0, start=0))
    assert np.asarray(data.partition)[rows["label"]].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(class_means(data.source(), 3, "latent"), [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    with pytest.raises(GenError, match="parts must divide the batch"):
        next(data.batches(batch=3, seed=0, start=0))
    with pytest.raises(GenError, match="part 1 of the data has 2 records"):
        next(data.batches(batch=6, seed=0, start=0))
    with pytest.raises(GenError, match="the data hold the label 2"):
        next(Partitioned(Six(), (0, 1)).batches(batch=2, seed=0, start=0))


def test_bad_input_is_refused() -> None:
    with pytest.raises(GenError, match="a partition of 2 classes for a model of 3"):
        MultiStudentTask(INNER, (0, 1))
    with pytest.raises(GenError, match="leaves a student without classes"):
        Students(DENOISER, (0, 2, 0))
    with pytest.raises(GenError, match="leaves a part without classes"):
        Partitioned(Six(), (1, 1))
    with pytest.raises(GenError, match="not divided among the 2 students"):
        TASK.check({"latent": np.zeros((4, 4, 3), np.float32), "label": np.asarray([0, 1, 2, 0])})
    TASK.check({name: np.asarray(value) for name, value in batch().items()})
    with pytest.raises(GenError, match="trained for, 1, and not in 4"):
        Routed().changed(steps=4).generator(TASK.models(), None)
    assert Routed().changed(steps=1).generator(TASK.models(), None).nfe == 1
    other = Denoiser(Tiny(channels=5), Linear(), Predict("velocity"))
    with pytest.raises(GenError, match="give the student's network the size"):
        ScoreMatchingTask(teacher=DENOISER, student=other)
    with pytest.raises(GenError, match="no times of a student"):
        RoutedGenerator(TASK.students, ())
