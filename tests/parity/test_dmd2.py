"""DMD2's losses, gradients and backward simulation against the official code, through the functions that train."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.arrays import flatten
from gen.diffusion.backbones.edm_unet import DhariwalUNetConfig
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, EDMPrecondition, Predict
from gen.diffusion.objectives import DDPMLoss, Draws, EDMLoss
from gen.diffusion.process import EDM
from gen.diffusion.times import Levels
from gen.distill.dmd2 import DMD2Draws, DMD2Task, backward_simulation, matching_gradient, matching_loss, sample_norm
from gen.nn.adversarial import ConvHead
from gen.nn.network import param_shapes
from gen.pretrained import dmd2, edm
from gen.pretrained.rules import load, save
from gen.sampling.guidance import ClassifierFree
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_edm_unet import label_of
from tests.parity.toys import Toy, nchw, nhwc, official, ours

BOTTLENECK = {"rtol": 1e-4, "atol": 0.0}
LOSS, ARRAY = {"rtol": 1e-4, "atol": 0.0}, {"rtol": 1e-3, "atol": 0.0}  # the READMEs' tolerances


def head_weights(fx: Fixture, prefix: str = "cls_pred_branch.") -> dict[str, Any]:
    """Official indices 3 i (convolution), 3 i + 1 (norm), last 1x1 -> conv{i}, norm{i}, out."""
    layers = ours(fx.weights, prefix)
    last = max(layers, key=int)
    head = {("conv", "norm")[int(i) % 3] + str(int(i) // 3): v for i, v in layers.items() if i != last}
    kernel = layers[last]["kernel"]
    return head | {"out": layers[last] | {"kernel": kernel.reshape(kernel.shape[2:])}}


def official_head(head: dict[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """The inverse of `head_weights`."""
    layers = {}
    for name, value in head.items():
        kind, _, i = re.match(r"(conv|norm|out)()(\d*)", name).groups()  # type: ignore[union-attr]
        layers[str(3 * int(i) + (kind == "norm")) if i else str(3 * (len(head) - 1) // 2)] = value
    last = str(3 * (len(head) - 1) // 2)
    layers[last] = layers[last] | {"kernel": layers[last]["kernel"][None, None]}
    return official(layers, prefix)


def matching_weight(fx: Fixture) -> float:
    """The official loss weighs both of its terms; ours has the second's weight relative to the first's."""
    return float(fx.config.get("dm_loss_weight", 1.0))


def make_head(fx: Fixture, head: dict[str, Any]) -> ConvHead:
    downs = sum(name.startswith("conv") for name in head) - 1
    told = re.search(r"groupnorm (\d+) groups", " ".join(fx.config.get("cls_head", [])))
    groups = int(told.group(1)) if told else 2
    last = head[f"conv{downs}"]["kernel"]
    return ConvHead(channels=last.shape[2], kernel=last.shape[0], downs=downs, groups=groups)


def toy(fx: Fixture, weights: dict[str, Any]) -> Toy:
    kernel, mid = weights["conv_in"]["kernel"], weights["conv_mid"]["kernel"]
    return Toy(kernel.shape[2], kernel.shape[3], mid.shape[3], weights["wy"].shape[0])


def image(fx: Fixture, name: str) -> jax.Array:
    return jnp.asarray(nhwc(fx.io[name]))


def draws(fx: Fixture, table: np.ndarray, name: str) -> Draws:
    times = jnp.asarray(table[fx.io[f"{name}_timestep"]], jnp.float32)
    return Draws(times, image(fx, f"{name}_noise"))


def check_generator_turn(fx: Fixture, task: DMD2Task, nets: dict[str, Any], cond: Any, d: DMD2Draws) -> jax.Array:
    """x, matching gradient, GAN term, total and the student's gradients; returns x."""
    x = task.generate(nets["student"], cond, d)
    fx.close(nchw(x), "generated", **ARRAY)
    real, fake = task.scores(nets["teacher"], nets["fake"], x, cond, d.matching)
    fx.close(nchw(real), "dm_pred_real", **ARRAY)
    fx.close(nchw(fake), "dm_pred_fake", **ARRAY)
    fx.close(nchw(matching_gradient(x, real, fake)), "dm_grad", **ARRAY)
    matched, _ = task.matching(x, nets["teacher"], nets["fake"], cond, d, {})
    loss, gradient = jax.value_and_grad(matching_loss)(x, matched)
    fx.close(loss, "loss_dm", **LOSS)
    fx.close(nchw(gradient), "dloss_dm_dx", **ARRAY)
    seen = task.seen(nets["teacher"], nets["fake"])
    gan, gan_gradient = jax.value_and_grad(task.gan_loss, argnums=2)(*seen, x, cond, d.gan_student)
    fx.close(gan, "loss_gen_cls", **LOSS)
    if "dloss_gen_cls_dx" in fx.io:
        fx.close(nchw(gan_gradient), "dloss_gen_cls_dx", **ARRAY)
    (total, aux), grads = jax.value_and_grad(task.student_loss, has_aux=True)(
        nets["student"], nets["teacher"], nets["fake"], cond, d
    )
    scale = matching_weight(fx)
    fx.close(scale * total, "loss_generator_total", **LOSS)
    fx.close(aux.metrics["dm_grad"], sample_norm(fx.io["dloss_dm_dx"]), **ARRAY)
    found = official(grads, "grad_generator.model.")
    assert set(found) == {name for name in fx.io if name.startswith("grad_generator.")}
    for name, value in found.items():
        fx.close(scale * value, name, **ARRAY)
    return x


