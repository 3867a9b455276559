import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.config import from_json, to_json
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, Linear
from gen.diffusion.times import Levels
from gen.distill.dmd2 import DMD2Draws, DMD2Task, backward_simulation, matching_gradient, matching_loss, sample_norm
from gen.distill.kd import KDTask
from gen.errors import GenError
from gen.nn.adversarial import ConvHead, TokenLogits, logistic_discriminator_loss, logistic_generator_loss
from gen.nn.network import Network
from gen.sampling.guidance import ClassifierFree
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.part import microbatches
from tests.distill.tiny import Tiny
from tests.training.keys import Uses

NET = Tiny()
DENOISER = Denoiser(NET, Linear(), Predict("velocity"))
TASK = DMD2Task(
    teacher=DENOISER,
    guidance=ClassifierFree(1.5),
    head=TokenLogits(16, 8),
    taps=("hidden",),
    ratio=3,
    optim=OptimConfig(lr=1e-3),
    fake_optim=OptimConfig(lr=1e-3),
    emas=(Constant(0.9),),
)


def batch(n: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(n, 4, 3)).astype(np.float32)
    return {"latent": jnp.asarray(latent), "label": jnp.arange(n, dtype=jnp.int32) % 3}


def teacher(key: int = 0) -> dict:
    return Network(NET).init(jax.random.key(key))


def test_matching_gradient_points_from_fake_to_real_and_is_normalised_per_sample() -> None:
    x, real, fake = (jax.random.normal(jax.random.key(i), (4, 5, 2)) for i in range(3))
    gradient = matching_gradient(x, real, fake)
    for i in range(4):
        np.testing.assert_allclose(gradient[i], (fake[i] - real[i]) / np.abs(x[i] - real[i]).mean(), rtol=1e-5)
    # the scale of one sample's error must not reach the others
    other = matching_gradient(x.at[0].multiply(100.0), real, fake)
    np.testing.assert_array_equal(other[1:], gradient[1:])


def test_matching_gradient_is_finite_where_the_teacher_returns_x() -> None:
    x = jnp.ones((2, 3))
    gradient = matching_gradient(x, x, x.at[1].set(2.0))
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_matching_loss_hands_its_gradient_to_x() -> None:
    x, g = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    np.testing.assert_allclose(jax.grad(matching_loss)(x, g), g / x.size, rtol=1e-5)
    np.testing.assert_allclose(matching_loss(x, g), 0.5 * jnp.square(g).mean(), rtol=1e-5)


def test_sample_norm_does_not_depend_on_the_batch_size() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 4))
    grad = jax.grad(lambda x: jnp.square(x).mean())
    small = jnp.stack([sample_norm(grad(x[i : i + 2])) for i in (0, 2, 4)]).mean()
    np.testing.assert_allclose(sample_norm(grad(x)), small, rtol=1e-5)


