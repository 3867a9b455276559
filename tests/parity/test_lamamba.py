"""LaMamba-Diff against the official code: block by block, the whole network with its gradients, guidance, names."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gen.config import from_json, to_json
from gen.diffusion.backbones.lamamba import Block, LaMambaConfig, relative_index, window_mask
from gen.diffusion.ddpm import DDPM
from gen.diffusion.denoiser import Denoiser, Predict
from gen.nn.mamba import merge_orders, scan_orders
from gen.nn.network import Network, param_shapes
from gen.pretrained import lamamba
from gen.pretrained.rules import load, save
from gen.pretrained.systems import locate
from gen.sampling.guidance import ClassifierFree
from tests.parity.conftest import Fixture, fixtures

# these programs run once: time goes into compiling them
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MERGING = {"v1": "neighbours", "v2": "conv2", "v3": "conv3"}


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), 1, -1)


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def arguments(fx: Fixture) -> dict[str, Any]:
    """The fixture's arguments over those that the official blocks and networks have by default."""
    defaults = {"window_size": 8, "continuous_scan": True, "ssm_d_state": 16, "ssm_ratio": 2.0, "ssm_conv": 3}
    defaults |= {"ssm_dt_rank": "auto", "ssm_conv_bias": True, "mlp_ratio": 4.0, "shift_size": 0}
    defaults |= {"in_chans": 4, "in_resolution": 32, "bottleneck_depth": 1, "num_heads": [8] * 4}
    return defaults | {"unconditional": True, "sd_unet_decoder_design": False, "downsample_version": "v2"} | fx.config


def order(args: dict[str, Any]) -> Any:
    return "snake" if args["continuous_scan"] else "raster"


@dataclasses.dataclass(frozen=True)
class Single:
    """One block as a network of its own."""

    options: LaMambaConfig
    side: int
    width: int
    heads: int
    condition: int
    projected: bool
    shift: int

    def build(self, rngs: nnx.Rngs) -> Block:
        return Block(
            self.options,
            (self.side, self.side),
            self.width,
            self.heads,
            condition=self.condition,
            projected=self.projected,
            shift=self.shift,
            rngs=rngs,
        )


def block(fx: Fixture) -> tuple[Single, Any, Any]:
    args = arguments(fx)
    projected = "condition_projection.weight" in fx.weights
    options = LaMambaConfig(
        window=args["window_size"],
        order=order(args),
        state=args["ssm_d_state"],
        expand=args["ssm_ratio"],
        rank=None if args["ssm_dt_rank"] == "auto" else args["ssm_dt_rank"],
        conv=args["ssm_conv"],
        conv_bias=args["ssm_conv_bias"],
        mlp_ratio=args["mlp_ratio"],
        size=(4 * args["window_size"],) * 2,
    )
    shape = (args["input_resolution"], args["hidden_dim"], args["num_heads"], args["condition_dim"])
    config = Single(options, *shape, projected, args["shift_size"])
    table = lamamba.block_rules("", "", projected=projected, conv_bias=options.conv_bias)
    buffers = lamamba.buffers("", (config.side,) * 2, options.window, config.shift)
    params, report = load([*table, *buffers], fx.weights, param_shapes(config))
    assert len(report.matched) == len(fx.weights)
    return config, params, table


