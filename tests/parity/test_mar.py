"""MAR against the official code: the diffusion head, its loss and its sampling; both towers; the whole generation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.arrays import flatten
from gen.autoregressive.infilling import KnownScale, draw_tokens, fullest, infill
from gen.autoregressive.latent_tokens import masked_first
from gen.autoregressive.mar import MARConfig
from gen.autoregressive.masked import entering
from gen.autoregressive.token_head import HeadConfig, token_denoiser, token_losses
from gen.diffusion.chain import Chain
from gen.diffusion.ddpm import DDPM
from gen.diffusion.objectives import Draws
from gen.nn.network import Network, param_shapes
from gen.pretrained.mar import IMPORTER, head_rules
from gen.pretrained.rules import load, save
from gen.pretrained.systems import locate
from gen.sampling.grids import Respaced
from gen.sampling.integrate import Problem, SolverState
from gen.sampling.solvers import Ancestral
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sdvae import check_round_trip


def head_of(fx: Fixture) -> tuple[HeadConfig, Any]:
    given = fx.config
    head = HeadConfig(given["channels"], given["z_channels"], given["width"], given["depth"])
    params, report = load(head_rules(head), fx.weights, param_shapes(head))
    assert len(report.matched) == len(fx.weights)
    return head, params


def gradients(rules: Any, gradient: Any) -> dict[str, np.ndarray]:
    """Our gradients under official names."""
    return save(rules, jax.device_get(gradient))


@pytest.mark.parametrize("fx", fixtures("mar-diffloss*"), ids=str)
def test_head_and_loss(fx: Fixture) -> None:
    head, params = head_of(fx)
    io, times = fx.io, fx.config["diffusion_batch_mul"]
    process = DDPM(fx.config["noise_schedule"])
    denoiser, rows = token_denoiser(head, process), fx.config["batch"]

    def per_token(array: Any) -> jax.Array:
        """List after list of all tokens -> (B, M, L, ...)."""
        return jnp.moveaxis(jnp.asarray(array).reshape(times, rows, fx.config["seq_len"], *np.shape(array)[1:]), 0, 1)

    def listed(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 1, 0).reshape(-1, *array.shape[3:])

    t = process.time(jnp.asarray(io["t"]).astype(jnp.float32))
    draws, mask, target = Draws(per_token(t), per_token(io["noise"])), io["mask"] > 0, jnp.asarray(io["target"])

    @jax.jit
    def whole(params: Any, z: jax.Array) -> Any:
        def loss(params: Any, z: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = token_losses(denoiser, params, z, target, draws)
            return MARConfig.masked_mean(losses, jnp.asarray(mask)).mean(), losses

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, z)

    (value, losses), (to_params, to_z) = whole(params, jnp.asarray(io["z"]))
    flat, z = jnp.tile(target.reshape(-1, target.shape[-1]), (times, 1)), jnp.asarray(io["z"])
    x_t = process.alpha(t)[:, None] * flat + process.sigma(t)[:, None] * io["noise"]
    fx.close(x_t, "x_t")
    cond = {"z": jnp.tile(z.reshape(-1, z.shape[-1]), (times, 1))}
    prediction = denoiser(params, jnp.asarray(io["x_t"]), t, cond)
    fx.close(jnp.concatenate([prediction.value, prediction.extra["variance"]], axis=-1), "net_out")
    mse = jnp.square(prediction.value - io["noise"]).mean(-1)
    fx.close(mse, "mse_per_token")
    whole_chain = Chain(process)
    fx.close(whole_chain.bound(prediction, flat, whole_chain.steps(t), "learned"), "vb_per_token")
    fx.close(listed(losses), "loss_per_token")
    fx.close(value, "loss")
    found = {f"grad.{name}": array for name, array in gradients(head_rules(head), to_params).items()}
    assert found.keys() == {name for name in io if name.startswith("grad.")}
    largest = max(np.abs(io[name]).max() for name in io if name.startswith("grad"))
    for name, array in {**found, "grad_z": to_z}.items():
        fx.close(array, name, rtol=0.0, atol=1e-3 * largest)


@pytest.mark.parametrize("fx", fixtures("mar-diffloss*"), ids=str)
def test_head_sampling(fx: Fixture) -> None:
    head, params = head_of(fx)
    io, steps = fx.io, int(fx.config["num_sampling_steps"])

    @functools.partial(jax.jit, static_argnums=1)
    def sample(arrays: Any, denoiser: Any, scale: float) -> jax.Array:
        params, z, null, start, noise = arrays
        return draw_tokens(
            denoiser, params, z, null, scale, start, lambda i: noise[i], Respaced()(denoiser.process, steps)
        )

    z = jnp.asarray(io["sample_z"])
    for name, run in fx.config["samplers"].items():
        process = DDPM(run["noise_schedule"])
        grid = Respaced()(process, steps)
        np.testing.assert_array_equal(np.round(process.index(grid.times[:-1]))[::-1], io["timestep_map"])
        guided = run["cfg"] != 1.0
        count = len(z) // 2 if guided else len(z)
        noise = run["temperature"] * jnp.asarray(io[f"{name}_step_noise"])[:, :count]
        arrays = (params, z[:count], z[count:] if guided else None, jnp.asarray(io[f"{name}_start"]), noise)
        found = sample(arrays, token_denoiser(head, process), run["cfg"])
        fx.close(found, io[f"{name}_sample"][:count], rtol=3e-5, atol=0.0)
    process = DDPM("cosine")
    grid, denoiser, solver = Respaced()(process, steps), token_denoiser(head, process), Ancestral("learned")
    columns = {k: jnp.asarray(v, jnp.float32) for k, v in solver.rows(grid).items()}
    for k in range(steps):
        noise = fx.config["single_step_temperature"] * jnp.asarray(io["single_step_noise"][k])
        x = jnp.asarray(io["single_step_in"][k])
        problem = Problem(denoiser.bind(params), x, grid, lambda i, n=noise: n, {"z": z})
        row = {name: column[k] for name, column in columns.items()} | {"i": jnp.int32(k)}
        fx.close(solver.step(problem, SolverState(x, ()), row).x, io["single_step_out"][k], atol=0.0)


def model_of(fx: Fixture) -> tuple[MARConfig, Any]:
    given = fx.config
    assert locate(None, fx.weights).importer is IMPORTER
    channels = fx.io["latent"].shape[1]
    config = IMPORTER.infer(fx.weights, heads=given["heads"], channels=channels)
    side = given["img_size"] // given["tokenizer_patch_size"]
    assert config.shape == (side, side, channels)
    expected = (given["patch_size"], given["seq_len"], given["width"], given["layers"], given["buffer_size"])
    assert (config.patch, config.length, config.width, config.depth, config.buffer) == expected
    expected = (given["num_classes"], given["diffloss_w"], given["diffloss_d"])
    assert (config.num_classes, config.head_width, config.head_depth) == expected
    _, params, report = IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    check_round_trip(IMPORTER, fx.weights, config, params)
    return config, params


@pytest.mark.parametrize("fx", fixtures("mar-forward*"), ids=str)
def test_towers(fx: Fixture) -> None:
    config, params = model_of(fx)
    io = fx.io
    tokens = config.sequence(jnp.asarray(nhwc(io["latent"])))
    fx.close(tokens, "tokens")
    np.testing.assert_array_equal(nchw(config.stored(tokens)), io["latent"])
    count = int(np.ceil(config.length * fx.config["mask_rate"]))
    mask = masked_first(jnp.asarray(io["orders"]), count)
    fx.close(mask, io["mask"] > 0)
    dropped = io["drop_uniform_draw"] < fx.config["label_drop_prob"]
    cond = {"label": jnp.where(dropped, config.num_classes, jnp.asarray(io["label"]))}
    room = config.length - count

    @jax.jit
    def found(params: Any) -> Any:
        def weighed(params: Any) -> tuple[jax.Array, jax.Array]:
            z = config.z(params, tokens, mask, cond, room)
            return (z * io["probe"]).sum(), z

        net = Network(config).module(params)
        gradient, z = jax.grad(weighed, has_aux=True)(params)
        # more room than is needed changes nothing
        return net.encode(tokens, mask, cond, room)[0], z, config.z(params, tokens, mask, cond), gradient

    encoded, z, roomy, gradient = found(params)
    fx.close(encoded, "encoder_out")
    fx.close(z, "z")
    fx.close(roomy, "z")
    head = set(flatten(params["head"]))
    assert all(not np.any(flatten(gradient["head"])[path]) for path in head)
    named = {name: a for name, a in gradients(IMPORTER.rules(config), gradient).items() if "diffloss" not in name}
    known = {name.removeprefix("grad."): array for name, array in io.items() if name.startswith("grad.")}
    largest = max(np.abs(array).max() for array in known.values())
    for name, array in known.items():
        fx.close(named[name], array, rtol=0.0, atol=1e-4 * largest)


@pytest.mark.parametrize("fx", fixtures("mar-forward*"), ids=str)
def test_generation(fx: Fixture) -> None:
    config, params = model_of(fx)
    config = dataclasses.replace(config, process=DDPM(fx.config["noise_schedule"]))
    io, given = fx.io, fx.config["generate"]
    steps, head_steps, orders = given["num_iter"], int(fx.config["num_sampling_steps"]), io["orders"]
    counts, most = np.append(entering("cosine", config.length, steps), 0), fullest(config, steps)
    batch, channels = len(orders), config.channels
    starts = np.zeros((steps, batch, most, channels), np.float32)
    noises = np.zeros((steps, head_steps, batch, most, channels), np.float32)
    places = []  # for each step the window of the order, and where a window's tokens stand in the fixture's lists
    for k in range(steps):
        now, left = counts[k], counts[k + 1]
        first = min(left, config.length - most)
        own = np.arange(left, now) - first
        positions = orders[:, left:now]
        rank = np.argsort(np.argsort(positions, axis=1), axis=1)
        rows = np.arange(batch)[:, None] * (now - left) + rank
        starts[k][:, own] = io[f"gen{k}_start"][rows]
        noises[k][:, :, own] = io[f"gen{k}_step_noise"][:, rows]
        places.append(np.sort(positions, axis=1))
    halves = 1 if given["cfg"] == 1.0 else 2  # without guidance there is no second half
    guidance = KnownScale(given["cfg"], constant=given["cfg_schedule"] == "constant")
    fx.close(np.float32(guidance.scales(config.length, counts[1:])), "gen_cfg_per_iteration")
    cond = {"label": jnp.asarray(io["label"])}
    grid = Respaced()(config.process, head_steps)

    @jax.jit
    def found(params: Any) -> tuple[jax.Array, jax.Array]:
        start, noise = jnp.asarray(starts), jnp.asarray(noises)
        path = infill(
            config,
            params,
            cond,
            jnp.asarray(orders),
            lambda k: (start[k], lambda i: noise[k][i]),
            steps=steps,
            grid=grid,
            temperature=given["temperature"],
            guidance=guidance,
        )
        before = jnp.concatenate([jnp.zeros_like(path[:1]), path[:-1]])
        null = jnp.full_like(cond["label"], config.num_classes)
        seen = {"label": jnp.concatenate([cond["label"], null][:halves])}
        z = [
            config.z(
                params,
                jnp.tile(tokens, (halves, 1, 1)),
                jnp.tile(masked_first(jnp.asarray(orders), m), (halves, 1)),
                seen,
            )
            for tokens, m in zip(before, counts[:-1], strict=True)
        ]
        return path[-1], jnp.stack(z)

    tokens, z = found(params)
    for k, rows in enumerate(places):
        known = np.concatenate([rows] * halves)[..., None]
        fx.close(np.take_along_axis(np.asarray(z[k]), known, axis=1).reshape(-1, config.width), f"gen{k}_z")
    fx.close(nchw(config.stored(tokens)), "gen_latent")
