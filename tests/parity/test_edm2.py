"""EDM2's network, preconditioning, loss, forced weight normalisation and guided sampler against the official code."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.backbones.edm2_unet import EDM2Config, mp_cat, mp_silu, mp_sum, normalize, pixel_norm
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import Draws, EDMLoss, Uncertain
from gen.diffusion.process import EDM
from gen.nn.network import Network
from gen.pretrained.edm2 import IMPORTER
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def model(fx: Fixture) -> tuple[EDM2Config, dict[str, Any]]:
    """The fixture's network through the importer; the configuration is inferred from its weights."""
    given = fx.config
    inferred = IMPORTER.infer(fx.weights, head_width=given.get("channels_per_head", 64))
    expected = EDM2Config(
        size=given["img_resolution"],
        channels=given["img_channels"],
        num_classes=given["label_dim"],
        widths=tuple(given["model_channels"] * m for m in given["channel_mult"]),
        blocks=given["num_blocks"],
        attention=inferred.attention,
        head_width=given.get("channels_per_head", 64),
        uncertainty=given["logvar_channels"],
    )
    assert inferred == expected
    assert set(inferred.attention) <= set(given["attn_resolutions"])
    config, params, report = IMPORTER.load(fx.weights, inferred)
    assert len(report.matched) == len(fx.weights)
    return config, params


def denoiser(fx: Fixture, config: EDM2Config) -> Denoiser:
    sigma_data = fx.config["sigma_data"]
    return Denoiser(config, EDM(sigma_data=sigma_data), EDMPrecondition(sigma_data))


def labels(fx: Fixture, one_hot: np.ndarray) -> dict[str, jax.Array]:
    return {"label": jnp.asarray(one_hot.argmax(1), jnp.int32)} if fx.config["label_dim"] else {}


@pytest.mark.parametrize("fx", fixtures("edm2-unet*"), ids=str)
class TestNetwork:
    def test_weights_round_trip(self, fx: Fixture) -> None:
        saved = IMPORTER.save(*model(fx))
        assert saved.keys() == fx.weights.keys()
        for name, array in fx.weights.items():
            np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)

    @pytest.mark.parametrize("remat", ["none", "full"])
    def test_forward(self, fx: Fixture, remat: Any) -> None:
        config, params = model(fx)
        denoise = denoiser(fx, dataclasses.replace(config, remat=remat))
        x, sigma = nhwc(fx.io["x_noisy"]), jnp.asarray(fx.io["sigma"])
        cond = labels(fx, fx.io["class_labels"])
        inner, clock = denoise.parameterization.inputs(denoise.process, jnp.asarray(x), sigma)
        raw, features = jax.jit(denoise.net)(params, inner, (clock,), cond)
        fx.close(nchw(raw), "F")
        fx.close(features["logvar"], "logvar")
        run = jax.jit(denoise)
        prediction = run(params, x, sigma, cond)
        fx.close(nchw(prediction.denoised), "D")
        fx.close(prediction.extra["logvar"], "logvar")
        if cond:
            null = denoise.net.apply(params, cond, method="null")
            fx.close(nchw(run(params, x, sigma, null).denoised), "D_no_label")

    def test_loss_and_gradients(self, fx: Fixture) -> None:
        """In training mode: weights are normalised first, then the loss and its gradients are taken there."""
        config, params = model(fx)
        denoise, objective = denoiser(fx, config), Uncertain(EDMLoss(mean=-0.8, std=1.6))
        x, cond = jnp.asarray(nhwc(fx.io["loss_images"])), labels(fx, fx.io["class_labels"])
        sigma = jnp.exp(objective.inner.mean + objective.inner.std * fx.io["loss_normal_draw"].reshape(-1))
        draws = Draws(sigma, jnp.asarray(nhwc(fx.io["loss_noise_draw"])))
        params = denoise.net.project(params)
        conv_in = f"unet.enc.{config.size}x{config.size}_conv.weight"
        fx.close(IMPORTER.save(config, params)[conv_in], "forced_norm_conv_in")

        def total(p: Any) -> tuple[jax.Array, jax.Array]:
            losses, _ = objective.loss(lambda *a: denoise(p, *a), denoise.process, x, cond, draws)
            return losses.mean() * x[
                0
            ].size, losses  # officially a sum over the elements of an image, ours is their mean

        grads, losses = jax.jit(jax.grad(total, has_aux=True))(params)
        fx.close(losses, fx.io["loss"].mean((1, 2, 3)))
        official = IMPORTER.save(config, grads)
        fx.close(official[conv_in], "grad_conv_in")
        fx.close(official["unet.out_gain"], "grad_out_gain")
        for name in ("freqs", "phases"):
            assert not official[f"unet.emb_fourier.{name}"].any()

    def test_operations(self, fx: Fixture) -> None:
        a, b = (jnp.asarray(nhwc(fx.io[f"op.{k}"])) for k in "ab")
        fx.close(nchw(pixel_norm(a)), "op.pixelnorm_a")
        fx.close(nchw(normalize(a, (1, 2, 3))), "op.normalize_a")
        fx.close(nchw(mp_silu(a)), "op.mp_silu_a")
        fx.close(nchw(mp_sum(a, b[..., : a.shape[-1]], 0.3)), "op.mp_sum")
        fx.close(nchw(mp_cat(a, b, 0.4)), "op.mp_cat")