def test_gan_losses_at_zero_logits_and_their_direction() -> None:
    zero = jnp.zeros(4)
    np.testing.assert_allclose(logistic_generator_loss(zero), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(logistic_discriminator_loss(zero, zero), 2 * np.log(2), rtol=1e-6)
    assert logistic_generator_loss(zero + 1) < logistic_generator_loss(zero)
    assert logistic_discriminator_loss(zero + 1, zero - 1) < logistic_discriminator_loss(zero, zero)


@pytest.mark.parametrize(("process", "count"), [(EDM(), 1000), (DDPM(steps=50), 50), (Linear(), 1000)])
def test_levels_stay_in_their_part_of_the_table(process: object, count: int) -> None:
    levels = Levels(0.02, 0.98, count)
    table, drawn = levels.table(process), levels(jax.random.key(0), process, 4096)
    assert len(table) == count
    assert np.all(np.diff(table) > 0)
    low, high = table[int(0.02 * count)], table[int(0.98 * count)]
    np.testing.assert_allclose([drawn.min(), drawn.max()], [low, high], rtol=1e-6)  # 4096 draws reach both ends


def test_ddpm_levels_are_the_chain() -> None:
    process = DDPM(steps=20)
    np.testing.assert_allclose(Levels(count=20).table(process), process.time(np.arange(20)), rtol=1e-12)


def test_backward_simulation_stops_where_told_and_renoises_to_the_next_time() -> None:
    noises = jax.random.normal(jax.random.key(0), (3, 2, 4))
    times = (1.0, 0.6, 0.2)

    def student(x: jax.Array, t: jax.Array) -> jax.Array:
        return 0.5 * x + t

    run = jax.jit(lambda stop: backward_simulation(student, Linear(), times, noises, stop))
    np.testing.assert_array_equal(run(0), noises[0])
    first = student(noises[0], times[0])
    np.testing.assert_allclose(run(1), first, rtol=1e-6)
    np.testing.assert_allclose(run(2), student(0.4 * first + 0.6 * noises[1], times[1]), rtol=1e-5)


def test_convolutional_head_gives_one_logit_and_every_layer_counts() -> None:
    head = Network(ConvHead(channels=8, kernel=2, downs=2, groups=2))
    params = jax.jit(head.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 8))
    assert jax.eval_shape(head, params, x).shape == (3, 1)
    grads = jax.jit(jax.grad(lambda p: jnp.square(head(p, x)).sum()))(params)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_student_loss_carries_both_terms_and_leaves_the_scores_alone() -> None:
    params, fake = teacher(), {"net": teacher(5), "head": Network(TASK.head).init(jax.random.key(3))}
    data = batch()
    draws = TASK.draw(jax.random.key(1), data["latent"])
    cond = {"label": data["label"]}
    value_and_grad = jax.jit(jax.value_and_grad(TASK.student_loss, has_aux=True))
    (loss, aux), grads = value_and_grad(params, params, fake, cond, draws)
    terms = aux.metrics
    np.testing.assert_allclose(loss, terms["dm_loss"] + TASK.gan_weight * terms["gan_loss"], rtol=1e-5)

    def direct(student: dict) -> jax.Array:
        x = TASK.generate(student, cond, draws)
        matched, _ = TASK.matching(jax.lax.stop_gradient(x), params, fake, cond, draws, {})
        gan = TASK.gan_loss(fake["net"], fake["head"], x, cond, draws.gan_student)
        return matching_loss(x, matched) + TASK.gan_weight * gan

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, jax.jit(jax.grad(direct))(params)
    )


def test_matching_gradient_vanishes_when_the_fake_score_is_the_teacher() -> None:
    task = dataclasses.replace(TASK, guidance=ClassifierFree(), head=None, taps=())
    params, data = teacher(), batch()
    draws = task.draw(jax.random.key(1), data["latent"])
    _, aux = task.student_loss(params, params, {"net": params}, {"label": data["label"]}, draws)
    assert aux.metrics["dm_grad"] < 1e-5
    _, apart = task.student_loss(params, params, {"net": teacher(9)}, {"label": data["label"]}, draws)
    assert apart.metrics["dm_grad"] > 1e-2


def test_fake_score_loss_is_the_native_objective_on_generated_data() -> None:
    task = dataclasses.replace(TASK, head=None, taps=())
    params, data = teacher(), batch()
    x, cond = data["latent"], {"label": data["label"]}
    draws = task.draw(jax.random.key(1), x)
    loss, _ = task.fake_score_loss({"net": params}, params, x, cond, x, cond, draws)
    prediction: Prediction = DENOISER(params, noised(Linear(), x, draws.fake), draws.fake.t, cond)
    np.testing.assert_allclose(loss, jnp.square(prediction.velocity - (draws.fake.eps - x)).mean(), rtol=1e-5)
    grad = jax.grad(lambda x: task.fake_score_loss({"net": params}, params, x, cond, x, cond, draws)[0])(x)
    np.testing.assert_array_equal(grad, 0.0)  # generated data is given


def run(task: DMD2Task, steps: int) -> tuple:
    frozen = {"teacher": teacher()}
    state = task.init(jax.random.key(0), frozen, None)
    programs = {name: jax.jit(f, donate_argnums=0) for name, f in task.programs.items()}
    history = []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(7), step)
        state, metrics = programs[task.select(step)](state, frozen, batch(), task.inputs(step, steps), key)
        history.append({k: float(v) for k, v in metrics.items()})
    return state, frozen, programs, history


