import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.distill.discriminator import ApproximateR1
from gen.distill.ladd import LADDTask
from gen.errors import GenError
from gen.nn.adversarial import Heads, PooledHead, TokenLogits
from gen.nn.network import Network
from gen.training.optim import OptimConfig
from tests.distill.test_dmd2 import DENOISER, batch, teacher
from tests.training.keys import Uses

TASK = LADDTask(
    teacher=DENOISER,
    head=Heads((TokenLogits(16, 8), TokenLogits(16, 8))),
    taps=("hidden", "again"),
    r1=ApproximateR1(1.0),
    ratio=3,
    optim=OptimConfig(lr=1e-3),
    head_optim=OptimConfig(lr=1e-3),
)


def test_the_discriminator_moves_more_often_and_alone() -> None:
    assert [TASK.select(i) for i in range(4)] == ["discriminator", "discriminator", "student", "discriminator"]
    assert (TASK.updates("student", 7), TASK.updates("discriminator", 7)) == (2, 5)
    frozen = {"teacher": teacher()}
    state = TASK.init(jax.random.key(0), frozen, None)
    given = (frozen, batch(), TASK.inputs(0, 3), jax.random.key(1))
    judged, metrics = jax.jit(TASK.programs["discriminator"])(state, *given)
    jax.tree.map(np.testing.assert_array_equal, judged.params["student"], state.params["student"])
    assert {"discriminator/r1", "discriminator/p_real", "discriminator/p_fake"} <= set(metrics)
    learned, _ = jax.jit(TASK.programs["student"])(judged, *given)
    jax.tree.map(np.testing.assert_array_equal, learned.params["discriminator"], judged.params["discriminator"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), learned.params["student"], judged.params["student"])
    assert all(jax.tree.leaves(moved))


def test_students_of_several_times_start_from_noised_data() -> None:
    task = dataclasses.replace(TASK, times=(0.9, 0.3))
    x = batch()["latent"]
    d = task.draw(jax.random.key(0), x)
    x_t, t = task.student_input(x, d)
    assert set(np.asarray(d.index)) == {0, 1}
    a = np.asarray(t)[:, None, None]
    np.testing.assert_allclose(x_t, (1.0 - a) * x + a * d.noise, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(TASK.student_input(x, TASK.draw(jax.random.key(0), x))[0], d.noise, rtol=1e-6)


def test_pairs_share_time_and_noise_and_no_key_is_used_twice() -> None:
    x = batch()["latent"]
    d = dataclasses.replace(TASK, paired=True).draw(jax.random.key(0), x)
    np.testing.assert_array_equal(d.real.t, d.fake.t)
    np.testing.assert_array_equal(d.real.eps, d.fake.eps)
    uses = Uses()
    apart = jax.block_until_ready(TASK.draw(uses.key(0), x))
    assert uses.repeated() == 0
    assert (apart.real.eps != apart.fake.eps).all()


def test_r1_sees_how_much_the_logits_change_near_real_data() -> None:
    """The disturbance stands on the noised data, or on the clean ones as published."""
    x, cond = batch()["latent"], {"label": batch()["label"]}
    head, params = Network(TASK.head).init(jax.random.key(3)), teacher()
    d = TASK.draw(jax.random.key(1), x)
    for clean in (False, True):
        task = dataclasses.replace(TASK, r1=ApproximateR1(2.0, 0.1, clean))
        loss, terms = task.head_loss(params, head, (x, cond, d.fake), (x, cond, d.real))
        start = x if clean else (1.0 - d.real.t[:, None, None]) * x + d.real.t[:, None, None] * d.real.eps
        moved = task.judged(params, head, start + 0.1 * d.real.extra["r1"], d.real.t, cond)
        change = jnp.square(task.logits(params, head, x, cond, d.real) - moved).mean()
        np.testing.assert_allclose(terms["r1"], change, rtol=1e-4)
        np.testing.assert_allclose(loss, terms["head_loss"] + 2.0 * change, rtol=1e-5)


def test_pooled_head_takes_maps_and_square_token_images_alike() -> None:
    head = Network(PooledHead(8))
    params, x = head.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    found = head(params, x)
    assert found.shape == (2, 1)
    np.testing.assert_allclose(head(params, x.reshape(2, 16, 8)), found, rtol=1e-6)
    with pytest.raises(GenError, match="12 tokens, which are no square"):
        head(params, x.reshape(2, 16, 8)[:, :12])


def test_heads_of_several_features() -> None:
    heads = Network(Heads((TokenLogits(4, 8), TokenLogits(6, 8))))
    params = heads.init(jax.random.key(0))
    x, y = jnp.ones((2, 5, 4)), jnp.ones((2, 3, 6))
    assert heads(params, x, y).shape == (2, 8)
    with pytest.raises(GenError, match="1 tapped features for 2 heads"):
        heads(params, x)
    with pytest.raises(GenError, match="no heads"):
        Heads(())
    with pytest.raises(GenError, match="even number"):
        PooledHead(5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratio": 1}, "ratio is 1"),
        ({"head": None, "taps": ()}, "discriminator's loss alone"),
        ({"taps": ()}, "both `head` and `taps`"),
    ],
)
def test_bad_configurations_are_named(change: dict, words: str) -> None:
    with pytest.raises(GenError, match=words):
        dataclasses.replace(TASK, **change)
    with pytest.raises(GenError, match="positive numbers"):
        ApproximateR1(0.0)
