"""f-distill's divergence weights, losses and gradients against the official code, through the functions that train."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import DataMatching, Draws
from gen.diffusion.process import EDM
from gen.diffusion.times import Levels
from gen.distill.discriminator import ApproximateR1
from gen.distill.dmd2 import DMD2Draws, matching_gradient, matching_loss
from gen.distill.f_distill import DIVERGENCES, FDistillTask, RatioBins, density_ratio
from gen.nn.adversarial import Heads
from gen.sampling.guidance import ClassifierFree
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dmd2 import head_weights, image, make_head, official_head
from tests.parity.toys import Toy, nchw, official, ours

LOSS, GRADIENT = {"rtol": 1e-4, "atol": 0.0}, {"rtol": 1e-3, "atol": 0.0}  # the README's tolerances
NAMES = {
    "rkl": "reverse-kl",
    "kl": "kl",
    "js": "js",
    "sf": "softened-reverse-kl",
    "neyman": "neyman",
    "sh": "hellinger",
    "jf": "jeffreys",
}


def heads_of(fx: Fixture, prefix: str, count: int) -> tuple[Heads, dict[str, Any]]:
    """The heads on several features, and their arrays."""
    weights = [head_weights(fx, f"{prefix}.{i}.") for i in range(count)]
    return Heads(tuple(make_head(fx, w) for w in weights)), {"heads": {f"head{i}": w for i, w in enumerate(weights)}}


def close_heads(fx: Fixture, head: dict[str, Any], prefix: str) -> None:
    """Gradients of the heads; those of one-element biases nearly cancel."""
    found: dict[str, np.ndarray] = {}
    for i in range(len(head["heads"])):
        found |= official_head(head["heads"][f"head{i}"], f"{prefix}.{i}.")
    assert set(found) == {name for name in fx.io if name.startswith(f"{prefix}.")}
    for name, value in found.items():
        fx.close(value, name, rtol=3e-3 if np.size(value) == 1 else 1e-3, atol=0.0)


def setting(fx: Fixture) -> tuple[FDistillTask, dict[str, Any]]:
    c = fx.config
    nets = {role: ours(fx.weights, f"{role}.model.") for role in ("net", "teacher", "fake_score")}
    taps = tuple(("h", "mid")[i] for i in c["discriminator"]["feature_indices"])
    head, weights = heads_of(fx, "discriminator.discriminator_heads", len(taps))
    process = EDM(c["sigma_min"], c["sigma_max"], c["rho"], c["sigma_data"])
    net = Toy(c["channels"], c["toy_C"], c["toy_M"], c["num_classes"])
    task = FDistillTask(
        teacher=Denoiser(net, process, EDMPrecondition()),
        times=(c["sigma_max"],),
        levels=Levels(count=c["num_sigmas"]),
        fake_objective=DataMatching(),
        head=head,
        taps=taps,
        gan_weight=c["gan_loss_weight_gen"],
        ratio_range=(c["ratio_lower"], c["ratio_upper"]),
        r1=ApproximateR1(c["gan_r1_reg_weight"], c["gan_r1_reg_alpha"], clean=True),
    )
    return task, {**nets, "fake": {"net": nets["fake_score"], "head": weights}}


def draws(fx: Fixture) -> DMD2Draws:
    b, x = fx.config["batch"], image(fx, "z")
    at = Draws(jnp.asarray(fx.io["t"]), image(fx, "noise"))
    critic = Draws(jnp.asarray(fx.io["critic_t"]), image(fx, "critic_noise"))
    real = Draws(jnp.asarray(fx.io["critic_t_real"]), image(fx, "critic_noise_real"), {"r1": image(fx, "r1_noise")})
    return DMD2Draws(
        order=jnp.arange(b),
        noise=x,
        stop=jnp.zeros(b, jnp.int32),
        simulated=jnp.zeros((b, 0, *x.shape[1:])),
        matching=at,
        gan_student=at,
        fake=critic,
        gan_fake=critic,
        gan_real=real,
    )


def cases(fx: Fixture) -> dict[str, dict[str, Any]]:
    """Changes of the setting by the name of the official case."""
    c = fx.config
    bins = RatioBins(c["bin_num"], c["ratio_ema_rate"], "time")
    found: dict[str, dict[str, Any]] = {name: {"divergence": NAMES[name]} for name in c["f_divs"]}
    found |= {name: {"divergence": NAMES[name.split("_")[0]], "bins": bins} for name in c["normalised_cases"]}
    for name in {key.removesuffix("_loss_vsd") for key in fx.io if key.endswith("_cfg_loss_vsd")}:
        guidance = ClassifierFree(c["guidance_scale"])
        found[name] = {"divergence": NAMES[name.split("_")[0]], "guidance": guidance}
    return found


@pytest.mark.parametrize("fx", fixtures("fdistill-losses*"), ids=str)
def test_student_turn(fx: Fixture) -> None:
    base, nets = setting(fx)
    d, label = draws(fx), jnp.asarray(fx.io["label_onehot"])
    cond = {"y": label, "null": jnp.zeros_like(label)}
    fx.close(base.levels.table(base.teacher.process)[fx.io["t_index"]], "t", rtol=1e-6, atol=0.0)
    x = base.generate(nets["net"], cond, d)
    fx.close(nchw(x), "generated", **LOSS)
    real, fake = base.scores(nets["teacher"], nets["fake"], x, cond, d.matching)
    fx.close(nchw(real), "teacher_x0", **LOSS)
    fx.close(nchw(fake), "fake_x0", **LOSS)
    logits = base.logits(nets["teacher"], nets["fake"]["head"], x, cond, d.matching)
    fx.close(logits, "gen_logits", **LOSS)
    ratio = density_ratio(logits, *base.ratio_range)
    fx.close(ratio, "ratio", **LOSS)
    fx.close(base.gan_loss(nets["teacher"], nets["fake"]["head"], x, cond, d.matching), "loss_gan_gen", **LOSS)
    fx.close(matching_gradient(x, real, fake), (fake - real) * fx.io["vsd_w"][:, None, None, None], **LOSS)
    before = {"ratio_means": jnp.asarray(fx.config["bins_before"])}
    seen = base.seen(nets["teacher"], nets["fake"])
    gan, towards = jax.jit(jax.value_and_grad(base.gan_loss, argnums=2))(*seen, x, cond, d.matching)
    pulled = jax.jit(lambda g: jax.vjp(lambda p: base.generate(p, cond, d), nets["net"])[1](g)[0])
    for name, changes in cases(fx).items():
        task = dataclasses.replace(base, **changes)
        h, out = task.weights(ratio, d.matching.t, before)
        fx.close(h, f"{name}_h", **LOSS)
        if task.bins is not None:
            fx.close(task.bins.update(before["ratio_means"], ratio, out["bin"]), f"{name}_bins_after", **LOSS)
        guided = real
        if f"{name}_teacher_x0" in fx.io:
            guided, _ = task.scores(nets["teacher"], nets["fake"], x, cond, d.matching)
            fx.close(nchw(guided), f"{name}_teacher_x0", **LOSS)
        matched = h[:, None, None, None] * matching_gradient(x, guided, fake)
        loss, gradient = jax.value_and_grad(matching_loss)(x, matched)
        fx.close(loss, f"{name}_loss_vsd", **LOSS)
        fx.close(loss + task.gan_weight * gan, f"{name}_loss", **LOSS)
        if f"{name}_dvsd_dx" in fx.io:
            fx.close(nchw(gradient), f"{name}_dvsd_dx", **GRADIENT)
        close_gradients(fx, name, pulled(gradient + task.gan_weight * towards))


@pytest.mark.parametrize("fx", fixtures("fdistill-losses*"), ids=str)
def test_student_loss(fx: Fixture) -> None:
    """All of it at once, as an update takes it, for the first of the normalised cases."""
    base, nets = setting(fx)
    d, label = draws(fx), jnp.asarray(fx.io["label_onehot"])
    name = fx.config["normalised_cases"][0]
    task = dataclasses.replace(base, **cases(fx)[name])
    before = {"ratio_means": jnp.asarray(fx.config["bins_before"])}
    run = jax.jit(jax.value_and_grad(task.student_loss, has_aux=True))
    (loss, aux), grads = run(nets["net"], nets["teacher"], nets["fake"], {"y": label}, d, before)
    fx.close(loss, f"{name}_loss", **LOSS)
    fx.close(aux.metrics["dm_loss"], f"{name}_loss_vsd", **LOSS)
    fx.close(aux.out["r"], "ratio", **LOSS)
    close_gradients(fx, name, grads)


def close_gradients(fx: Fixture, name: str, grads: Any) -> None:
    """Gradients of a case, which the fixture has for some of them."""
    found = official(grads, f"{name}_grad_net.model.")
    known = {array for array in fx.io if array.startswith(f"{name}_grad_net.")}
    assert known <= set(found)
    for array in known:
        fx.close(found[array], array, **GRADIENT)


@pytest.mark.parametrize("fx", fixtures("fdistill-losses*"), ids=str)
def test_critic_turn(fx: Fixture) -> None:
    task, nets = setting(fx)
    d, cond, real = draws(fx), {"y": jnp.asarray(fx.io["label_onehot"])}, image(fx, "real")
    x = image(fx, "generated")
    run = jax.jit(jax.value_and_grad(task.fake_score_loss, has_aux=True))
    (loss, aux), grads = run(nets["fake"], nets["teacher"], x, cond, real, cond, d)
    seen = task.seen(nets["teacher"], nets["fake"])
    fx.close(task.logits(*seen, x, cond, d.gan_fake), "critic_logits_fake", **LOSS)
    fx.close(task.logits(*seen, real, cond, d.gan_real), "critic_logits_real", **LOSS)
    moved = real + task.r1.spread * d.gan_real.extra["r1"]
    fx.close(task.judged(*seen, moved, d.gan_real.t, cond), "critic_logits_r1", **LOSS)
    terms = {"fake_loss": "fake_score", "head_loss": "disc", "r1": "r1"}
    for ours_, theirs in terms.items():
        fx.close(aux.metrics[ours_], f"critic_loss_{theirs}", **LOSS)
    fx.close(loss, "critic_loss", **LOSS)
    for array, value in official(grads["net"], "critic_grad_fake_score.model.").items():
        fx.close(value, array, **GRADIENT)
    close_heads(fx, grads["head"], "critic_grad_discriminator.discriminator_heads")


@pytest.mark.parametrize("fx", fixtures("fdistill-losses*"), ids=str)
def test_table_of_divergences(fx: Fixture) -> None:
    for official_name, name in NAMES.items():
        fx.close(DIVERGENCES[name](jnp.asarray(fx.io["table_r"])), f"table_h_{official_name}", **LOSS)
