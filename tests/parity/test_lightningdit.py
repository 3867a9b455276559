"""LightningDiT against the official code: network, transport loss, latent cache, samplers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.diffusion.backbones.lightningdit import LightningDiTConfig
from gen.diffusion.backbones.sit import parameterization
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import Draws, VelocityMatching
from gen.diffusion.process import Linear
from gen.diffusion.times import TimeSampler
from gen.diffusion.train import DenoiserTask
from gen.nn.layers import patchify, sincos_positions
from gen.nn.network import Network
from gen.nn.rotary import axial_rotation
from gen.pretrained import lightningdit
from gen.pretrained.latent_shards import LatentShards
from gen.pretrained.systems import locate
from gen.sampling.grids import Grid, Uniform
from gen.sampling.guidance import ClassifierFree
from gen.sampling.integrate import Problem, nfe, states
from gen.sampling.runge_kutta import RungeKutta
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sit import SOLVERS


def model(fx: Fixture) -> tuple[LightningDiTConfig, dict[str, Any]]:
    """The fixture's network through the importer; the configuration is inferred from its weights."""
    args = fx.config["args"]
    heads, null_class = args.get("num_heads", 16), args.get("class_dropout_prob", 0.1) > 0
    config = lightningdit.config(fx.weights, heads=heads, null_class=null_class)
    expected = LightningDiTConfig(
        size=(args.get("input_size", 32),) * 2,
        channels=args.get("in_channels", 32),
        patch=args.get("patch_size", 2),
        width=args.get("hidden_size", 1152),
        depth=args.get("depth", 28),
        heads=heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=args.get("num_classes", 1000),
        null_class=null_class,
        learned_variance=args.get("learn_sigma", False),
        rmsnorm=args.get("use_rmsnorm", False),
        swiglu=args.get("use_swiglu", False),
        rope=args.get("use_rope", False),
        qk_norm=args.get("use_qknorm", False),
        shift=not args.get("wo_shift", False),
    )
    assert config == expected
    assert config.hidden == dataclasses.replace(config, mlp_ratio=args.get("mlp_ratio", 4.0)).hidden
    if config.swiglu and config.rope:
        assert locate(None, fx.weights).importer is lightningdit.IMPORTER
    if config.rope or config.qk_norm:
        assert lightningdit.config(fx.weights, null_class=null_class) == config
    _, params, report = lightningdit.IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    saved = lightningdit.IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        if name.startswith("feat_rope"):
            fx.close(saved[name], array)
        else:
            np.testing.assert_array_equal(saved[name], array, err_msg=name)
    return config, params


def denoiser(config: LightningDiTConfig) -> Denoiser:
    return Denoiser(config, Linear(), parameterization(config))


@pytest.mark.parametrize("fx", fixtures("lightningdit-forward*"), ids=str)
def test_forward(fx: Fixture) -> None:
    config, params = model(fx)
    net = Network(config)
    module = net.module(params)
    x, t, cond = jnp.asarray(nhwc(fx.io["x"])), jnp.asarray(fx.io["t"]), {"label": jnp.asarray(fx.io["y"])}
    fx.close(module.time(t), "t_emb")
    fx.close(module.label(cond["label"]), "y_emb")
    positions = sincos_positions(config.grid, config.width)
    fx.close(module.patch(patchify(x, config.patch)) + positions, "tokens")
    if config.rope:
        for ours, name in zip(axial_rotation(config.grid, config.head_dim), ("rope_cos", "rope_sin"), strict=True):
            fx.close(ours, name)

    taps = ("tokens", *(f"block_{i}" for i in range(config.depth)))
    out, features = jax.jit(lambda x, t: net(params, x, (t,), cond, taps=taps))(x, t)
    fx.close(features["tokens"], "tokens")
    for i in range(config.depth):
        fx.close(features[f"block_{i}"], f"after_block_{i}")
    fx.close(patchify(out, config.patch), "final_layer_out")
    fx.close(nchw(out[..., : config.channels]), "out")

    graphdef, stacked = nnx.split(module.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], stacked))
    attn_in = jnp.asarray(fx.io["block0_attn_in"])
    for part, name in zip(block.attn.project(attn_in, block.rotate), "qkv", strict=True):
        fx.close(jnp.swapaxes(part, 1, 2), f"block0_{name}")
    fx.close(block.attn(attn_in, rotate=block.rotate), "block0_attn_out")
    fx.close(block.mlp(attn_in), "block0_mlp_of_attn_in")