@pytest.mark.parametrize("fx", fixtures("lamamba-block*"), ids=str)
def test_block(fx: Fixture) -> None:
    config, params, table = block(fx)
    net, (b, h, w, width) = Network(config), fx.io["x"].shape
    c, shifted = jnp.asarray(fx.io["c"]), config.shift > 0

    @compiled
    def parts(params: Any) -> Any:
        module = net.module(params)
        maps, _ = module.scan.project(jnp.asarray(fx.io["ssm_in"]))
        inputs = module.scan.scan_inputs(maps)
        attended = module.attn(jnp.asarray(fx.io["attn_in"]).reshape(b, h * w, width), shifted)
        ssm_out, attended = module.scan(jnp.asarray(fx.io["ssm_in"])), attended.reshape(b, h, w, width)
        m = jnp.split(module.modulation(c)[:, None, None], 9, axis=-1)
        x = jnp.asarray(fx.io["x"])
        stream = {"ssm_in": module.norm1(x) * (1.0 + m[1]) + m[0], "after_ssm": x + m[2] * ssm_out}
        stream["attn_in"] = module.norm2(stream["after_ssm"]) * (1.0 + m[4]) + m[3]
        stream["after_attn"] = stream["after_ssm"] + m[5] * attended
        return module.modulation(c), inputs, module.scan.scan(*inputs), ssm_out, attended, stream

    modulation, (u, delta, B, C), y, ssm_out, attended, stream = parts(params)
    for name, value in stream.items():
        fx.close(value, name)
    fx.close(modulation[:, None, None], "modulation")
    fx.close(u.swapaxes(1, 2), "scan_u")
    fx.close(delta.swapaxes(1, 2), "scan_delta_raw")
    fx.close(-np.exp(params["scan"]["A_log"]), "scan_A")
    fx.close(np.moveaxis(np.asarray(B), 1, -1), "scan_B")
    fx.close(np.moveaxis(np.asarray(C), 1, -1), "scan_C")
    fx.close(y.swapaxes(1, 2), "scan_y")
    fx.close(ssm_out, "ssm_out")
    fx.close(attended, "attn_out")

    @compiled
    def run(params: Any, x: jax.Array, c: jax.Array) -> Any:
        out, pull = jax.vjp(lambda p, x, c: net(p, x.reshape(b, -1, width), c, shifted).reshape(x.shape), params, x, c)
        return out, pull(jnp.asarray(fx.io["cot_out"]))

    out, (dparams, dx, dc) = run(params, jnp.asarray(fx.io["x"]), c)
    fx.close(out, "out")
    fx.close(dx, "grad_x")
    fx.close(dc, "grad_c")
    gradients = save(table, dparams)
    named = {name.removeprefix("grad__"): name for name in fx.io if name.startswith("grad__")}
    assert set(named) <= set(gradients)
    for official, name in named.items():
        fx.close(gradients[official], name)


@pytest.mark.parametrize("fx", fixtures("lamamba-block*"), ids=str)
def test_orders_and_buffers(fx: Fixture) -> None:
    sides = {int(name.split("_")[1]) for name in fx.io if name.startswith("path_")}
    for n in sides:
        pixels = jnp.arange(n * n).reshape(1, n, n, 1)
        scanned = scan_orders(pixels, "snake")
        for k in range(4):
            np.testing.assert_array_equal(scanned[0, :, k, 0], fx.io[f"path_{n}_{k}"])
        # the inverse: each direction alone is put back in place
        for k in range(4):
            alone = jnp.zeros_like(scanned).at[:, :, k].set(scanned[:, :, k])
            np.testing.assert_array_equal(merge_orders(alone, (n, n), "snake"), pixels)
            np.testing.assert_array_equal(np.argsort(scanned[0, :, k, 0]), fx.io[f"inverse_{n}_{k}"])
    args = arguments(fx)
    window, side, shift = args["window_size"], args["input_resolution"], args["shift_size"]
    window, shift = (window, shift) if side > window else (side, 0)
    np.testing.assert_array_equal(relative_index((window,) * 2), fx.weights["attn.relative_position_index"])
    if "mask" in fx.io:
        fx.close(window_mask((side,) * 2, (window,) * 2, (shift,) * 2), "mask")


def model(fx: Fixture) -> tuple[LaMambaConfig, Any]:
    """The fixture's network through the importer; the configuration is inferred from its weights."""
    args = arguments(fx)
    config = lamamba.config(fx.weights, order=order(args))
    rank, width = args["ssm_dt_rank"], np.ravel(args["dims"])[0]
    expected = {
        "patch": args["patch_size"],
        "channels": args["in_chans"],
        "num_classes": 0 if args["unconditional"] else args["num_classes"],
        "depths": tuple(args["depths"]),
        "middle": args["bottleneck_depth"],
        "width": width,
        "extra": args["sd_unet_decoder_design"],
        "size": (args["in_resolution"] * args["patch_size"],) * 2,
        "heads": tuple(args["num_heads"]),
        "window": min(args["window_size"], args["in_resolution"]),
        "state": args["ssm_d_state"],
        "conv": args["ssm_conv"],
        "conv_bias": args["ssm_conv_bias"],
        "merging": MERGING[args["downsample_version"]],
        "learned_variance": True,
    }
    assert {k: getattr(config, k) for k in expected} == expected
    for width in config.widths:
        assert int(config.expand * width) == int(args["ssm_ratio"] * width)
        assert int(config.mlp_ratio * width) == int(args["mlp_ratio"] * width)
        wanted = math.ceil(width / 16) if rank == "auto" else rank
        assert wanted == (math.ceil(width / 16) if config.rank is None else config.rank)
    _, params, report = lamamba.IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    return config, params


