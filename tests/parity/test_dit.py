"""DiT and its DDPM machinery against the official code: network, guidance, losses, sampling, likelihood."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.diffusion.backbones.dit import DiTConfig
from gen.diffusion.chain import Chain, Variance, bits_per_dimension
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.diffusion.objectives import DDPMLoss, Draws
from gen.diffusion.prediction import Prediction
from gen.nn.layers import patchify, sincos_positions, sinusoid
from gen.nn.network import Network
from gen.pretrained import dit
from gen.pretrained.readers import read_weights
from gen.sampling.grids import Grid, Respaced, space_timesteps
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, integrate, states
from gen.sampling.solvers import DDIM, Ancestral
from tests.parity.conftest import Fixture, fixtures


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -3, -1)


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def model(fx: Fixture) -> tuple[DiTConfig, dict[str, Any]]:
    """The fixture's network through the importer; the configuration is inferred from its weights."""
    args = fx.config["args"]
    null_class = args.get("class_dropout_prob", 0.1) > 0
    config = dit.config(fx.weights, heads=args["num_heads"], null_class=null_class)
    expected = {
        "size": (args.get("input_size", 32),) * 2,
        "channels": args.get("in_channels", 4),
        "patch": args.get("patch_size", 2),
        "width": args.get("hidden_size", 1152),
        "depth": args.get("depth", 28),
        "num_classes": args.get("num_classes", 1000),
        "learned_variance": args.get("learn_sigma", True),
    }
    assert {k: getattr(config, k) for k in expected} == expected
    assert int(config.width * config.mlp_ratio) == int(config.width * args.get("mlp_ratio", 4.0))
    _, params, report = dit.IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    return config, params


@pytest.mark.parametrize("fx", fixtures("dit-forward*", "dit-cfg*", "dit-ddpm-*"), ids=str)
def test_weights_round_trip(fx: Fixture) -> None:
    saved = dit.IMPORTER.save(*model(fx))
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)
        assert saved[name].dtype == array.dtype


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("fx", fixtures("dit-forward*"), ids=str)
def test_forward(fx: Fixture, scan: bool) -> None:
    config, params = model(fx)
    net = Network(dataclasses.replace(config, scan=scan))
    module = net.module(params)
    x, t, label = nhwc(fx.io["x"]), jnp.asarray(fx.io["t"]), jnp.asarray(fx.io["y"])
    fx.close(sinusoid(t), "t_sinusoid")
    fx.close(module.time(t), "t_emb")
    fx.close(module.label(label), "y_emb")
    fx.close(sincos_positions(config.grid, config.width)[None], "pos_embed")
    fx.close(module.patch(patchify(jnp.asarray(x), config.patch)), "tokens_before_pos")

    taps = ("tokens", *(f"block_{i}" for i in range(config.depth)))
    out, features = jax.jit(lambda x, t: net(params, x, (t,), {"label": label}, taps=taps))(x, t)
    fx.close(features["tokens"] - sincos_positions(config.grid, config.width), "tokens_before_pos")
    for i in range(config.depth):
        fx.close(features[f"block_{i}"], f"after_block_{i}")
    fx.close(patchify(out, config.patch), "final_layer_out")
    fx.close(nchw(out), "out")
    out, _ = net(params, x, (jnp.asarray(fx.io["t_fractional"]),), {"label": label})
    fx.close(nchw(out), "out_t_fractional")

    stopped, features = net(params, x, (t,), {"label": label}, taps=("block_0",), stop=True)
    fx.close(stopped, "after_block_0")
    fx.close(features["block_0"], "after_block_0")