def check_guidance_turn(
    fx: Fixture, task: DMD2Task, nets: dict[str, Any], x: jax.Array, cond: Any, real: jax.Array, real_cond: Any, d: Any
) -> None:
    """Fake score's loss, discriminator's loss and probabilities, total and all gradients."""
    (total, aux), grads = jax.value_and_grad(task.fake_score_loss, has_aux=True)(
        nets["fake"], nets["teacher"], x, cond, real, real_cond, d
    )
    weight = fx.config.get("cls_loss_weight", fx.config.get("guidance_cls_loss_weight"))
    assert task.head_weight == weight
    fx.close(total, "loss_guidance_total", **LOSS)
    fx.close(aux.metrics["fake_loss"], "loss_fake", **LOSS)
    fx.close(aux.metrics["head_loss"], "loss_guidance_cls", **LOSS)
    for kind, image_, c, gan in (("real", real, real_cond, d.gan_real), ("fake", x, cond, d.gan_fake)):
        logits = task.logits(*task.seen(nets["teacher"], nets["fake"]), image_, c, gan)
        fx.close(jax.nn.sigmoid(logits)[:, 0], f"prob_{kind}", **ARRAY)
        if f"logits_{kind}" in fx.io:
            fx.close(logits, f"logits_{kind}", **ARRAY)
    found = official(grads["net"], "grad_guidance.fake_unet.model.")
    found |= official_head(grads["head"], "grad_guidance.cls_pred_branch.")
    expected = {name for name in fx.io if name.startswith("grad_guidance.")}
    assert set(found) == expected
    for name, value in found.items():
        fx.close(value, name, **ARRAY)


def networks(fx: Fixture) -> dict[str, Any]:
    return {
        "student": ours(fx.weights, "generator.model."),
        "teacher": ours(fx.weights, "real_unet.model."),
        "fake": {"net": ours(fx.weights, "fake_unet.model."), "head": head_weights(fx)},
    }


EPS = [fx for fx in fixtures("dmd2-losses*") if "beta_schedule" in fx.config]
KARRAS = [fx for fx in fixtures("dmd2-losses*") if "beta_schedule" not in fx.config]


