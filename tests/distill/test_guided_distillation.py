"""Guided distillation: a network that knows the scale starts as its teacher and learns guidance; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.backbones.guided import SCALE, GuidedConfig
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.process import Linear
from gen.distill.guided_distillation import GuidedTask, guided_student
from gen.errors import GenError
from gen.nn.conditions import make_conditions
from gen.sampling.guidance import ClassifierFree
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.tiny import Tiny

TEACHER = Denoiser(DiTConfig((4,), 3, 1, 16, 1, 2, num_classes=3, remat="none", scan=False), Linear())


def test_the_student_starts_as_its_teacher_at_every_scale() -> None:
    student = guided_student(TEACHER, usual=1.5)
    assert from_json(to_json(student)) == student
    task = GuidedTask(teacher=TEACHER, student=student)
    frozen = {"teacher": jax.tree.map(lambda leaf: leaf + 0.01, TEACHER.net.init(jax.random.key(0)))}
    params = task.start(jax.random.key(1), frozen, None)["student"]
    x, t, cond = jax.random.normal(jax.random.key(2), (3, 4, 3)), jnp.asarray([0.2, 0.5, 0.9]), {"label": jnp.arange(3)}
    own = TEACHER(frozen["teacher"], x, t, cond).velocity
    found = student(params, x, t, {**cond, SCALE: jnp.asarray([1.0, 2.0, 5.0])}).velocity
    np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-5)
    made = make_conditions(student.network.conditions, range(3))
    np.testing.assert_array_equal(made[SCALE], [1.5] * 3)
    assert task.conditions.keys() == {"label"}
    null = student.net.apply(params, {**cond, SCALE: made[SCALE]}, method="null")
    np.testing.assert_array_equal(null["label"], [3, 3, 3])
    np.testing.assert_array_equal(null[SCALE], made[SCALE])
    features = student(params, x, t, {**cond, SCALE: made[SCALE]}, taps=("block_0",)).extra
    assert features["block_0"].shape == (3, 4, 16)


def test_the_target_is_the_guided_teacher() -> None:
    task = GuidedTask(teacher=TEACHER, student=guided_student(TEACHER))
    params = jax.tree.map(lambda leaf: leaf + 0.02, TEACHER.net.init(jax.random.key(0)))
    x, t, cond = jax.random.normal(jax.random.key(2), (3, 4, 3)), jnp.asarray([0.2, 0.5, 0.9]), {"label": jnp.arange(3)}
    guided = ClassifierFree(2.5)(TEACHER.bind(params), lambda c: TEACHER.net.apply(params, c, method="null"))
    expected = guided(x, t, cond, jnp.int32(0), ())[0].denoised
    found = task.guided(params, x, t, cond, jnp.full(3, 2.5))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    plain = Denoiser(Tiny(classes=0), Linear())
    with pytest.raises(GenError, match="conditioned and knows the null condition"):
        GuidedTask(teacher=plain, student=guided_student(plain))
    with pytest.raises(GenError, match="takes no guidance scale"):
        GuidedTask(teacher=TEACHER, student=TEACHER)
    with pytest.raises(GenError, match="its own times are 2"):
        GuidedConfig(Tiny())


@pytest.mark.slow
def test_the_toy_is_guided_at_every_scale() -> None:
    """The student's data prediction follows the guided teacher's at scales that it was trained on."""
    student = guided_student(toy2d.DENOISER, factor=1.0)
    task = GuidedTask(
        teacher=toy2d.DENOISER,
        student=student,
        scales=(1.0, 3.0),
        optim=OptimConfig(2e-3, schedule="cosine", clip=1.0),
    )
    teacher = toy2d.teacher()
    state = toy2d.train(task, {"teacher": teacher}, 4000)
    rows = toy2d.batch(10_000)
    x, cond, t = rows["latent"], {"label": rows["label"]}, jnp.full(256, 0.6)
    z = 0.4 * x + 0.6 * jax.random.normal(jax.random.key(0), x.shape)
    for scale in (1.0, 2.0, 3.0):
        wanted = task.guided(teacher, z, t, cond, jnp.full(256, scale))
        found = student(task.export(state)["net"], z, t, {**cond, SCALE: jnp.full(256, scale)}).denoised
        plain = toy2d.DENOISER(teacher, z, t, cond).denoised
        error = float(jnp.square(found - wanted).mean())
        assert error < 2e-3 + 0.1 * float(jnp.square(plain - wanted).mean())
