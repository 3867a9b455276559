"""Instella's diffusion and autoregressive models over bits against the official code."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler, denoise_bits
from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.instella import InstellaDiffusionConfig
from gen.autoregressive.instella_ar import InstellaARConfig
from gen.autoregressive.sampler import write
from gen.pretrained.instella import AR_IMPORTER, DIFFUSION_IMPORTER
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_sdvae import check_round_trip


def captions(fx: Fixture) -> dict[str, jax.Array]:
    """The captions, and the empty one of guidance's other half."""
    features = jnp.asarray(fx.io["llm_features"].transpose(1, 2, 0, 3))
    real = jnp.asarray(fx.io["text_mask"] > 0.5)
    half = len(real) // 2
    return {"text": features[:half], "text_mask": real[:half], "empty": features[half:], "empty_mask": real[half:]}


def sizes(fx: Fixture) -> dict[str, Any]:
    given = fx.config
    return {
        "shape": (given["num_img_tkns"], given["in_channels"]),
        "width": given["attention_head_dim"] * given["num_attention_heads"],
        "depth": given["num_layers"],
        "heads": given["num_attention_heads"],
        "text": (fx.io["llm_features"].shape[2], given["text_cond_dim"]),
    }


def number(fx: Fixture, pattern: str) -> float:
    """A setting that only the README states."""
    found = re.search(pattern, (fx.path / "README.md").read_text())
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("fx", fixtures("instella-diffusion*"), ids=str)
def test_diffusion(fx: Fixture) -> None:
    config = DIFFUSION_IMPORTER.infer(fx.weights, text_tokens=fx.io["llm_features"].shape[2])
    assert config == BinaryDiffusion(InstellaDiffusionConfig(**sizes(fx)), times="logit-normal")
    _, params, report = DIFFUSION_IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    check_round_trip(DIFFUSION_IMPORTER, fx.weights, config, params)
    io, cond = {name: jnp.asarray(array) for name, array in fx.io.items()}, captions(fx)
    fx.close((io["noise_uniforms"] < config.process.chance(io["x0"], io["t"])).astype(jnp.float32), "x_t")
    draws = {"t": io["t"], "uniforms": io["noise_uniforms"], "dropped": jnp.zeros(len(io["t"]), bool)}

    @jax.jit
    def forward(params: Any) -> Any:
        net = config.net.module(params)
        time = net.time(io["t"], cond)
        found = {
            "out": config.output(params, io["x_t"], io["t"], cond),
            "x0_logits_flip": config.logits(params, io["x_t"], {**cond, "time": io["t"]}),
            "temb": time,
            "block0_out": net.run(io["x_t"], time, cond, keep=(0,)).kept[0],
        }
        losses, terms = config.loss(params, io["x0"], cond, draws)
        found |= {"loss_flip": losses.mean()[None], "acc_flip_percent": 100.0 * terms["accuracy"].mean()[None]}
        direct, _ = dataclasses.replace(config, target="bits").loss(params, io["x0"], cond, draws)
        return {**found, "loss_x": direct.mean()[None]}

    for name, array in forward(params).items():
        fx.close(array, name)
    guidance, temperature = (number(fx, rf"{name} ([\d.]+)") for name in ("guidance_scale", "temperature"))
    cases = [match for match in (re.fullmatch(r"sample_(\d)_rho(\d+)_z", name) for name in io) if match]
    assert cases
    for case in cases:
        name, rule = case[0].removesuffix("_z"), {"1": "renoise", "2": "forward"}[case[1]]
        noise = jnp.pad(io[f"{name}_step_uniforms"], ((0, 1), (0, 0), (0, 0), (0, 0)))
        times = BinarySampler(steps=len(noise), power=float(case[2]) / 10.0).times(config)
        z = denoise_bits(
            config,
            params,
            (io[f"{name}_init_uniforms"] < 0.5).astype(jnp.float32),
            times,
            lambda i, noise=noise: noise[i],
            cond,
            rule=rule,
            guidance=1.0 + guidance,
            temperature=temperature,
        )
        fx.close(z, case[0])


@pytest.mark.parametrize("fx", fixtures("instella-ar*"), ids=str)
def test_autoregression(fx: Fixture) -> None:
    config = AR_IMPORTER.infer(fx.weights, text_tokens=fx.io["llm_features"].shape[2])
    assert config == InstellaARConfig(**sizes(fx))
    used = {name: array for name, array in fx.weights.items() if not name.startswith("time_embed")}
    _, params, report = AR_IMPORTER.load(fx.weights, config)
    assert (len(report.matched), len(report.ignored)) == (len(used), len(fx.weights) - len(used))
    check_round_trip(AR_IMPORTER, used, config, params)
    guidance, temperature = (number(fx, rf"{name} ([\d.]+)") for name in ("guidance_scale", "temperature"))

    @jax.jit
    def forward(params: Any, bits: jax.Array, cond: Any, uniforms: jax.Array) -> dict[str, jax.Array]:
        def pick(logits: jax.Array, at: Any) -> jax.Array:
            chance = jax.nn.sigmoid(logits / temperature)
            return (jax.lax.dynamic_slice_in_dim(uniforms, at, 1, axis=1) < chance).astype(jnp.int32)

        losses, _ = config.loss(params, bits.astype(jnp.int32), cond, {"dropped": jnp.zeros(len(bits), bool)})
        z = write(config, params, cond, len(bits), pick, ConstantScale(1.0 + guidance))
        return {
            "out_teacher_forced": config.logits(params, bits, cond),
            "loss": losses.mean()[None],
            "out_first": config.prefill(params, cond, len(bits))[1],
            "sample_z": z.astype(jnp.float32),
        }

    bits, uniforms = (jnp.asarray(fx.io[name]) for name in ("x0", "sample_uniforms"))
    for name, array in forward(params, bits, captions(fx), uniforms).items():
        fx.close(array, name)
