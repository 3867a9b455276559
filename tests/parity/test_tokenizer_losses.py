"""Tokenizers' training losses against TiTok's and VA-VAE's official code: the functions that train, with gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.nn.discriminators import TiTokDiscriminator
from gen.nn.network import Network
from gen.pretrained.discriminators import titok_rules
from gen.tokenizers.adversarial import AdversarialTask, LeCAM
from gen.tokenizers.base import Gaussian, Quantized, TokenizerSpec
from gen.tokenizers.losses import penalties
from gen.tokenizers.proxy import code_loss
from gen.tokenizers.train import Rows
from gen.tokenizers.vavae import Projection
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.part import Part
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_discriminators import loaded
from tests.parity.test_dit import nchw, nhwc


@dataclasses.dataclass(frozen=True)
class Shown:
    """A tokenizer without a network: the fixture gives what it encodes to and what it decodes."""

    spec: Any = TokenizerSpec("continuous", (1,), (32, 32, 3))
    last_layer = "kernel"


@dataclasses.dataclass(frozen=True)
class Absolute:
    """The fixtures' stand-in for the perceptual networks: mean |x - y| on the [0, 1] scale."""

    weight: float
    name = "perceptual"

    def __call__(self, params: Any, images: jax.Array, decoded: jax.Array) -> jax.Array:
        return 0.5 * jnp.abs(images - decoded).mean((1, 2, 3))


def titok_task(fx: Fixture) -> AdversarialTask:
    given, discriminator = fx.config["losses"], fx.config["discriminator"]
    pixel = given["reconstruction_weight"] * (1 if "moments" not in fx.io else np.exp(-given["logvar_init"]))
    return AdversarialTask(
        tokenizer=Shown(),
        discriminator=TiTokDiscriminator(width=discriminator["hidden_channels"], stages=discriminator["num_stages"]),
        l2=pixel if given["reconstruction_loss"] == "l2" else 0.0,
        l1=pixel if given["reconstruction_loss"] == "l1" else 0.0,
        kl=given["kl_weight"],
        quantizer={"quantizer": given["quantizer_weight"]},
        terms=(Absolute(given["perceptual_weight"]),),
        gan_weight=given["discriminator_factor"] * given["discriminator_weight"],
        gan_start=given["discriminator_start"],
        lecam=LeCAM(given["lecam_regularization_weight"], fx.config["lecam_ema_decay"]),
    )


