"""EDM2's network, preconditioning, loss, forced weight normalisation and guided sampler against the official code."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.diffusion.backbones.edm2_unet import EDM2Config, mp_cat, mp_silu, mp_sum, normalize, pixel_norm
from gen.diffusion.denoiser import Denoiser, EDMPrecondition
from gen.diffusion.objectives import Draws, EDMLoss, Uncertain
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM
from gen.pretrained.edm2 import IMPORTER
from gen.pretrained.readers import read_weights
from gen.sampling.edm_samplers import edm_sampler
from gen.sampling.guidance import Autoguidance
from gen.sampling.integrate import Problem, integrate
from gen.training.indexed import sample_keys
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def model(fx: Fixture) -> tuple[EDM2Config, dict[str, Any]]:
    """The fixture's network through the importer; the configuration is inferred from its weights."""
    given = fx.config
    inferred = IMPORTER.infer(fx.weights, head_width=given.get("channels_per_head", 64))
    width, mult = given.get("model_channels", 192), given.get("channel_mult", (1, 2, 3, 4))
    expected = EDM2Config(
        size=given["img_resolution"],
        channels=given["img_channels"],
        num_classes=given["label_dim"],
        widths=tuple(width * m for m in mult),
        blocks=given.get("num_blocks", 3),
        attention=inferred.attention,
        head_width=given.get("channels_per_head", 64),
        uncertainty=given.get("logvar_channels", 128),
    )
    assert inferred == expected
    assert set(inferred.attention) <= set(given.get("attn_resolutions", (16, 8)))
    names = {"res_balance": "residual_balance", "attn_balance": "attention_balance"}
    named = ("label_balance", "concat_balance", "res_balance", "attn_balance")  # arrays do not tell these
    balances = {names.get(name, name): given[name] for name in named if name in given}
    clip = given.get("clip_act", 256.0)
    inferred = dataclasses.replace(inferred, **balances, clip=math.inf if clip is None else clip)
    config, params, report = IMPORTER.load(fx.weights, inferred)
    assert len(report.matched) == len(fx.weights)
    return config, params


def denoiser(fx: Fixture, config: EDM2Config) -> Denoiser:
    sigma_data = fx.config.get("sigma_data", 0.5)
    return Denoiser(config, EDM(sigma_data=sigma_data), EDMPrecondition())


def labels(fx: Fixture) -> dict[str, jax.Array]:
    """Class numbers of the one-hot rows, where the network has classes."""
    return {"label": jnp.asarray(fx.io["class_labels"].argmax(1), jnp.int32)} if fx.config["label_dim"] else {}


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
        cond = labels(fx)
        inner, (clock,) = denoise.parameterization.inputs(denoise.process, jnp.asarray(x), sigma)
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

    def test_from_file_to_samples(self, fx: Fixture, tmp_path: Path) -> None:
        """Official file -> gen convert -> gen.load: the official denoised images, guided samples; and back."""
        file, run = str(fx.path / "weights.safetensors"), str(tmp_path / "run")
        heads = str(fx.config.get("channels_per_head", 64))
        assert cli.main(["convert", file, "--out", run, "--network.head_width", heads]) == 0
        loaded = gen.load(run)
        net, cond = loaded.params["net"], labels(fx)
        denoiser = loaded.denoiser
        assert (denoiser.process, denoiser.parameterization) == (EDM(sigma_data=0.5), EDMPrecondition())
        process = EDM(sigma_data=fx.config.get("sigma_data", 0.5))
        network = model(fx)[0]  # with what arrays do not tell
        denoise = dataclasses.replace(loaded.denoiser, network=network, process=process)
        prediction = jax.jit(denoise)(net, nhwc(fx.io["x_noisy"]), jnp.asarray(fx.io["sigma"]), cond)
        fx.close(nchw(prediction.denoised), "D")
        assert loaded.generator.nfe == 63
        sampler = dataclasses.replace(loaded.generator.sampler, steps=2, guidance=Autoguidance(2.0))
        generator = dataclasses.replace(loaded.generator, sampler=sampler)
        plain = dataclasses.replace(generator, sampler=dataclasses.replace(sampler, guidance=Autoguidance()))
        keys = sample_keys(0, np.arange(len(fx.io["sigma"])))
        same = jax.jit(generator)({"net": net, "guide": net}, keys, cond)  # a guide no weaker than the model
        fx.close(same, np.asarray(jax.jit(plain)({"net": net}, keys, cond)))
        assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
        back = read_weights(tmp_path / "back.safetensors")
        assert back.keys() == fx.weights.keys()
        assert all(np.array_equal(back[k], v) for k, v in fx.weights.items())

    def test_loss_and_gradients(self, fx: Fixture) -> None:
        """In training mode: weights are normalised first, then the loss and its gradients are taken there."""
        config, params = model(fx)
        denoise, objective = denoiser(fx, config), Uncertain(EDMLoss(mean=-0.8, std=1.6))
        x, cond = jnp.asarray(nhwc(fx.io["loss_images"])), labels(fx)
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


