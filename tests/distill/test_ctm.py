"""Consistency trajectory models: jumps, stages with and without a discriminator, refusals, a known distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.diffusion.consistency_maps import data_map
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.flowmap import jump_map
from gen.diffusion.process import EDM
from gen.distill.ctm import CTMTask
from gen.distill.distances import Norm
from gen.errors import GenError
from gen.sampling.flowmaps import FlowMapSampler
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from tests.distill import toy2d
from tests.distill.test_dmd2 import DENOISER, batch, teacher
from tests.training.keys import Uses

OTHER = Denoiser(DENOISER.network, EDM(), EDMPrecondition())
TASK = CTMTask(
    flow_map=jump_map(DENOISER), teacher=DENOISER, points=6, most=4, last_layer="outer/kernel", optim=OptimConfig(1e-3)
)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A linear discriminator of latents with a buffer-free interface: logits and no statistics."""

    channels: int = 3

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return _Judge(self, rngs)


class _Judge(nnx.Module):
    def __init__(self, config: Judge, rngs: nnx.Rngs) -> None:
        self.out = nnx.Linear(config.channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.out(x), {}


def test_a_discriminator_takes_turns_and_the_target_follows_the_student() -> None:
    task = dataclasses.replace(TASK, discriminator=Judge())
    frozen = {"teacher": teacher()}
    first = TASK.init(jax.random.key(0), frozen, None)
    state = task.init(jax.random.key(1), frozen, first)
    assert [task.select(i) for i in range(3)] == ["student", "discriminator", "student"]
    assert (task.updates("student", 5), task.updates("discriminator", 5)) == (3, 2)
    assert set(TASK.programs) == {"student"}
    programs = {name: jax.jit(program) for name, program in task.programs.items()}
    after, metrics = programs["student"](state, frozen, batch(), task.inputs(0, 5), jax.random.key(1))
    assert {"student/consistency", "student/dsm", "student/dsm_weight", "student/gan_weight"} <= set(metrics)
    assert 0.01 <= float(metrics["student/gan_weight"]) <= 10.0
    jax.tree.map(np.testing.assert_array_equal, after.params["discriminator"], state.params["discriminator"])
    for target, old, now in zip(
        *map(jax.tree.leaves, (after.aux["target"], state.aux["target"], after.params["student"])), strict=True
    ):
        np.testing.assert_allclose(target, old + 0.001 * (now - old), rtol=1e-4, atol=1e-7)
    judged, metrics = programs["discriminator"](after, frozen, batch(), task.inputs(1, 5), jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, judged.params["student"], after.params["student"])
    assert float(metrics["discriminator/loss"]) > 0.0
    following = task.init(jax.random.key(3), frozen, judged)
    jax.tree.map(np.testing.assert_array_equal, following.aux["target"], judged.aux["target"])
    jax.tree.map(np.testing.assert_array_equal, following.params["discriminator"], judged.params["discriminator"])


def test_jumps_from_the_data_end_stay_and_have_finite_gradients() -> None:
    x, cond = batch()["latent"], {"label": batch()["label"]}
    params = TASK.init(jax.random.key(0), {"teacher": teacher()}, None).params["student"]
    zero = jnp.zeros(len(x))
    np.testing.assert_array_equal(TASK.jump(params, x, zero, zero, cond), x)
    grads = jax.grad(lambda p: TASK.jump(p, x, zero, zero, cond).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_the_student_starts_as_the_teachers_denoiser() -> None:
    """The toy's second time begins without a say, as DiT's does."""
    task = dataclasses.replace(TASK, teacher=toy2d.DENOISER, flow_map=jump_map(toy2d.DENOISER))
    given = toy2d.DENOISER.net.init(jax.random.key(1))
    start = task.init(jax.random.key(0), {"teacher": given}, None).params["student"]
    points, label = jax.random.normal(jax.random.key(2), (8, 1, 2)), {"label": jnp.arange(8) % 2}
    t = jnp.linspace(0.1, 0.9, 8)
    value = task.flow_map.value(start, points, t, 0.5 * t, label).value
    np.testing.assert_allclose(value, toy2d.DENOISER(given, points, t, label).denoised, rtol=1e-5, atol=1e-6)


def test_every_draw_has_a_key_of_its_own() -> None:
    uses = Uses()
    jax.block_until_ready(TASK.draw(uses.key(0), batch()["latent"]))
    assert uses.repeated() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flow_map": data_map(DENOISER)}, "jumps anywhere and knows s = t"),
        (
            {"flow_map": jump_map(Denoiser(DENOISER.network, EDM(), EDMPrecondition()))},
            "share trajectories only where both are equal",
        ),
        ({"most": 6}, "expected 1 to points - 1"),
        ({"dsm": -1.0}, "weights are >= 0"),
        ({"target_decay": 1.0}, r"expected a number in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(change: dict, words: str) -> None:
    with pytest.raises(GenError, match=words):
        dataclasses.replace(TASK, **change)


def test_missing_teachers_and_layers_are_named() -> None:
    with pytest.raises(GenError, match="needs the frozen role 'teacher'"):
        TASK.init(jax.random.key(0), {}, None)
    with pytest.raises(GenError, match="no parameter 'outer'; did you mean 'outer/bias'"):
        dataclasses.replace(TASK, last_layer="outer").init(jax.random.key(0), {"teacher": teacher()}, None)


@pytest.mark.slow
def test_a_students_one_step_is_nearer_than_four_of_its_teacher() -> None:
    task = CTMTask(
        flow_map=jump_map(toy2d.DENOISER),
        teacher=toy2d.DENOISER,
        points=13,
        most=12,
        distance=Norm(),
        last_layer="outer/kernel",
        target_decay=0.95,
        optim=OptimConfig(2e-3, schedule="cosine", clip=1.0),
        emas=(Constant(0.98, warmup=True),),
    )
    toy2d.check_toy(task, 1000, sampler=FlowMapSampler())