@pytest.mark.parametrize("fx", fixtures("lightningdit-transport-loss*"), ids=str)
def test_transport_loss(fx: Fixture) -> None:
    config, params = model(fx)
    transport = fx.config["transport"]
    assert (transport["path_type"], transport["prediction"]) == ("Linear", "velocity")
    objective = VelocityMatching(
        TimeSampler("logit-normal" if transport["use_lognorm"] else "uniform"),
        cosine=float(transport["use_cosine_loss"]),
    )
    task = DenoiserTask(denoiser=dataclasses.replace(denoiser(config), objective=objective), dropout=0.0)
    x, eps = jnp.asarray(nhwc(fx.io["x1"])), jnp.asarray(nhwc(fx.io["x0"]))
    draws, cond = Draws(1.0 - jnp.asarray(fx.io["t"]), eps), {"label": jnp.asarray(fx.io["y"])}
    prediction = task.denoiser(params, jnp.asarray(nhwc(fx.io["x_t"])), draws.t, cond)
    fx.close(nchw(-prediction.velocity), "pred")
    losses, terms = objective.loss(
        lambda x_t, t, c: task.denoiser(params, x_t, t, c), task.denoiser.process, x, cond, draws
    )
    fx.close(terms["velocity_mse"], "loss")
    if transport["use_cosine_loss"]:
        fx.close(terms["velocity_cosine"], "cos_loss")

    kept = jnp.zeros(len(x), bool)
    total, gradients = jax.jit(jax.value_and_grad(lambda p: task.loss(p, x, cond, draws, kept)[0]))(params)
    fx.close(total, "total")
    fx.close(losses.mean(), "total")
    official = lightningdit.IMPORTER.save(config, gradients)
    names = [name for name in fx.io if name.startswith("grad:")]
    assert names
    for name in names:
        fx.close(official[name.removeprefix("grad:")], name)


@pytest.mark.parametrize("fx", fixtures("lightningdit-transport-loss*"), ids=str)
def test_transport_path_and_times(fx: Fixture) -> None:
    """The official clock is one minus ours, so that the location of the logit-normal changes sign."""
    x, eps, t = fx.io["x1"], fx.io["x0"], jnp.asarray(fx.io["t"])
    process, normal = Linear(), -jnp.asarray(fx.io["normal_draws"])
    a, s = (np.asarray(f(1.0 - t))[:, None, None, None] for f in (process.alpha, process.sigma))
    fx.close(a * x + s * eps, "x_t")
    fx.close(x - eps, "u_t")
    if fx.config["transport"]["use_lognorm"]:
        fx.close(1.0 - TimeSampler("logit-normal").times(process, normal), "t")
    else:
        fx.close(fx.io["t"], "t_uniform")
    shifted = [name for name in fx.io if name.startswith("t_shifted_mu_")]
    for name in shifted:
        mean = -float(name.removeprefix("t_shifted_mu_"))
        fx.close(1.0 - TimeSampler("logit-normal", mean).times(process, normal), name)
    fx.close(1.0 - TimeSampler().times(process, 1.0 - jnp.asarray(fx.io["uniform_draws"])), "t_uniform")
    for partial in [name for name in fx.io if name.startswith("t_partial_")]:
        low, high = map(float, partial.removeprefix("t_partial_").split("_"))
        rows = -jnp.asarray(fx.io["partial_normal_rows"][: int(fx.io["partial_rows_used"])])
        times = 1.0 - TimeSampler("logit-normal").times(process, rows.reshape(-1))
        fx.close(times[(times >= low) & (times <= high)][: len(x)], partial)


@pytest.mark.parametrize("fx", fixtures("lightningdit-latent-cache*"), ids=str)
def test_latent_cache(fx: Fixture) -> None:
    args = fx.config["args"]
    shards = LatentShards(str(fx.path / "shards"), args["latent_norm"], args["latent_multiplier"])
    if "mean" in fx.io:
        mean, deviation = shards.statistics()
        fx.close(mean.reshape(1, -1, 1, 1), "mean")
        fx.close(deviation.reshape(1, -1, 1, 1), "std")
    source, normalizer = shards.source(), shards.normalizer()
    assert sorted(len(shard["labels"]) for shard in source.shards) == sorted(fx.config["sizes"])
    rows = source.gather(np.arange(len(source)))
    for name, item in (("latent", "plain"), ("latent_flip", "flip")):
        normalised = (rows[name] - normalizer["shift"]) / normalizer["scale"]
        fx.close(nchw(normalised), f"item_{item}")
        fx.close(rows["label"], f"label_{item}")
    fx.close(fx.io["item_plain"], nchw((rows["latent"] - normalizer["shift"]) / normalizer["scale"]))
    restored = nhwc(fx.io["item_plain"]) * normalizer["scale"] + normalizer["shift"]
    fx.close(nchw(restored), "restored_plain")