@pytest.mark.parametrize("fx", fixtures("titok-training-loss-*"), ids=str)
def test_titok(fx: Fixture) -> None:
    task, given = titok_task(fx), fx.config["losses"]
    discriminator = loaded(titok_rules(task.discriminator, "discriminator."), task.discriminator, fx.weights)
    image, decoded = (2.0 * nhwc(fx.io[name]) - 1.0 for name in ("image", "reconstruction"))
    kind = "kl" if "moments" in fx.io else "quantizer"
    if kind == "kl":
        mean, logvar = np.split(fx.io["moments"][:, :, 0].transpose(0, 2, 1), 2, axis=-1)
        encoded: Any = Gaussian(jnp.asarray(mean), jnp.asarray(logvar))
    else:
        losses = {"quantizer": jnp.full(len(image), fx.io["quantizer_loss_in"])}
        encoded = Quantized(jnp.zeros((len(image), 1), jnp.int32), jnp.zeros((len(image), 1, 1)), losses)
    frozen = {"perceptual": {}}
    start = given["discriminator_start"]

    class Given(AdversarialTask):
        """The same with the fixture's reconstructions, which stand where the parameters would."""

        def reconstruct(self, params: Any, rows: Rows) -> Any:
            return encoded, None, params

    task = Given(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    rows = Rows(jnp.asarray(image), jax.random.split(jax.random.key(0), len(image)))
    for step in (start - 1, start):
        tag, share = f"gen{step}", task.schedules(step, step + 1)["gan"]

        def loss(y: jax.Array, step: int = step, share: Any = share) -> Any:
            if task.select(step) == "tokenizer":
                return task.loss(y, rows, frozen)
            return task.adversarial_loss(y, discriminator, rows, frozen, share)

        (total, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(decoded))
        fx.close(total, f"{tag}_total")
        fx.close(2.0 * nchw(gradient), f"{tag}_grad_reconstruction")  # ours are images on [-1, 1]
        pixel = task.l2 * aux.metrics["mse"] + (task.l1 * aux.metrics["l1"] if task.l1 else 0.0)
        fx.close(pixel, f"{tag}_reconstruction_loss")
        fx.close(given["perceptual_weight"] * aux.metrics["perceptual"], f"{tag}_perceptual_loss")
        weight = given["kl_weight"] if kind == "kl" else given["quantizer_weight"]
        fx.close(weight * aux.metrics[kind], f"{tag}_{kind}_loss")
        fx.close(aux.metrics.get("gan", 0.0), f"{tag}_gan_loss")
        fx.close(aux.metrics.get("gan_weight", 0.0) * aux.metrics.get("gan", 0.0), f"{tag}_weighted_gan_loss")
    check_titok_discriminator(fx, task, discriminator, image, decoded)


def check_titok_discriminator(fx: Fixture, task: AdversarialTask, discriminator: Any, image: Any, decoded: Any) -> None:
    """Three calls of the discriminator's loss, the second on other images, with LeCAM's averages between them."""
    averages = {"lecam_real": jnp.zeros(()), "lecam_fake": jnp.zeros(())}
    found: dict[str, list[Any]] = {name: [] for name in ("total", "lecam", "real", "fake", "ema_real", "ema_fake")}
    call = jax.jit(task.discriminator_loss)
    for number in range(3):
        real = image if number != 1 else 0.5 * (image[::-1] + 1.0) - 1.0  # half of the image on [0, 1]
        total, aux = call(discriminator, real, decoded, averages)
        averages = {f"lecam_{s}": task.lecam.moved(averages[f"lecam_{s}"], aux.metrics[s]) for s in ("real", "fake")}
        found["total"].append(total)
        found["lecam"].append(task.lecam.weight * aux.metrics["lecam"])
        for side in ("real", "fake"):
            found[side].append(aux.metrics[side])
            found[f"ema_{side}"].append(averages[f"lecam_{side}"])
        if number == 0:
            fx.close(task.gan_loss(discriminator, real)[1][:, None], "disc_logits_real_map")
            fx.close(task.gan_loss(discriminator, decoded)[1][:, None], "disc_logits_fake_map")
    fx.close(found["total"], "disc_total")
    fx.close(found["lecam"], "disc_lecam")
    for side in ("real", "fake"):
        fx.close(found[side], f"disc_mean_logits_{side}")
        fx.close(found[f"ema_{side}"], f"disc_ema_{side}_after")


@pytest.mark.parametrize("fx", fixtures("titok-vq-losses*"), ids=str)
def test_titoks_first_stage(fx: Fixture) -> None:
    ids = fx.io["stage1_codes"].reshape(nhwc(fx.io["stage1_logits"]).shape[:-1])
    found = code_loss(jnp.asarray(nhwc(fx.io["stage1_logits"])), jnp.asarray(ids))
    fx.close(found, "stage1_reconstruction_loss")
    losses = {"quantizer": jnp.full(len(ids), fx.io["stage1_quantizer_loss"])}
    fx.close(found + penalties(losses, {"quantizer": 1.0}), "stage1_total_loss")


@pytest.mark.parametrize("fx", fixtures("titok-schedules*"), ids=str)
def test_titok_schedules(fx: Fixture) -> None:
    given = fx.config
    for kind in ("cosine", "constant"):
        final = given["end_lr"] / given["base_lr"] if kind == "cosine" else 0.0
        optim = OptimConfig(given["base_lr"], schedule=kind, warmup=given["warmup"], final=final)
        fx.close([optim.rate(int(step), given["total"]) for step in fx.io["step"]], f"lr_{kind}")
    # the first official call copies the parameters, as ours does at the start; the second is our first update
    average = Constant(given["ema_max"], warmup=True)
    part = Part("network", Projection(2, 3), OptimConfig(), (average,))
    params = Network(part.network).init(jax.random.key(0))
    (started,) = part.begin(params)[2].values()
    copied = jax.tree.map(np.array_equal, started, params)
    start = 0.0 if all(jax.tree.leaves(copied)) else 1.0
    later = [1.0 - float(average.weight(jnp.int32(step - 1), 1)) for step in fx.io["ema_step"] if step > 1]
    fx.close([start] * int((fx.io["ema_step"] == 1).sum()) + later, "ema_decay")


@pytest.mark.parametrize("fx", fixtures("vavae-diagonal-gaussian*"), ids=str)
def test_posterior(fx: Fixture) -> None:
    def posterior(name: str) -> Gaussian:
        return Gaussian(*jnp.split(jnp.asarray(nhwc(fx.io[name])), 2, axis=-1))

    def between(a: Gaussian, b: Gaussian) -> jax.Array:
        """The KL of two posteriors, entry by entry."""
        ratio = a.std / b.std
        return 0.5 * (jnp.square((a.mean - b.mean) / b.std) + jnp.square(ratio) - 1.0) - jnp.log(ratio)

    def total(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1).sum(1)

    full, mild, other = (posterior(name) for name in ("parameters", "parameters_mild", "parameters_other"))
    fx.close(nchw(full.mean), "mean")
    fx.close(nchw(2.0 * jnp.log(full.std)), "logvar")
    fx.close(nchw(full.std), "std")
    fx.close(nchw(full.std**2), "var")
    fx.close(nchw(full.mode()), "mode")
    fx.close(nchw(full.mean + full.std * nhwc(fx.io["noise"])), "sample")
    fx.close(full.kl(), "kl")
    fx.close(mild.kl(), "kl_mild")
    normal = Gaussian(jnp.zeros_like(full.mean), jnp.zeros_like(full.mean))
    fx.close(nchw(2.0 * between(full, normal)), "kl_no_sum")
    fx.close(total(between(full, other)), "kl_to_other")
    fx.close(total(between(mild, other)), "kl_mild_to_other")
    square = jnp.square((nhwc(fx.io["nll_at"]) - mild.mean) / mild.std)
    fx.close(total(0.5 * (jnp.log(2.0 * jnp.pi) + square) + jnp.log(mild.std)), "nll_mild")
    fx.close(nchw(full.mode()), "deterministic_sample")  # its deviation and KL are 0 by definition