def test_ratio_programs_compile_once_and_the_teacher_lives() -> None:
    state, frozen, programs, history = run(TASK, 7)
    assert [TASK.select(i) for i in range(4)] == ["student", "fake_score", "fake_score", "student"]
    assert {name: f._cache_size() for name, f in programs.items()} == {"student": 1, "fake_score": 1}
    assert {name: int(entry["updates"]) for name, entry in state.opt.items()} == {"student": 3, "fake_score": 7}
    jax.tree.map(np.testing.assert_array_equal, frozen["teacher"], teacher())
    usual = ("loss", "grad_norm", "skipped", "lr")
    fake, both = ({f"{part}/{name}" for part in parts for name in usual} for parts in (["fake_score"], TASK.programs))
    assert [(both if "student/loss" in h else fake) <= set(h) for h in history] == [True] * 7
    assert all("/" in name and (value == 0 or "skipped" not in name) for h in history for name, value in h.items())
    assert min(history[0]["student/dm_grad"], history[0]["student/gan_grad"]) > 0
    assert set(TASK.export(state)) == {"net"}
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), TASK.export(state)["net"], state.params["student"])
    assert max(jax.tree.leaves(moved)) > 0  # the average lags behind


def test_fake_score_program_leaves_the_student_as_it_was() -> None:
    frozen = {"teacher": teacher()}
    state = TASK.init(jax.random.key(0), frozen, None)
    after, _ = jax.jit(TASK.programs["fake_score"])(state, frozen, batch(), TASK.inputs(0, 1), jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, after.params["student"], state.params["student"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), after.params["fake_score"], state.params["fake_score"])
    assert all(jax.tree.leaves(changed["head"]))


def test_accumulation_equals_the_large_batch() -> None:
    frozen = {"teacher": teacher()}
    task = dataclasses.replace(TASK, optim=OptimConfig(lr=1e-3, eps=1e-3), fake_optim=OptimConfig(lr=1e-3, eps=1e-3))
    state = task.init(jax.random.key(0), frozen, None)
    given = (state, frozen, batch(), task.inputs(0, 1), jax.random.key(1))
    whole, metrics = jax.jit(task.update_both)(*given)
    with microbatches(2):
        parts, part_metrics = jax.jit(lambda *a: task.update_both(*a))(*given)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)  # noqa: E731
    jax.tree.map(close, whole.params, parts.params)
    for name in metrics:
        if "grad_norm" not in name:
            close(metrics[name], part_metrics[name])


def test_several_steps_train_on_simulated_inputs() -> None:
    task = dataclasses.replace(TASK, times=(1.0, 0.75, 0.5, 0.25))
    state, _, _, history = run(task, 4)
    assert all(np.isfinite(list(h.values())).all() for h in history)
    data = batch()
    draws = task.draw(jax.random.key(2), data["latent"])
    stops = {int(task.draw(jax.random.key(i), data["latent"]).stop[0]) for i in range(40)}
    assert stops == {0, 1, 2, 3}
    _, t = task.student_input(state.params["student"], {"label": data["label"]}, draws)
    assert float(t) == task.times[int(draws.stop[0])]


def test_student_of_the_previous_stage_is_taken_over_and_copied() -> None:
    frozen = {"teacher": teacher()}
    kd = KDTask(teacher=DENOISER, optim=OptimConfig(lr=1e-3))
    state = kd.init(jax.random.key(0), frozen, None)
    data = batch() | {"noise": jax.random.normal(jax.random.key(4), (8, 4, 3))}
    state, _ = jax.jit(kd.programs["student"])(state, frozen, data, kd.inputs(0, 1), jax.random.key(1))
    following = TASK.init(jax.random.key(0), frozen, state)
    jax.tree.map(np.testing.assert_array_equal, following.params["student"], state.params["student"])
    jax.tree.map(np.testing.assert_array_equal, following.params["fake_score"]["net"], frozen["teacher"])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((following, state, frozen))]
    assert len(pointers) == len(set(pointers))


def test_pixel_batches_are_scaled() -> None:
    image = jnp.asarray([[[0.0], [255.0]]]).astype(jnp.uint8)
    _, real, *_ = TASK._draws({"image": image, "label": jnp.zeros(1, jnp.int32)}, jax.random.key(0))
    np.testing.assert_allclose(real, [[[-1.0], [1.0]]])


