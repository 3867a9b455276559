"""RAEv2: the network with an early head, its loss, and guidance by the early head, against the official code."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.diffusion.clamped import Clamped, clamped_velocity
from gen.diffusion.denoiser import Denoiser
from gen.diffusion.objectives import Draws, noised
from gen.diffusion.prediction import EARLY
from gen.diffusion.times import TimeSampler
from gen.nn.network import Network
from gen.pretrained import rae_v2
from gen.pretrained.systems import locate
from gen.sampling.grids import Uniform
from gen.sampling.guidance import Chained, ClassifierFree, Interval
from gen.sampling.integrate import Problem, integrate
from gen.sampling.internal_guidance import Internal
from gen.sampling.solvers import Euler
from tests.parity.conftest import Fixture, fixtures
from tests.parity.toys import nchw, nhwc

cases = pytest.mark.parametrize("fx", fixtures("internal-guidance*"), ids=str)


@functools.cache
def loaded(fx: Fixture) -> tuple[Any, Any]:
    args = fx.config["args"]
    config = rae_v2.config(fx.weights, early=args["base_model_depth"])
    sizes = (value for name in ("hidden_size", "depth", "num_heads") for value in args[name])
    expected = ((args["input_size"],) * 2, args["in_channels"], *sizes)
    found = (config.size, config.channels, config.width, config.head_width, config.depth, config.head_depth)
    assert (*found, config.heads, config.head_heads) == expected
    assert config.num_classes == args["num_classes"]
    assert (config.time_tokens, config.class_tokens) == (fx.config["num_t_tokens"], fx.config["num_c_tokens"])
    for width in (config.width, config.head_width):
        assert int(2 / 3 * width * config.mlp_ratio) == int(2 / 3 * width * args["mlp_ratio"])
    _, params, report = rae_v2.IMPORTER.load(fx.weights, config)
    assert report.clean
    return config, params


def denoiser(fx: Fixture) -> Denoiser:
    given, config = fx.config, loaded(fx)[0]
    mean, std = (float(part) for part in given["time_dist_type"].split("_")[1:])
    times = TimeSampler("logit-normal", mean, std, shift=given["time_dist_shift"])
    made = rae_v2.denoiser(
        config, given["time_dist_shift"], least=given["t_eps"], weight=given["base_model_coeff"], times=times
    )
    if given["prediction"] == "velocity":
        made = Denoiser(config, made.process, Clamped("velocity", given["t_eps"]), made.objective)
    return made


@cases
def test_weights_round_trip(fx: Fixture) -> None:
    config, params = loaded(fx)
    assert locate(None, fx.weights).importer.name == "rae-v2"
    for name, array in rae_v2.IMPORTER.save(config, params).items():
        np.testing.assert_allclose(array, fx.weights[name], atol=1e-6, err_msg=name)


@cases
def test_loss(fx: Fixture) -> None:
    given, io, (config, params), model = fx.config, fx.io, loaded(fx), denoiser(fx)
    assert given["time_dist_shift"] == pytest.approx(np.sqrt(given["shift_dim"] / given["shift_base"]))
    t = model.objective.objective.times.times(model.process, jnp.asarray(io["t_normal_draw"]))
    fx.close(t, "t")
    x, eps = jnp.asarray(nhwc(io["data"])), jnp.asarray(nhwc(io["noise"]))
    draws = Draws(jnp.asarray(io["t"]), eps)
    x_t = noised(model.process, x, draws)
    fx.close(nchw(x_t), "x_t")
    dropped = io["drop_uniform_draw"] < given["cfg_dropout_prob"]
    null = model.net.apply(params, {"label": jnp.asarray(io["label"])}, method="null")["label"]
    label = np.where(dropped, null, io["label"])
    fx.close(label, "label_input")
    cond = {"label": jnp.asarray(label)}
    out, features = jax.jit(lambda p: Network(config)(p, x_t, (draws.t,), cond))(params)
    fx.close(nchw(out), "out_full")
    fx.close(nchw(features[EARLY]), "out_base")

    def total(p: Any) -> tuple[jax.Array, Any]:
        losses, terms = model.objective.loss(lambda a, b, c: model(p, a, b, c), model.process, x, cond, draws)
        return losses.mean(), (losses, terms)

    (loss, (losses, terms)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    fx.close(loss, "loss")
    fx.close(terms["early"].mean(), "loss_base")
    per_sample = io["loss_map"].reshape(len(x), -1).mean(1)
    np.testing.assert_allclose(losses, per_sample, rtol=1e-4)
    target = clamped_velocity(x_t, x, draws.t, given["t_eps"])
    prediction = model(params, x_t, draws.t, cond)
    pair = [jnp.square(p.velocity - target) for p in (prediction, prediction.extra[EARLY])]
    for row, expected in zip(nchw(pair[0] + given["base_model_coeff"] * pair[1]), io["loss_map"], strict=True):
        fx.close(row, expected)
    saved = rae_v2.IMPORTER.save(config, jax.device_get(grads))
    names = [name for name in io if name.startswith("grad.")]
    largest = max(np.abs(io[name]).max() for name in names)
    for name in names:
        fx.close(saved[name.removeprefix("grad.")], name, rtol=0.0, atol=1e-4 * float(largest))


def after(high: float) -> float:
    """The official comparison includes the end."""
    return float(np.nextafter(np.float32(high), np.float32(2.0)))


def guidance(case: dict[str, Any]) -> Any:
    parts = []
    if "ig_scale" in case:
        low, high = case.get("ig_interval", (0.0, 1.0))
        parts.append(Interval(Internal(case["ig_scale"], case.get("uncond_ig_scale")), low, after(high)))
    if "cfg_scale" in case:
        low, high = case.get("cfg_interval", (0.0, 1.0))
        parts.append(Interval(ClassifierFree(case["cfg_scale"]), low, after(high)))
    return Chained(tuple(parts))


@cases
def test_sampling(fx: Fixture) -> None:
    io, params, model = fx.io, loaded(fx)[1], denoiser(fx)
    grid = Uniform(shift=fx.config["time_dist_shift"])(model.process, fx.config["num_steps"])
    fx.close(grid.times.astype(np.float32), "grid")
    x, cond = jnp.asarray(nhwc(io["sample_noise"])), {"label": jnp.asarray(io["label"])}

    def sample(guidance: Any) -> jax.Array:
        guided = guidance(model.bind(params), lambda c: model.net.apply(params, c, method="null"))
        return integrate(Euler(), Problem(guided, x, grid, None, cond, guidance.init(x)))

    fx.close(nchw(sample(Chained(()))), "sample_plain")
    for name, case in fx.config["samplers"].items():
        fx.close(nchw(jax.jit(sample, static_argnums=0)(guidance(case))), f"sample_{name}")
