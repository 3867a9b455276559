"""The whole training objective of VA-VAE against the official code: every term, both adaptive weights, gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.features.lpips import lpips
from gen.features.vit import ViTConfig
from gen.nn.adversarial import AdaptiveWeight
from gen.nn.discriminators import PatchGAN
from gen.nn.network import Network
from gen.pretrained.discriminators import patchgan_rules
from gen.pretrained.lpips import fold
from gen.pretrained.sdvae import COMPVIS
from gen.tokenizers.train import Rows
from gen.tokenizers.vavae import VAVAETask, VisionFoundation
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_discriminators import loaded
from tests.parity.test_dit import nchw, nhwc


@dataclasses.dataclass(frozen=True)
class Given(VisionFoundation):
    """Aligned with the fixture's features, which stand where the encoder's weights would."""

    def features(self, params: Any, images: jax.Array, side: int) -> jax.Array:
        return params.reshape(len(params), side * side, -1)


@dataclasses.dataclass(frozen=True)
class Perceptual:
    """LPIPS with a trunk of the fixture's widths."""

    weight: float = 1.0
    name = "lpips-vgg"

    def __call__(self, params: Any, images: jax.Array, decoded: jax.Array) -> jax.Array:
        return lpips(params, images, decoded, "vgg")


class Noised(VAVAETask):
    """Latents are sampled with the fixture's noise, which stands among the conditions."""

    def encode(self, params: Any, rows: Rows) -> Any:
        own = {name: tree for name, tree in params.items() if name != "projection"}
        posterior = self.tokenizer.encode(own, rows.images)
        return posterior, posterior.mean + posterior.std * rows.cond["noise"]


def part(fx: Fixture, prefix: str) -> dict[str, np.ndarray]:
    """The weights under a prefix."""
    return {name.removeprefix(prefix): a for name, a in fx.weights.items() if name.startswith(prefix)}


@functools.cache
def model(fx: Fixture) -> tuple[VAVAETask, dict[str, Any], dict[str, Any]]:
    """The task, the trained parameters by part and the frozen arrays."""
    given = fx.config["loss"]
    config = COMPVIS.infer(fx.weights, size=fx.config["ddconfig"]["resolution"])
    assert config.channels == fx.config["embed_dim"]
    _, tokenizer, _ = COMPVIS.load(fx.weights, config)
    discriminator = PatchGAN(width=fx.config["discriminator"]["ndf"], layers=fx.config["discriminator"]["n_layers"])
    critic = loaded(patchgan_rules(discriminator), discriminator, part(fx, "loss.discriminator."))
    task = Noised(
        tokenizer=config,
        discriminator=discriminator,
        alignment=Given(
            ViTConfig(width=fx.config["aux_feature_dim"]),
            given["vf_weight"],
            given["cos_margin"],
            given["distmat_margin"],
            AdaptiveWeight(1e8, 1e-4) if given["adaptive_vf"] else None,
        ),
        l1=1.0,
        l2=0.0,
        kl=given["kl_weight"],
        terms=(Perceptual(given.get("perceptual_weight", 1.0)),),
        signed=True,
        summed=True,
        gan_weight=given["disc_weight"],
        adaptive=AdaptiveWeight(),
        gan_start=given["disc_start"] // 2,  # the official step counts both optimisers'
    )
    _, perceptual = fold(part(fx, "loss.perceptual_loss."))
    assert fx.config["reverse_proj"]
    projection = {"kernel": fx.weights["linear_proj.weight"][:, :, 0, 0].T}
    params = {"tokenizer": {**tokenizer, "projection": projection}, "discriminator": critic}
    return task, params, {"lpips-vgg": perceptual, "encoder": nhwc(fx.io["aux_feature"])}


def batch(fx: Fixture) -> Rows:
    images, noise = (jnp.asarray(nhwc(fx.io[name])) for name in ("image", "noise"))
    return Rows(images, jax.random.split(jax.random.key(0), len(images)), {"noise": noise})


@pytest.mark.parametrize("fx", fixtures("vavae-training-loss*"), ids=str)
def test_intermediates(fx: Fixture) -> None:
    task, params, frozen = model(fx)
    rows = batch(fx)
    images = rows.images
    posterior, latents = task.encode(params["tokenizer"], rows)
    decoded = task.decode(params["tokenizer"], latents, rows)
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "z_sample": latents, "reconstruction": decoded}
    found["z_projected"] = latents @ params["tokenizer"]["projection"]["kernel"]
    for name, array in found.items():
        fx.close(nchw(array), name)
    fx.close(posterior.kl(), "kl_per_sample")
    fx.close(task.terms[0](frozen["lpips-vgg"], images, decoded).reshape(-1, 1, 1, 1), "lpips")
    fx.close(jnp.abs(images - decoded).mean(), "l1_mean")
    logits, _ = Network(task.discriminator)(params["discriminator"], decoded)
    fx.close(logits[:, None], "patch_logits_fake_train")


@pytest.mark.parametrize("fx", fixtures("vavae-training-loss*"), ids=str)
def test_objective(fx: Fixture) -> None:
    task, params, frozen = model(fx)
    rows = batch(fx)
    images = rows.images

    def loss(params: Any, share: Any) -> Any:
        return task.adversarial_loss(params["tokenizer"], params["discriminator"], rows, frozen, share)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, whole), _ = step(params, 1.0)
    for tag in ("before", "after"):
        share = fx.io[f"{tag}/disc_factor"]
        official = int(fx.io[f"{tag}/global_step"])
        assert (share == 1.0) == (official >= fx.config["loss"]["disc_start"])
        (total, aux), gradient = step(params, share)
        fx.close(total, f"{tag}/total_loss")
        terms, size = aux.metrics, images[0].size
        rec = 2.0 * terms["l1"] + task.terms[0].weight * terms["lpips-vgg"]
        fx.close(rec, f"{tag}/rec_loss")
        fx.close(size * rec, f"{tag}/nll_loss")
        fx.close(terms["kl"], f"{tag}/kl_loss")
        fx.close(terms["gan"], f"{tag}/g_loss")
        fx.close(whole.metrics["gan_weight"], f"{tag}/d_weight")
        fx.close(terms["vf"], f"{tag}/vf_loss")
        fx.close(terms["vf_weight"], f"{tag}/vf_weight")
        projection = gradient["tokenizer"].pop("projection")
        named = COMPVIS.save(task.tokenizer, gradient["tokenizer"])
        named["linear_proj.weight"] = np.asarray(projection["kernel"]).T[:, :, None, None]
        first = gradient["discriminator"]["first"]["kernel"]
        named["loss.discriminator.main.0.weight"] = np.asarray(first).transpose(3, 2, 0, 1)
        for name in fx.io:
            if name.startswith(f"{tag}/grad__"):
                fx.close(named[name.removeprefix(f"{tag}/grad__")], name)

    def critic(params: Any) -> Any:
        return task.discriminator_loss(params, images, jnp.asarray(nhwc(fx.io["reconstruction"])), {})

    (value, aux), gradient = jax.jit(jax.value_and_grad(critic, has_aux=True))(params["discriminator"])
    for tag in ("before", "after"):
        share = fx.io[f"{tag}/disc_factor"]
        fx.close(share * value, f"{tag}/disc_loss")
        fx.close(aux.metrics["real"], f"{tag}/logits_real")
        fx.close(aux.metrics["fake"], f"{tag}/logits_fake")
        name = f"{tag}/grad_d__loss.discriminator.main.0.weight"
        if name in fx.io:
            fx.close(np.asarray(gradient["first"]["kernel"]).transpose(3, 2, 0, 1), name)