def test_configuration_round_trip() -> None:
    net = DiTConfig(size=(4,), channels=3, patch=1, width=16, depth=2, heads=2, num_classes=3)
    task = dataclasses.replace(TASK, teacher=dataclasses.replace(DENOISER, network=net))
    assert from_json(json.loads(json.dumps(to_json(task)))) == task


def test_the_student_follows_its_own_learning_rate_schedule() -> None:
    """A schedule is as long as the part's own updates: the student's cosine ends at its last update, not at 1/ratio."""
    task = dataclasses.replace(TASK, optim=OptimConfig(lr=1.0, schedule="cosine"))
    steps = [step for step in range(12) if task.select(step) == "student"]
    assert [task.updates("student", step) for step in (*steps, 12)] == [0, 1, 2, 3, 4]
    rates = [float(task.inputs(step, 12)["lr/student"]) for step in steps]
    np.testing.assert_allclose(rates, [0.5 * (1 + np.cos(np.pi * n / 4)) for n in range(4)], rtol=1e-6)
    assert float(task.inputs(7, 12)["lr/fake_score"]) == np.float32(1e-3)
    assert task.derived
    assert not TASK.derived


def test_the_first_input_is_as_noisy_as_the_process_at_the_first_time() -> None:
    data, cond = batch()["latent"], {"label": batch()["label"]}
    for process, times, scale, wanted in (
        (EDM(), (80.0,), None, 80.0),
        (Linear(), (0.75,), None, 0.75),
        (EDM(), (2.5,), 1.0, 1.0),
    ):
        teacher = dataclasses.replace(DENOISER, process=process)
        task = dataclasses.replace(TASK, teacher=teacher, times=times, noise_scale=scale)
        draws = task.draw(jax.random.key(0), data)
        x, _ = task.student_input({}, cond, draws)
        np.testing.assert_allclose(x, wanted * draws.noise, rtol=1e-6)


def test_a_student_may_be_another_network_than_its_teacher() -> None:
    """What agrees by path and shape is the teacher's; the rest starts at random. The fake score is the teacher's."""
    frozen = {"teacher": teacher()}
    wider = dataclasses.replace(DENOISER, network=Tiny(classes=5))
    task = dataclasses.replace(TASK, student=wider)
    assert task.models()["net"].config == wider
    state = task.init(jax.random.key(1), frozen, None)
    student, given = state.params["student"], frozen["teacher"]
    np.testing.assert_array_equal(student["inner"]["kernel"], given["inner"]["kernel"])
    assert student["label"]["kernel"].shape == (6, 16)
    jax.tree.map(np.testing.assert_array_equal, state.params["fake_score"]["net"], given)
    alone = dataclasses.replace(DENOISER, network=Stranger())
    with pytest.raises(GenError, match="no array of the given network fits Stranger by path and shape"):
        dataclasses.replace(TASK, student=alone).init(jax.random.key(1), frozen, None)


@dataclasses.dataclass(frozen=True)
class Stranger(Tiny):
    """A network whose arrays have other shapes than any of `Tiny`'s."""

    channels: int = 5
    width: int = 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": (0.5, 1.0)}, "must decrease"),
        ({"taps": ()}, "both `head` and `taps`"),
        ({"ratio": 0}, "ratio is 0"),
        ({"features": "students"}, "features"),
        ({"regression": 1.0, "times": (1.0, 0.5)}, "one-step students"),
    ],
)
def test_bad_configurations_are_named(change: dict, words: str) -> None:
    with pytest.raises(GenError, match=words):
        dataclasses.replace(TASK, **change)


def test_regression_on_stored_pairs_is_added() -> None:
    """DMD's loss; the pairs keep their own conditions, which the generated samples shuffle."""
    task = dataclasses.replace(TASK, head=None, taps=(), regression=2.0)
    frozen, data = {"teacher": teacher()}, batch() | {"noise": jax.random.normal(jax.random.key(4), (8, 4, 3))}
    state = task.init(jax.random.key(0), frozen, None)
    _, metrics = jax.jit(task.programs["student"])(state, frozen, data, task.inputs(0, 1), jax.random.key(1))
    x = DENOISER(frozen["teacher"], data["noise"], jnp.float32(1.0), {"label": data["label"]}).denoised
    np.testing.assert_allclose(metrics["student/regression"], 0.5 * jnp.square(x - data["latent"]).mean(), rtol=1e-4)
    total = metrics["student/dm_loss"] + 2.0 * metrics["student/regression"]
    np.testing.assert_allclose(metrics["student/loss"], total, rtol=1e-5)
    with pytest.raises(GenError, match="hold no 'noise': DMD's regression"):
        task.check({name: np.asarray(value) for name, value in batch().items()})
    task.check({name: np.asarray(value) for name, value in data.items()})


