import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.process import EDM, Linear
from gen.diffusion.times import Levels
from gen.distill.f_distill import DIVERGENCES, FDistillTask, RatioBins, density_ratio, divergence_weight
from gen.errors import GenError
from gen.nn.adversarial import TokenLogits
from gen.nn.network import Network
from gen.training.optim import OptimConfig
from tests.distill.test_dmd2 import DENOISER, batch, teacher

OPTIM = OptimConfig(lr=1e-3)
TASK = FDistillTask(
    teacher=DENOISER, head=TokenLogits(16, 8), taps=("hidden",), optim=OPTIM, fake_optim=OPTIM, bins=RatioBins(4)
)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_weights_are_r_squared_times_the_second_derivative(name: str) -> None:
    """Each h up to a constant, from the divergence's own f (table 1 of the paper)."""
    f = {
        "reverse-kl": lambda r: -jnp.log(r),
        "kl": lambda r: r * jnp.log(r),
        "js": lambda r: r * jnp.log(r) - (r + 1.0) * jnp.log((r + 1.0) / 2.0),
        "softened-reverse-kl": lambda r: (r + 1.0) * jnp.log((r + 1.0) / (2.0 * r)),
        "hellinger": lambda r: jnp.square(1.0 - jnp.sqrt(r)),
        "jeffreys": lambda r: (r - 1.0) * jnp.log(r),
        "neyman": lambda r: jnp.square(1.0 - r) / r,
    }[name]
    r = jnp.linspace(0.3, 4.0, 7)
    h = r**2 * jax.vmap(jax.grad(jax.grad(f)))(r)
    found = DIVERGENCES[name](r)
    np.testing.assert_allclose(found / found[0], h / h[0], rtol=1e-3)
    np.testing.assert_allclose(divergence_weight(r, name).mean(), 1.0, rtol=1e-4)


def test_ratios_are_held() -> None:
    found = density_ratio(jnp.asarray([[-90.0, -90.0], [0.0, 0.0], [1.0, 3.0], [90.0, 90.0]]), 0.1, 20.0)
    np.testing.assert_allclose(found, [0.1, 1.0, np.exp(2.0), 20.0], rtol=1e-6)


def test_bins_follow_the_levels_that_are_drawn() -> None:
    levels = Levels(0.02, 0.98)
    for process in (EDM(), Linear()):
        times = jnp.asarray(levels.table(process)[[20, 500, 980]], jnp.float32)
        index = RatioBins(10).of(times, process, levels)
        assert (index[0], index[2]) == (0, 9)
        assert 0 < int(index[1]) < 9
    assert RatioBins(10, spacing="time").of(jnp.asarray([0.002, 7.9, 8.1, 80.0]), EDM(), levels).tolist() == [
        0,
        0,
        1,
        9,
    ]


def test_means_move_where_samples_fell_and_only_there() -> None:
    found = RatioBins(3, rate=0.5).update(jnp.ones(3), jnp.asarray([3.0, 5.0, 2.0]), jnp.asarray([0, 0, 2]))
    np.testing.assert_allclose(found, [2.5, 1.0, 1.5], rtol=1e-5)


def test_reverse_kl_is_dmd2() -> None:
    task = dataclasses.replace(TASK, divergence="reverse-kl", bins=None)
    params, fake = teacher(), {"net": teacher(5), "head": Network(TASK.head).init(jax.random.key(3))}
    data = batch()
    d = task.draw(jax.random.key(1), data["latent"])
    cond = {"label": data["label"]}
    plain, _ = super(FDistillTask, task).matching(data["latent"], params, fake, cond, d, {})
    weighted, out = task.matching(data["latent"], params, fake, cond, d, {})
    np.testing.assert_allclose(weighted, plain, rtol=1e-4)
    assert out["r"].shape == (8,)
    np.testing.assert_array_equal(d.gan_student.eps, d.matching.eps)  # one x_t for scores and discriminator


def test_running_means_are_part_of_the_state() -> None:
    frozen = {"teacher": teacher()}
    state = TASK.init(jax.random.key(0), frozen, None)
    np.testing.assert_array_equal(state.aux["ratio_means"], jnp.ones(4))
    after, metrics = jax.jit(TASK.programs["student"])(state, frozen, batch(), TASK.inputs(0, 1), jax.random.key(1))
    assert (np.asarray(after.aux["ratio_means"]) != 1.0).any()
    assert float(metrics["student/skipped"]) == 0.0
    kept = TASK.followed(after, {"r": jnp.full(8, 9.0), "bin": jnp.zeros(8, jnp.int32)}, jnp.asarray(False))
    np.testing.assert_array_equal(kept.aux["ratio_means"], after.aux["ratio_means"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head": None, "taps": ()}, "density ratios off a discriminator"),
        ({"ratio_range": (2.0, 3.0)}, "does not hold 1"),
        ({"divergence": "kld"}, "divergence"),
    ],
)
def test_bad_configurations_are_named(change: dict, words: str) -> None:
    with pytest.raises(GenError, match=words):
        dataclasses.replace(TASK, **change)
    with pytest.raises(GenError, match="ratio bins"):
        RatioBins(0)
