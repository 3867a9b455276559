import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.distill.kd import KDTask, regression_loss
from gen.errors import GenError
from gen.training.optim import OptimConfig
from tests.distill.test_dmd2 import DENOISER, batch, teacher


def test_regression_loss_and_its_gradient() -> None:
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(jax.grad(regression_loss)(x, y), (x - y) / x.size, rtol=1e-5)


def test_one_step_student_learns_stored_pairs() -> None:
    task = KDTask(teacher=DENOISER, optim=OptimConfig(lr=3e-3))
    frozen = {"teacher": teacher()}
    state = task.init(jax.random.key(0), frozen, None)
    program = jax.jit(task.programs[task.select(0)], donate_argnums=0)
    noise = jax.random.normal(jax.random.key(4), (8, 4, 3))
    data = batch() | {"noise": noise, "latent": 0.5 * noise}
    losses = []
    for step in range(60):
        state, metrics = program(state, frozen, data, task.inputs(step, 60), jax.random.key(step))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    assert program._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, frozen["teacher"], teacher())


def test_each_time_reads_its_own_point_of_the_path() -> None:
    task = KDTask(teacher=DENOISER, times=(0.9, 0.6))
    path = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], (3, 4, 2, 1))
    x, t = task.student_input(path, jnp.asarray([0, 1, 1]))
    np.testing.assert_array_equal(x[:, 0, 0], [0.0, 2.0, 2.0])
    np.testing.assert_allclose(t, [0.9, 0.6, 0.6], rtol=1e-6)


def test_times_must_decrease() -> None:
    with pytest.raises(GenError, match="must decrease"):
        KDTask(teacher=DENOISER, times=(0.2, 0.9))
    with pytest.raises(GenError, match="'teacher'"):
        KDTask(teacher=DENOISER).init(jax.random.key(0), {}, None)


def test_data_without_what_a_teacher_made_are_refused() -> None:
    row = {"latent": np.zeros((2, 4, 3), np.float32), "label": np.zeros(2, np.int32)}
    for times, name in (((0.9,), "noise"), ((0.9, 0.6), "path")):
        with pytest.raises(GenError, match=f"hold no '{name}': regression needs what a teacher made"):
            KDTask(teacher=DENOISER, times=times).check(row)
    KDTask(teacher=DENOISER).check(row | {"noise": row["latent"]})