def test_a_term_of_images_may_stand_in_for_the_squared_error() -> None:
    task = dataclasses.replace(TASK, head=None, taps=(), regression=1.0, regression_term=Doubled())
    params, data = teacher(), batch()
    noise = jax.random.normal(jax.random.key(4), (8, 4, 3))
    x = DENOISER(params, noise, jnp.float32(1.0), {"label": data["label"]}).denoised
    found = task.pair_loss(params, noise, data["latent"], {"label": data["label"]}, {"doubled": jnp.float32(2.0)})
    np.testing.assert_allclose(found, 3.0 * 2.0 * jnp.abs(x - data["latent"]).mean(), rtol=1e-5)
    with pytest.raises(GenError, match="the frozen role 'doubled'"):
        task.init(jax.random.key(0), {"teacher": params}, None)


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A distance of images with a network of one number."""

    name = "doubled"
    weight = 3.0

    def __call__(self, params: jax.Array, images: jax.Array, made: jax.Array) -> jax.Array:
        return params * jnp.abs(images - made).mean((1, 2))


def test_the_discriminator_may_look_through_the_teacher() -> None:
    """Its loss then leaves the fake score alone, and trains it where the features are its own."""
    params, data = teacher(), batch()
    fake = {"net": teacher(5), "head": Network(TASK.head).init(jax.random.key(3))}
    x, cond = data["latent"], {"label": data["label"]}
    for features, moved in (("teacher", False), ("fake", True)):
        task = dataclasses.replace(TASK, features=features, head_weight=1.0)
        d = task.draw(jax.random.key(1), x)

        def judged(fake: dict, task: DMD2Task = task, d: DMD2Draws = d) -> jax.Array:
            both = (x, cond, d.gan_fake), (x[::-1], cond, d.gan_real)
            return task.head_loss(*task.seen(params, fake), *both)[0]

        grads = jax.grad(judged)(fake)
        assert bool(jnp.abs(grads["net"]["inner"]["kernel"]).max() > 0) == moved
        assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads["head"]["fc2"]))


def test_a_stage_goes_on_with_the_fake_score_and_its_head() -> None:
    frozen = {"teacher": teacher()}
    first = dataclasses.replace(TASK, head=None, taps=())
    state = first.init(jax.random.key(0), frozen, None)
    moved = dataclasses.replace(state, params=state.params | {"fake_score": {"net": teacher(9)}})
    second = TASK.init(jax.random.key(1), frozen, moved)
    jax.tree.map(np.testing.assert_array_equal, second.params["fake_score"]["net"], teacher(9))
    third = TASK.init(jax.random.key(2), frozen, second)
    jax.tree.map(np.testing.assert_array_equal, third.params["fake_score"], second.params["fake_score"])


def test_missing_teacher_is_named() -> None:
    with pytest.raises(GenError, match="'teacher'"):
        TASK.init(jax.random.key(0), {}, None)
    with pytest.raises(GenError, match="0 <= low < high <= 1"):
        Levels(0.9, 0.1)


def test_draws_are_whole_batches() -> None:
    draws = TASK.draw(jax.random.key(0), jnp.zeros((6, 4, 3)))
    assert all(leaf.shape[0] == 6 for leaf in jax.tree.leaves(draws))
    assert sorted(draws.order.tolist()) == list(range(6))


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5)])
def test_every_draw_of_a_step_has_a_key_of_its_own(times: tuple[float, ...]) -> None:
    uses = Uses()
    jax.block_until_ready(dataclasses.replace(TASK, times=times).draw(uses.key(0), batch()["latent"]))
    assert len(uses.counts) > 10
    assert uses.repeated() == 0