CASES = [
    pytest.param(fx, case, id=f"{fx}-{case}") for fx in fixtures("edm2-guided-sampler*") for case in fx.config["cases"]
]


def stand_in(fx: Fixture, role: str, dtype: Any, calls: list | None = None) -> Any:
    """The README's stand-in for the main or guiding network; notes its calls."""
    s2, mix = fx.config[role]["s2"], fx.config[role]["mix"]
    given = jnp.asarray(fx.io["labels"], dtype)
    bias = 0.05 * jnp.sum(jnp.arange(1, given.shape[1] + 1) * given, axis=1)[:, None, None, None]

    def denoise(x: Any, t: Any, cond: Any, step: Any, carry: Any) -> Any:
        if calls is not None:
            calls.append((np.asarray(x), float(t)))
        d = x * s2 / (t**2 + s2) + mix * jnp.sin(x / (1 + t)) + bias
        return Prediction(d, x, t, {}, EDM(), "x"), carry

    return denoise


def guided_samples(fx: Fixture, case: str, dtype: Any, calls: list | None = None) -> jax.Array:
    options = {"num_steps": 32, **fx.config["cases"][case]}
    scale = options.pop("guidance", 1.0)
    sampler = edm_sampler(**options)
    grid, solver = sampler.times(sampler.process), sampler.solver
    guidance = Autoguidance(scale)
    guided = guidance(stand_in(fx, "main", dtype, calls), lambda cond: cond, stand_in(fx, "aux", dtype))
    x = jnp.asarray(fx.io["noise"], dtype) * jnp.asarray(grid.times[0], dtype)
    churned = np.zeros(grid.steps, bool)
    draws = jnp.zeros((1, *x.shape), dtype)
    if f"{case}.noises" in fx.io:
        # the official code takes the next draw where it churns, ours has one for every step
        churned = (grid.times[:-1] >= solver.s_min) & (grid.times[:-1] <= (solver.s_max or np.inf))
        draws = jnp.asarray(fx.io[f"{case}.noises"], dtype)
    which = jnp.asarray(np.maximum(np.cumsum(churned) - 1, 0))

    def sample(x: jax.Array) -> jax.Array:
        return integrate(solver, Problem(guided, x, grid, lambda i: draws[which[i]], {}, guidance.init(x)))

    return jax.jit(sample)(x)


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_guided_sampler_float64(fx: Fixture, case: str) -> None:
    with jax.enable_x64(True):
        calls: list[tuple[np.ndarray, float]] = []
        with jax.disable_jit():
            out = guided_samples(fx, case, jnp.float64, calls)
        fx.close(np.asarray([sigma for _, sigma in calls]), f"{case}.call_sigma", rtol=1e-9, atol=0)
        fx.close(np.stack([x for x, _ in calls]), f"{case}.call_x", rtol=1e-9, atol=0)
        fx.close(out, f"{case}.out", rtol=1e-9, atol=0)


@pytest.mark.parametrize(("fx", "case"), CASES)
def test_guided_sampler_float32(fx: Fixture, case: str) -> None:
    fx.close(guided_samples(fx, case, jnp.float32), f"{case}.out")