FORWARD = fixtures("lamamba-forward*")


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_weights_round_trip(fx: Fixture) -> None:
    config, params = model(fx)
    saved = lamamba.IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)
        assert saved[name].dtype == array.dtype, name
    assert locate(None, fx.weights).importer is lamamba.IMPORTER
    assert from_json(to_json(config), LaMambaConfig) == config


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_forward(fx: Fixture) -> None:
    config, params = model(fx)
    net, x, t = Network(dataclasses.replace(config, remat="none")), nhwc(fx.io["x"]), jnp.asarray(fx.io["t"])
    cond = {"label": jnp.asarray(fx.io["y"])}
    module = net.module(params)
    fx.close(module.time(t), "t_emb")
    fx.close(module.label(cond["label"]), "y_emb")
    fx.close(module.embed((t,), cond), "c")
    skips, ups = [f"down_{i}" for i in range(4)], [f"up_{i}" for i in range(4)]

    @compiled
    def run(params: Any, x: jax.Array) -> Any:
        def call(p: Any, x: jax.Array) -> Any:
            out, features = net(p, x, (t,), cond, taps=("tokens", *skips, "middle", *ups))
            return jnp.moveaxis(out, -1, 1), features

        out, pull, features = jax.vjp(call, params, x, has_aux=True)
        return out, features, pull(jnp.asarray(fx.io["cot_out"]))

    out, features, (dparams, dx) = run(params, x)
    names = {"tokens": "tokens", "middle": "mid_out", "down_3": "enc_out"}
    names |= {name: name for name in ups} | {f"down_{i}": f"skip_{i}" for i in range(4)}
    for ours, name in names.items():
        fx.close(features[ours].reshape(fx.io[name].shape), name)
    fx.close(features["down_3"].reshape(fx.io["enc_out"].shape), "enc_out")
    fx.close(out, "out")
    fx.close(nchw(dx), "loss_grad_x")
    gradients = lamamba.IMPORTER.save(config, dparams)
    for name in fx.io:
        if name.startswith("grad__"):
            fx.close(gradients[name.removeprefix("grad__")], name)

    stopped, features = compiled(lambda x: net(params, x, (t,), cond, taps=("down_1",), stop=True))(x)
    assert set(features) == {"down_1"}
    fx.close(stopped.reshape(fx.io["skip_1"].shape), "skip_1")


@pytest.mark.parametrize("fx", FORWARD, ids=str)
def test_guidance(fx: Fixture) -> None:
    """All channels are guided, the variance is the conditional's, here with the blocks one by one."""
    config, params = model(fx)
    config = dataclasses.replace(config, scan=False)
    denoiser = Denoiser(config, DDPM(), Predict("eps", clock="index", learned_variance=True))
    half = len(fx.io["cfg_x"]) // 2
    x, index, label = nhwc(fx.io["cfg_x"])[:half], fx.io["cfg_t"][:half], jnp.asarray(fx.io["cfg_y"][:half])
    t = jnp.asarray(denoiser.process.time(index), jnp.float32)
    guidance = ClassifierFree(float(fx.io["cfg_scale"]))

    def null(cond: Any) -> Any:  # an unconditional network has the null label only
        return denoiser.net.apply(params, cond, method="null") if config.num_classes else cond

    @compiled
    def run(params: Any, x: jax.Array) -> Any:
        guided = guidance(denoiser.bind(params), null)
        prediction, _ = guided(x, t, {"label": label}, jnp.int32(0), guidance.init(x))
        variance = [p.extra.values() for p in (prediction, denoiser(params, x, t, null({"label": label})))]
        return jnp.concatenate([jnp.concatenate([prediction.value, *v], axis=-1) for v in variance])

    np.testing.assert_array_equal(fx.io["cfg_y"][half:], config.num_classes)
    fx.close(nchw(run(params, jnp.asarray(x))), "cfg_out")