def grid(run: dict[str, Any]) -> Grid:
    shift = 1.0 / run["timestep_shift"] if run["timestep_shift"] else 1.0
    return Uniform(shift)(Linear(), run["num_sampling_steps"] - 1)


def guided(config: LightningDiTConfig, params: Any, run: dict[str, Any]) -> Any:
    guidance: Any = ClassifierFree()
    if run["guided"]:
        limited = lightningdit.guidance(run["cfg_scale"], run["cfg_interval_start"])
        guidance = limited if run["cfg_interval"] else limited.guidance
    net = denoiser(config)
    return guidance(net.bind(params), lambda c: net.net.apply(params, c, method="null"))


CASES = [
    (fx, key, run["method"] == "dopri5")
    for fx in fixtures("lightningdit-sampling*")
    for key, run in fx.config["runs"].items()
]
RUNS = [pytest.param(fx, key, id=f"{fx}-{key}") for fx, key, adaptive in CASES if not adaptive]
ADAPTIVE = [pytest.param(fx, key, id=f"{fx}-{key}") for fx, key, adaptive in CASES if adaptive]


@pytest.mark.parametrize(("fx", "key"), RUNS)
def test_sampling(fx: Fixture, key: str) -> None:
    config, params = model(fx)
    run = fx.config["runs"][key]
    z, cond, times = jnp.asarray(nhwc(fx.io["z"])), {"label": jnp.asarray(fx.io["y"])}, grid(run)
    fx.close(1.0 - times.times, f"{key}_t")
    denoise = guided(config, params, run)
    solver = SOLVERS[run["method"]]
    path = jax.jit(lambda x: states(solver, Problem(denoise, x, times, None, cond, {})).x)(z)
    fx.close(nchw(jnp.concatenate([z[None], path])), f"{key}_traj")
    assert nfe(solver, times) == run["network_calls"]


@pytest.mark.parametrize(("fx", "key"), ADAPTIVE)
def test_adaptive_runs(fx: Fixture, key: str) -> None:
    """The official adaptive steps depend on the whole batch: what they approximate, in many fixed steps."""
    config, params = model(fx)
    run, parts = fx.config["runs"][key], 48
    z, cond, coarse = jnp.asarray(nhwc(fx.io["z"])), {"label": jnp.asarray(fx.io["y"])}, grid(run)
    fx.close(1.0 - coarse.times, f"{key}_t")
    points = np.arange(coarse.steps * parts + 1) / parts
    fine = Grid(np.interp(points, np.arange(coarse.steps + 1), coarse.times), Linear())
    denoise = guided(config, params, run)
    path = jax.jit(lambda x: states(RungeKutta("rk4"), Problem(denoise, x, fine, None, cond, {})).x)(z)
    # as the fixture's description says: guidance that switches on is a jump in the drift
    rtol = 3e-2 if run["cfg_interval"] else 1e-2 if run["rtol"] > 1e-5 else 1e-4
    fx.close(nchw(jnp.concatenate([z[None], path[parts - 1 :: parts]])), f"{key}_traj", rtol=rtol, atol=0.0)


@pytest.mark.parametrize("fx", fixtures("lightningdit-sampling*"), ids=str)
def test_guidance_interval(fx: Fixture) -> None:
    config, params = model(fx)
    z, cond = jnp.asarray(nhwc(fx.io["z"])), {"label": jnp.asarray(fx.io["y"])}
    runs = [run for run in fx.config["runs"].values() if run["guided"] and run["cfg_interval"]]
    if not runs:
        pytest.skip("no run guides inside an interval")
    denoise = guided(config, params, runs[0])
    net = denoiser(config)
    null = net.net.apply(params, cond, method="null")
    for name in [name for name in fx.io if name.startswith("cfg_out_t_")]:
        t = jnp.float32(1.0) - jnp.float32(float(name.removeprefix("cfg_out_t_")))
        prediction, _ = denoise(z, t, cond, jnp.int32(0), {})
        fx.close(nchw(-prediction.velocity), fx.io[name][: len(z)])
    at = jnp.float32(1.0) - jnp.float32(runs[0]["cfg_interval_start"])
    fx.close(nchw(-net(params, z, at, cond).velocity), "cfg_probe_cond")
    fx.close(nchw(-net(params, z, at, null).velocity), "cfg_probe_uncond")