@pytest.mark.parametrize("fx", KARRAS, ids=str)
def test_edm(fx: Fixture) -> None:
    c, nets = fx.config, networks(fx)
    process = EDM(c["sigma_min"], c["sigma_max"], c["rho"], c["sigma_data"])
    steps = c["num_train_timesteps"]
    task = DMD2Task(
        teacher=Denoiser(toy(fx, nets["teacher"]), process, EDMPrecondition(), EDMLoss()),
        times=(c["conditioning_sigma"],),
        noise_scale=c["conditioning_sigma"],
        levels=Levels(c["min_step"] / steps, c["max_step"] / steps, steps),
        fake_levels=Levels(count=steps),
        head=make_head(fx, nets["fake"]["head"]),
        taps=("mid",),
        gan_weight=c["gen_cls_loss_weight"] / matching_weight(fx),
        head_weight=c["cls_loss_weight"],
    )
    table = task.levels.table(process)
    fx.close(table, "karras_sigmas", rtol=1e-6, atol=0.0)
    d = DMD2Draws(
        order=jnp.arange(c["batch"]),
        noise=image(fx, "z"),
        stop=jnp.zeros(c["batch"], jnp.int32),
        simulated=jnp.zeros((c["batch"], 0, *image(fx, "z").shape[1:])),
        matching=draws(fx, table, "dm"),
        gan_student=draws(fx, table, "gan_gen"),
        fake=draws(fx, table, "fake"),
        gan_fake=draws(fx, table, "gan_fake"),
        gan_real=draws(fx, table, "gan_real"),
    )
    cond = {"y": jnp.asarray(fx.io["label_onehot"])}
    x = check_generator_turn(fx, task, nets, cond, d)
    fx.close(np.abs(nchw(x) - fx.io["dm_pred_real"]).mean((1, 2, 3)), "dm_weight_factor", **ARRAY)
    noisy = nhwc(fx.io["dm_noisy"])
    fx.close(nchw(x + d.matching.t[:, None, None, None] * d.matching.eps), nchw(noisy), **ARRAY)
    pred = task.denoiser(nets["fake"]["net"], image(fx, "fake_noisy"), d.fake.t, cond).denoised
    fx.close(nchw(pred), "fake_x0_pred", **ARRAY)
    check_guidance_turn(
        fx, task, nets, x, cond, image(fx, "real_image"), {"y": jnp.asarray(fx.io["real_label_onehot"])}, d
    )


@pytest.mark.parametrize("fx", EPS, ids=str)
def test_noise_prediction(fx: Fixture) -> None:
    c, nets = fx.config, networks(fx)
    steps = c["num_train_timesteps"]
    schedule, *ends = re.split(r"\.\.| ", c["beta_schedule"])
    process = DDPM(schedule.replace("_", "-"), steps, ends=tuple(map(float, ends)) or None)
    task = DMD2Task(
        teacher=Denoiser(
            toy(fx, nets["teacher"]), process, Predict("eps", clock="index", scale=1e-3), DDPMLoss(variance="small")
        ),
        times=tuple(float(process.time(i)) for i in c["denoising_steps"]),
        noise_scale=1.0,
        levels=Levels(c["min_step"] / steps, c["max_step"] / steps, steps),
        fake_levels=Levels(count=steps),
        guidance=ClassifierFree(max(1.0, c["real_guidance_scale"])),
        head=make_head(fx, nets["fake"]["head"]),
        taps=("mid",),
        gan_weight=c["gen_cls_loss_weight"] / matching_weight(fx),
        head_weight=c["guidance_cls_loss_weight"],
    )
    assert c["fake_guidance_scale"] == 1.0  # nor does the official code take another
    table = task.levels.table(process)
    np.testing.assert_allclose(process.alpha(table) ** 2, fx.io["alphas_cumprod"], rtol=1e-5)
    simulated = jnp.concatenate([image(fx, "bs_init_noise")[None], image(fx, "bs_renoise")])
    d = DMD2Draws(
        order=jnp.arange(c["batch"]),
        noise=image(fx, "bs_final_noise"),
        stop=jnp.full(c["batch"], c["stopping_step_used_for_losses"]),
        simulated=jnp.moveaxis(simulated, 0, 1),
        matching=draws(fx, table, "dm"),
        gan_student=draws(fx, table, "gan_gen"),
        fake=draws(fx, table, "fake"),
        gan_fake=draws(fx, table, "gan_fake"),
        gan_real=draws(fx, table, "gan_real"),
    )
    cond = {"y": jnp.asarray(fx.io["text_emb"]), "null": jnp.asarray(fx.io["uncond_emb"])}
    np.testing.assert_array_equal(np.rint(process.index(np.array(task.times))), fx.io["denoising_step_list"])
    for k in range(len(task.times)):
        check_simulation(fx, task, nets["student"], cond, d, k)
    x = check_generator_turn(fx, task, nets, cond, d)
    a, s = (f(d.matching.t)[:, None, None, None] for f in (process.alpha, process.sigma))
    fx.close(nchw(a * x + s * d.matching.eps), "dm_noisy", **ARRAY)
    a, s = (f(d.fake.t)[:, None, None, None] for f in (process.alpha, process.sigma))
    pred = task.denoiser(nets["fake"]["net"], a * x + s * d.fake.eps, d.fake.t, cond).denoised
    fx.close(nchw(pred), "fake_x0_pred", **ARRAY)
    real_cond = {"y": jnp.asarray(fx.io["real_text_emb"]), "null": cond["null"]}
    check_guidance_turn(fx, task, nets, x, cond, image(fx, "real_latent"), real_cond, d)