@pytest.mark.parametrize("fx", fixtures("dit-cfg*"), ids=str)
def test_guidance(fx: Fixture) -> None:
    config, params = model(fx)
    denoiser = Denoiser(config, DDPM(), Predict("eps", clock="index", learned_variance=config.learned_variance))
    half = len(fx.io["x_doubled"]) // 2
    x, index, label = (fx.io[k][:half] for k in ("x_doubled", "t_doubled", "y_doubled"))
    cond = {"label": jnp.asarray(label)}
    null = denoiser.net.apply(params, cond, method="null")
    np.testing.assert_array_equal(null["label"], fx.io["y_doubled"][half:])
    t, x = jnp.asarray(denoiser.process.time(index), jnp.float32), jnp.asarray(nhwc(x))

    def call(prediction: Prediction) -> np.ndarray:
        return nchw(jnp.concatenate([prediction.value, *prediction.extra.values()], axis=-1))

    fx.close(call(denoiser(params, x, t, cond)), "raw_cond")
    fx.close(call(denoiser(params, x, t, null)), "raw_uncond")
    for scale in fx.config["cfg_scales"]:
        # the published code guides three channels, whatever the number of channels
        for channels, name in ((3, "out_scale"), (None, "out_all_channels_scale")):
            guidance = ClassifierFree(scale, channels)
            guided = guidance(denoiser.bind(params), lambda c: denoiser.net.apply(params, c, method="null"))
            prediction, _ = guided(x, t, cond, jnp.int32(0), guidance.init(x))
            first, guided_channels = call(prediction), channels or config.channels
            second = np.concatenate([first[:, :guided_channels], fx.io["raw_uncond"][:, guided_channels:]], axis=1)
            fx.close(np.concatenate([first, second]), f"{name}_{scale}")


