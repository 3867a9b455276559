"""Discriminators and adversarial losses against VQGAN's, TiTok's, ViTok's and VA-VAE's official code."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.nn.adversarial import (
    AdaptiveWeight,
    hinge_discriminator_loss,
    lecam,
    linear_generator_loss,
    vanilla_discriminator_loss,
)
from gen.nn.discriminators import PatchGAN, StyleBlock, TiTokDiscriminator, adaptive_max_pool, blur
from gen.nn.network import Network, param_shapes
from gen.pretrained.discriminators import PATCHGAN_COUNTERS, patchgan_rules, style_block_rules, titok_rules
from gen.pretrained.rules import load, save
from gen.training.part import with_buffers
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def loaded(rules: Any, config: Any, weights: Any) -> Any:
    """The parameters; what is saved of them are the official arrays again, but for batch norm's counters."""
    params, _ = load(rules, weights, param_shapes(config), ignore=(PATCHGAN_COUNTERS,))
    saved = save(rules, params)
    wanted = {name: array for name, array in weights.items() if not name.endswith("num_batches_tracked")}
    assert saved.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)
    return params


@pytest.mark.parametrize("fx", fixtures("patchgan*"), ids=str)
def test_patchgan(fx: Fixture) -> None:
    given = fx.config
    assert not given["use_actnorm"], "no published PatchGAN has actnorm, and ours has none"
    config = PatchGAN(given["input_nc"], given["ndf"], given["n_layers"])
    rules = patchgan_rules(config)
    params = loaded(rules, config, fx.weights)
    real, fake = nhwc(fx.io["real"]), nhwc(fx.io["fake"])

    def judged(params: Any, real: jax.Array, fake: jax.Array) -> Any:
        on_real, first = Network(config)(params, real)
        on_fake, second = Network(config)(with_buffers(params, first), fake)
        return on_real, on_fake, second

    def hinge(params: Any) -> Any:
        on_real, on_fake, after = judged(params, real, fake)
        return hinge_discriminator_loss(on_real, on_fake), (on_real, on_fake, after)

    (loss, (on_real, on_fake, after)), grads = jax.jit(jax.value_and_grad(hinge, has_aux=True))(params)
    fx.close(on_real[:, None], "logits_real_train")
    fx.close(on_fake[:, None], "logits_fake_train")
    fx.close(loss, "hinge_d_loss")
    fx.close(vanilla_discriminator_loss(on_real, on_fake), "vanilla_d_loss")
    fx.close(linear_generator_loss(on_fake), "generator_loss")
    official, stored = save(rules, grads), save(rules, with_buffers(params, after))
    for name in fx.io:
        kind, _, weight = name.partition("__")
        if kind == "grad_hinge_d_loss":
            fx.close(official[weight], name)
        if kind == "after":
            fx.close(stored[weight], name)

    @jax.jit
    def evaluated(images: jax.Array) -> jax.Array:
        return Network(config)(params, images, stored=True)[0]

    fx.close(evaluated(real)[:, None], "logits_real_eval")
    fx.close(evaluated(fake)[:, None], "logits_fake_eval")
    gradient = jax.jit(jax.grad(lambda x: linear_generator_loss(judged(params, real, x)[1])))(fake)
    fx.close(nchw(gradient), "grad_generator_loss_wrt_fake")


@pytest.mark.parametrize("fx", fixtures("titok-discriminator*"), ids=str)
def test_titok_discriminator(fx: Fixture) -> None:
    config = TiTokDiscriminator(
        fx.io["image"].shape[1], width=fx.config["hidden_channels"], stages=fx.config["num_stages"]
    )
    params = loaded(titok_rules(config), config, fx.weights)
    network = Network(config).module(params)
    x = 2.0 * nhwc(fx.io["image"]) - 1.0
    first = network.first(x)
    fx.close(nchw(first), "after_block_in")
    fx.close(nchw(network.stages["stage0"].halved(first)), "after_stage0_downsample")
    fx.close(nchw(network.stages["stage0"](first)), "after_stage0")
    pooled = adaptive_max_pool(functools.reduce(lambda h, stage: stage(h), network.stages.values(), first), 16)
    fx.close(nchw(pooled), "after_pool")
    fx.close(jax.jit(Network(config))(params, x)[0][:, None], "logits")


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of the StyleGAN discriminator as a network of its own."""

    inputs: int
    outputs: int

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return StyleBlock(self.inputs, self.outputs, rngs)


@pytest.mark.parametrize("fx", fixtures("stylegan-resblock*"), ids=str)
def test_style_block(fx: Fixture) -> None:
    assert fx.config["blur_resample"], "the block halves by the blur"
    assert fx.config["filter"] == [1, 3, 3, 1]
    config = Block(fx.config["input_dim"], fx.config["output_dim"])
    params = loaded(style_block_rules(), config, fx.weights)
    x = nhwc(fx.io["x"])
    fx.close(nchw(blur(x)), "blurred")
    fx.close(nchw(jax.jit(Network(config))(params, x)), "y")


@pytest.mark.parametrize("fx", fixtures("lecam*"), ids=str)
def test_lecam(fx: Fixture) -> None:
    decay = fx.config["ema_decay"]
    rows = []
    for real, fake, before in zip(fx.io["logits_real"], fx.io["logits_fake"], fx.io["table"], strict=True):
        loss = lecam(jnp.mean(real), jnp.mean(fake), before[0], before[1])
        after = [decay * old + (1 - decay) * new.mean() for old, new in zip(before[:2], (real, fake), strict=True)]
        rows.append([*before[:2], loss, *after])
    fx.close(np.asarray(rows), "table")


@pytest.mark.parametrize("fx", fixtures("adaptive-weight*"), ids=str)
def test_adaptive_weight(fx: Fixture) -> None:
    given = fx.config
    features, target, direction = (nhwc(fx.io[name]) for name in ("features", "target", "gan_direction"))
    kernel = fx.io["last_layer_weight"].transpose(2, 3, 1, 0)
    gan = AdaptiveWeight(given["clamp_gan"], given["eps"])
    vf = AdaptiveWeight(given["clamp_vf"], given["eps"])

    def out(kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    nll = jax.grad(lambda k: jnp.abs(out(k) - target).sum() / len(target))(kernel)
    rows = []
    for s in fx.io["table"][:, 0]:
        g = jax.grad(lambda k, s=s: -jnp.mean(s * direction * jnp.tanh(out(k))))(kernel)
        weights = given["disc_weight"] * gan(nll, g), given["vf_weight"] * vf(nll, g)
        rows.append([s, jnp.linalg.norm(nll.ravel()), jnp.linalg.norm(g.ravel()), *weights])
    for found, wanted in zip(np.asarray(rows, np.float32), fx.io["table"], strict=True):
        fx.close(found, wanted, rtol=0.0, atol=1e-4 * np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