@pytest.mark.parametrize("fx", fixtures("dmd2-critic-network*"), ids=str)
def test_bottleneck_and_head(fx: Fixture) -> None:
    """The discriminator on the fake score of the published model; the file holds the encoder alone."""
    c, prefix = fx.config, "net.model."
    network = DhariwalUNetConfig(
        size=c["img_resolution"],
        num_classes=c["label_dim"],
        width=c["model_channels"],
        mult=tuple(c["channel_mult"]),
        emb=c["channel_mult_emb"],
        blocks=c["num_blocks"],
        attention=tuple(c["attn_resolutions"]),
    )
    net = {name: value for name, value in fx.weights.items() if name.startswith("net.")}
    shapes = flatten(param_shapes(network))
    decoder = {path: np.zeros(s.shape, s.dtype) for path, s in shapes.items() if path.startswith("dec/")}
    rules = [rule for rule in edm.rules(network, prefix) if _of_encoder(rule)]
    params, _ = load(rules, net, param_shapes(network), fresh=decoder)
    branch = {name: value for name, value in fx.weights.items() if name.startswith("cls_pred_branch.")}
    channels = next(iter(branch.values())).shape[0]
    downs = sum(value.ndim == 4 for value in branch.values()) - 2
    head = ConvHead(channels, branch[f"cls_pred_branch.{3 * downs}.weight"].shape[-1], downs, c["head_groups"])
    table = dmd2.head_rules(head)
    arrays, _ = load(table, branch, param_shapes(head))
    assert all(np.array_equal(value, branch[name]) for name, value in save(table, arrays).items())
    denoiser = Denoiser(network, EDM(sigma_data=c["sigma_data"]), EDMPrecondition())
    last = [row.name for row in network.plans[0] if row.kind == "block"][-1]
    task = DMD2Task(teacher=denoiser, times=(80.0,), head=head, taps=(f"enc.{last}",))
    given = image(fx, "x"), jnp.asarray(fx.io["sigma"]), {"label": label_of(fx.io["label_onehot"])}
    run = jax.jit(lambda *given: (denoiser.features(params, *given, task.taps), task.judged(params, arrays, *given)))
    found, logit = run(*given)
    fx.close(nchw(found[task.taps[0]]), "bottleneck", **BOTTLENECK)
    fx.close(logit, "logit", **BOTTLENECK)


def _of_encoder(rule: Any) -> bool:
    return not rule.official.startswith(("net.model.dec.", "net.model.out_"))


def check_simulation(fx: Fixture, task: DMD2Task, student: Any, cond: Any, d: DMD2Draws, k: int) -> None:
    """The simulated image, the time now trained, the student's input and its output for stopping step k."""
    d = dataclasses.replace(d, stop=jnp.full_like(d.stop, k))
    clean = backward_simulation(
        lambda x, t: task.denoiser(student, x, t, cond).denoised,
        task.denoiser.process,
        task.times,
        jnp.moveaxis(d.simulated, 1, 0),
        k,
    )
    fx.close(nchw(clean), f"bs_step{k}_clean", **ARRAY)
    x_t, t = task.student_input(student, cond, d)
    fx.close(nchw(x_t), f"bs_step{k}_generator_input", **ARRAY)
    index = np.full(clean.shape[0], int(task.denoiser.process.index(t)), fx.io[f"bs_step{k}_timestep"].dtype)
    fx.close(index, f"bs_step{k}_timestep")
    fx.close(nchw(task.generate(student, cond, d)), f"bs_step{k}_generated", **ARRAY)