def losses(
    fx: Fixture,
    params: Mapping[str, Any],
    config: DiTConfig,
    *,
    objective: DDPMLoss = DDPMLoss(),
    index: np.ndarray | None = None,
    schedule: str = "linear",
    kind: Any = "eps",
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    process = DDPM(schedule)
    denoiser = Denoiser(config, process, Predict(kind, clock="index", learned_variance=config.learned_variance))
    index = fx.io["t"] if index is None else index
    x, eps = jnp.asarray(nhwc(fx.io["x_start"])), jnp.asarray(nhwc(fx.io["noise"]))
    draws = Draws(jnp.asarray(process.time(index), jnp.float32), eps)
    cond = {"label": jnp.asarray(fx.io["y"])}
    return objective.loss(lambda x, t, cond: denoiser(params, x, t, cond), process, x, cond, draws)


def without_variance(params: Mapping[str, Any], config: DiTConfig) -> tuple[dict[str, Any], DiTConfig]:
    """The same network with only its first C output channels."""

    def cut(array: np.ndarray) -> np.ndarray:
        split = array.reshape(*array.shape[:-1], config.patch**2, 2 * config.channels)
        return split[..., : config.channels].reshape(*array.shape[:-1], -1)

    final = {k: cut(v) for k, v in params["final"].items()}
    return {**params, "final": final}, dataclasses.replace(config, learned_variance=False)


@pytest.mark.parametrize("fx", fixtures("dit-ddpm-losses*"), ids=str)
class TestLosses:
    def test_schedules(self, fx: Fixture) -> None:
        names = {
            "betas": "beta",
            "alphas_cumprod": "abar",
            "alphas_cumprod_prev": "abar_prev",
            "posterior_variance": "variance",
            "posterior_log_variance_clipped": "log_variance",
            "posterior_mean_coef1": "mean_data",
            "posterior_mean_coef2": "mean_keep",
        }
        kept = tuple(int(i) for i in space_timesteps(1000, fx.config["spaced"]))
        fx.close(np.array(kept), fx.io["spaced_timestep_map"])
        for prefix, chain in (("", Chain(DDPM())), ("spaced_", Chain(DDPM(), kept))):
            for official, ours in names.items():
                fx.close(chain.tables[ours], f"{prefix}schedule_{official}")
            times = chain.times(np.arange(len(chain.indices)))
            fx.close(chain.process.alpha(times), f"{prefix}schedule_sqrt_alphas_cumprod")
            fx.close(chain.process.sigma(times), f"{prefix}schedule_sqrt_one_minus_alphas_cumprod")
        fx.close(DDPM("cosine").betas, "schedule_cosine_betas")

    def test_hybrid_loss_and_gradients(self, fx: Fixture) -> None:
        config, params = model(fx)

        def mean_loss(params: Any) -> Any:
            loss, terms = losses(fx, params, config)
            return loss.mean(), (loss, terms)

        gradients, (loss, terms) = jax.jit(jax.grad(mean_loss, has_aux=True))(params)
        fx.close(loss, "loss")
        fx.close(terms["mse"], "mse")
        fx.close(terms["vb"], "vb")
        official = dit.IMPORTER.save(config, gradients)
        for name in fx.io:
            if name.startswith("grad:"):
                fx.close(official[name.removeprefix("grad:")], name)

    def test_distributions(self, fx: Fixture) -> None:
        config, params = model(fx)
        chain, index = Chain(DDPM()), jnp.asarray(fx.io["t"])
        denoiser = Denoiser(config, chain.process, Predict("eps", clock="index", learned_variance=True))
        x, x_t, t = jnp.asarray(nhwc(fx.io["x_start"])), jnp.asarray(nhwc(fx.io["x_t"])), chain.times(index)
        np.testing.assert_array_equal(chain.steps(t), index)
        eps = jnp.asarray(nhwc(fx.io["noise"]))
        a, s = chain.process.alpha(t)[:, None, None, None], chain.process.sigma(t)[:, None, None, None]
        fx.close(nchw(a * x + s * eps), "x_t")
        prediction = denoiser(params, x_t, t, {"label": jnp.asarray(fx.io["y"])})
        raw = jnp.concatenate([prediction.value, prediction.extra["variance"]], axis=-1)
        fx.close(nchw(raw), "model_out")
        for suffix in ("", "_clipped"):
            if suffix:
                prediction = prediction.with_denoised(jnp.clip(prediction.denoised, -1.0, 1.0))
            mean, log_variance = chain.reverse(prediction, index, "learned")
            fx.close(nchw(prediction.denoised), f"p_pred_xstart{suffix}")
            fx.close(nchw(mean), f"p_mean{suffix}")
            fx.close(nchw(log_variance), f"p_log_variance{suffix}")
            fx.close(nchw(jnp.exp(log_variance)), f"p_variance{suffix}")
        mean, log_variance = chain.posterior(x, x_t, index)
        fx.close(nchw(mean), "q_posterior_mean")
        fx.close(nchw(log_variance), "q_posterior_log_variance_clipped")
        variance = jnp.broadcast_to(chain.gather("variance", index, x), x.shape)
        fx.close(nchw(variance), "q_posterior_variance")
        fx.close(chain.prior_bound(x), "prior_bpd")

    def test_variants(self, fx: Fixture) -> None:
        config, params = model(fx)
        plain = without_variance(params, config)
        kl = DDPMLoss("kl")
        fx.close(losses(fx, params, config, objective=kl)[0], "variant_rescaled_kl_loss")
        rows = {
            "variant_rescaled_learned_sigmas": {"objective": DDPMLoss(bound_weight=1000 / 1000)},
            "variant_predict_xstart": {"kind": "x"},
            "variant_cosine": {"schedule": "cosine"},
        }
        for name, options in rows.items():
            loss, terms = losses(fx, params, config, **options)
            fx.close(loss, f"{name}_loss")
            fx.close(terms["mse"], f"{name}_mse")
            fx.close(terms["vb"], f"{name}_vb")
        loss, terms = losses(fx, *plain, objective=DDPMLoss(variance="large"))
        fx.close(loss, "variant_fixed_large_loss")
        fx.close(terms["mse"], "variant_fixed_large_mse")
        variances: tuple[Variance, ...] = ("small", "large")
        for variance in variances:
            loss, _ = losses(fx, *plain, objective=DDPMLoss("kl", variance))
            fx.close(loss, f"variant_fixed_{variance}_kl_loss")

    def test_respaced(self, fx: Fixture) -> None:
        kept = fx.io["spaced_timestep_map"]
        objective = DDPMLoss(kept=tuple(int(i) for i in kept))
        config, params = model(fx)
        loss, terms = losses(fx, params, config, objective=objective, index=kept[fx.io["spaced_t"]])
        fx.close(loss, "spaced_loss")
        fx.close(terms["mse"], "spaced_mse")
        fx.close(terms["vb"], "spaced_vb")


class Sampling:
    """The pieces of a dit-ddpm-sampling fixture in our terms."""

    def __init__(self, fx: Fixture) -> None:
        self.fx = fx
        self.config, self.params = model(fx)
        self.process = DDPM()
        self.denoiser = Denoiser(
            self.config, self.process, Predict("eps", clock="index", learned_variance=self.config.learned_variance)
        )
        self.cond = {"label": jnp.asarray(fx.io["y"])}

    def grid(self, spec: str) -> Grid:
        steps = len(space_timesteps(self.process.steps, spec))
        return Respaced(spec)(self.process, steps)

    def denoise(self, clip: bool = False, condition: str = "") -> Any:
        """The bound denoiser, with clipping or the fixture's gradient function as guidance would add them."""

        def call(x: Any, t: Any, cond: Any, step: Any, carry: Any) -> Any:
            prediction = self.denoiser(self.params, x, t, cond)
            if clip:
                prediction = prediction.with_denoised(jnp.clip(prediction.denoised, -1.0, 1.0))
            gradient = -0.2 * x + 0.001 * self.process.index(t)
            if condition == "mean":
                extra = {**prediction.extra, "mean_gradient": gradient}
                prediction = dataclasses.replace(prediction, extra=extra)
            if condition == "score":
                prediction = prediction.with_value(prediction.eps - self.process.sigma(t) * gradient)
            return prediction, carry

        return call

    def run(self, solver: Any, spec: str, noise: str, denoise: Any, trajectory: bool = True) -> Any:
        draws = jnp.asarray(nhwc(self.fx.io[noise]))
        x = jnp.asarray(nhwc(self.fx.io["z"]))
        path = jax.jit(lambda x: states(solver, Problem(denoise, x, self.grid(spec), lambda i: draws[i], self.cond)).x)(
            x
        )
        return path if trajectory else path[-1]


@pytest.mark.parametrize("fx", fixtures("dit-ddpm-sampling*"), ids=str)
class TestSampling:
    def test_respacing(self, fx: Fixture) -> None:
        for name, expected in fx.io.items():
            if name.startswith("timesteps:"):
                fx.close(space_timesteps(1000, name.removeprefix("timesteps:")), expected)
        for spec, name in ((fx.config["ancestral_respacing"], ""), (fx.config["ddim_respacing"], "ddim_")):
            grid = Respaced(spec)(DDPM(), len(fx.io[f"{name}timestep_map"]))
            fx.close(np.round(DDPM().index(grid.times[:-1][::-1])).astype(int), f"{name}timestep_map")

    def test_ancestral(self, fx: Fixture) -> None:
        s = Sampling(fx)
        spec = fx.config["ancestral_respacing"]
        for suffix, clip in (("", False), ("_clip", True)):
            path = s.run(Ancestral("learned"), spec, "step_noise", s.denoise(clip))
            fx.close(nchw(path), f"ancestral_traj{suffix}")
            inputs = jnp.concatenate([jnp.asarray(nhwc(fx.io["z"]))[None], path[:-1]])
            denoised = [
                s.denoise(clip)(x, jnp.float32(t), s.cond, 0, {})[0].denoised
                for x, t in zip(inputs, s.grid(spec).times, strict=False)
            ]
            fx.close(nchw(jnp.stack(denoised)), f"ancestral_pred_xstart{suffix}")
        final = s.run(Ancestral("learned"), spec, "step_noise", s.denoise(condition="mean"), trajectory=False)
        fx.close(nchw(final), "ancestral_condfn_final")

    def test_ancestral_guided(self, fx: Fixture) -> None:
        s = Sampling(fx)
        guidance = ClassifierFree(float(fx.io["cfg_scale"]), channels=3)
        guided = guidance(s.denoise(), lambda c: s.denoiser.net.apply(s.params, c, method="null"))
        final = s.run(Ancestral("learned"), fx.config["ancestral_respacing"], "step_noise", guided, trajectory=False)
        fx.close(nchw(final), "ancestral_cfg_final")
        half = fx.io["ancestral_cfg_final_full_doubled"][: len(final)]
        fx.close(nchw(final), half, rtol=1e-3)

    def test_converted_weights_sample_alike(self, fx: Fixture, tmp_path: Path) -> None:
        """Official file -> gen convert -> gen.load -> the generator's own sampler: the official guided samples."""
        heads = str(fx.config["args"]["num_heads"])
        file, run = str(fx.path / "weights.safetensors"), str(tmp_path / "run")
        assert cli.main(["convert", file, "--out", run, "--network.heads", heads]) == 0
        loaded = gen.load(run)
        process, spec = loaded.denoiser.process, fx.config["ancestral_respacing"]
        sampler = dataclasses.replace(
            loaded.generator.sampler,
            grid=Respaced(spec),
            steps=len(space_timesteps(process.steps, spec)),
            guidance=ClassifierFree(float(fx.io["cfg_scale"]), channels=3),
        )
        params, draws = loaded.params["net"], jnp.asarray(nhwc(fx.io["step_noise"]))
        guided = sampler.guidance(
            loaded.denoiser.bind(params), lambda c: loaded.denoiser.net.apply(params, c, method="null")
        )
        z, cond = jnp.asarray(nhwc(fx.io["z"])), {"label": jnp.asarray(fx.io["y"])}
        final = integrate(sampler.solver, Problem(guided, z, sampler.times(process), lambda i: draws[i], cond))
        fx.close(nchw(final), "ancestral_cfg_final")
        assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
        back = read_weights(tmp_path / "back.safetensors")
        assert back.keys() == fx.weights.keys()
        assert all(np.array_equal(back[k], v) for k, v in fx.weights.items())

    def test_ddim(self, fx: Fixture) -> None:
        s = Sampling(fx)
        spec = fx.config["ddim_respacing"]
        for name in fx.io:
            if name.startswith("ddim_traj_eta_"):
                eta, _, clip = name.removeprefix("ddim_traj_eta_").partition("_")
                path = s.run(DDIM(float(eta)), spec, "ddim_step_noise", s.denoise(clip == "clip"))
                fx.close(nchw(path), name)
        final = s.run(DDIM(), spec, "ddim_step_noise", s.denoise(condition="score"), trajectory=False)
        fx.close(nchw(final), "ddim_condfn_final")

    def test_ddim_encoding(self, fx: Fixture) -> None:
        s = Sampling(fx)
        grid = s.grid(fx.config["ddim_respacing"])
        backwards = Grid(grid.times[:-1][::-1], grid.process)
        x = jnp.asarray(nhwc(fx.io["encode_start"]))
        path = states(DDIM(), Problem(s.denoise(), x, backwards, lambda i: jnp.zeros_like(x), s.cond)).x
        fx.close(nchw(path), "ddim_reverse_traj")

    def test_bits_per_dimension(self, fx: Fixture) -> None:
        s = Sampling(fx)
        kept = tuple(int(i) for i in fx.io["timestep_map"])
        noise = jnp.asarray(nhwc(fx.io["bpd_noise"]))
        result = jax.jit(
            lambda x: bits_per_dimension(
                lambda x, t, cond: s.denoiser(s.params, x, t, cond),
                Chain(s.process, kept),
                x,
                s.cond,
                lambda i: noise[i],
            )
        )(jnp.asarray(nhwc(fx.io["encode_start"])))
        fx.close(result["total"], "bpd_total_bpd")
        fx.close(result["prior"], "bpd_prior_bpd")
        fx.close(result["bound"], "bpd_vb")
        fx.close(result["x_mse"], "bpd_xstart_mse")
        fx.close(result["eps_mse"], "bpd_mse")
