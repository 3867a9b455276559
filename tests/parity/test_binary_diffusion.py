"""Binary latent diffusion against the official code: noise, networks, losses, sampling, in-painting."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.bernoulli import Bernoulli
from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler, denoise_bits
from gen.autoregressive.binary_transformer import BinaryTransformerConfig
from gen.pretrained.binary_diffusion import IMPORTER
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_quantizers import one
from tests.parity.test_sdvae import check_round_trip

SCHEDULES = {"linear": "linear", "cos": "cosine", "sigmoid": "sigmoid"}
every_fixture = pytest.mark.parametrize("fx", fixtures("binary-latent-diffusion*"), ids=str)


def model(fx: Fixture, which: str) -> tuple[BinaryDiffusion, Any]:
    given = fx.config
    weights = {k.removeprefix(f"{which}."): v for k, v in fx.weights.items() if k.startswith(f"{which}.")}
    text = fx.io["text"].shape[1:] if which == "text" else None
    options = {"heads": given["heads"], "levels": given["T"]} | ({"text_tokens": text[0]} if text else {})
    config = IMPORTER.infer(weights, **options)
    assert config.backbone == BinaryTransformerConfig(
        shape=(given["grid"], given["grid"], given["bits"]),
        width=given["D"],
        depth=given["L"],
        heads=given["heads"],
        num_classes=given["num_classes"] if which == "class" else 0,
        text=None if text is None else (text[0], given["text_dim"]),
    )
    _, params, report = IMPORTER.load(weights, config)
    assert len(report.matched) == len(weights)
    check_round_trip(IMPORTER, weights, config, params)
    return config, params


@every_fixture
def test_noise(fx: Fixture) -> None:
    x, t, levels = fx.io["x0"], fx.io["t"], fx.config["T"]
    for official, schedule in SCHEDULES.items():
        process = Bernoulli(schedule)
        for count in {int(n.split("_T")[1].split("_")[0]) for n in fx.io if n.startswith(f"schedule_{official}_T")}:
            times, name = np.arange(count + 1) / count, f"schedule_{official}_T{count}"
            keep = process.keep(times)
            fx.close(keep, f"{name}_keep")
            fx.close((1.0 - keep) / 2.0, f"{name}_offset")
            fx.close(keep / np.append(1.0, keep[:-1]), f"{name}_onestep_keep")
        chance = process.chance(x, t / levels)
        fx.close(chance, f"q_prob_{official}")
        share = (process.keep(t / levels) / process.keep((t - 1) / levels))[:, None, None]
        fx.close(share * x + (1.0 - share) / 2.0, f"one_step_{official}")
    fx.close((fx.io["noise_uniforms"] < Bernoulli().chance(x, t / levels)).astype(np.float32), "x_t_linear")


@every_fixture
def test_losses(fx: Fixture) -> None:
    config, params = model(fx, "uncond")
    t = jnp.asarray(fx.io["t"] / fx.config["T"], jnp.float32)
    draws = {"t": t, "uniforms": jnp.asarray(fx.io["noise_uniforms"]), "dropped": jnp.zeros(len(t), bool)}
    variants = {
        "flip_bce_mean": {"gamma": None},
        "flip_bce_weighted": {"gamma": None, "falling": True},
        "flip_focal0": {"gamma": 0.0},
        "flip_focal2": {"gamma": 2.0},
        "x0_bce_mean": {"gamma": None, "target": "bits"},
        "flip_bce_aux": {"gamma": None, "posterior": 0.1},
    }

    @jax.jit
    def forward(params: Any, x: jax.Array) -> Any:
        found = {"net_out": config.output(params, jnp.asarray(fx.io["x_t_linear"]), t, {})}
        for name, changes in variants.items():
            losses, terms = dataclasses.replace(config, **changes).loss(params, x, {}, draws)
            found |= {f"loss_{name}": losses, f"bce_{name}": terms["bce"], f"acc_{name}": terms["accuracy"]}
            found |= {f"auxloss_{name}": terms["posterior"]} if "posterior" in terms else {}
        return found

    for name, array in forward(params, jnp.asarray(fx.io["x0"])).items():
        fx.close(array if name == "net_out" else one(array.mean()), name)


@every_fixture
def test_networks(fx: Fixture) -> None:
    t, x_t = jnp.asarray(fx.io["t"] / fx.config["T"], jnp.float32), jnp.asarray(fx.io["x_t_linear"])
    text = jnp.asarray(fx.io["text"])
    conditions = {
        "class": {"label": jnp.asarray(fx.io["labels"])},
        "text": {"text": text, "text_mask": jnp.ones(text.shape[:2], bool)},
    }
    for which, cond in conditions.items():
        config, params = model(fx, which)
        call = jax.jit(lambda params, given, config=config: config.output(params, x_t, t, given))
        for given, name in ((cond, "net_out"), (config.null(params, cond), "net_out_null")):
            fx.close(call(params, given), f"{which}_{name}")


@every_fixture
def test_sampling(fx: Fixture) -> None:
    given, levels = fx.io, fx.config["T"]
    config, params = model(fx, "uncond")
    classes, class_params = model(fx, "class")
    guided = next(name for name in given if re.fullmatch(r"sample_class\d+_guided_z", name)).removesuffix("_z")
    label = {"label": jnp.full(fx.config["B"], int(re.findall(r"\d+", guided)[0]))}
    cosine = dataclasses.replace(config, process=Bernoulli("cosine"))
    known = (jnp.asarray(given["inpaint_mask"]), jnp.asarray(given["inpaint_latent"]))
    cases: dict[str, tuple[Any, Any, Any, int, dict[str, Any]]] = {
        "sample_flip_full": (config, params, {}, levels, {}),
        "sample_flip_temp_skip": (config, params, {}, len(given["skip3_steps"]), {"temperature": 0.7}),
        "sample_x0_full": (dataclasses.replace(config, target="bits"), params, {}, levels, {}),
        "sample_flip_cos_skip": (cosine, params, {}, len(given["skip4_steps"]), {}),
        "inpaint": (config, params, {}, levels, {"known": known}),
        guided: (classes, class_params, label, levels, {"guidance": 2.5, "temperature": 0.9}),
    }
    for name in (name for name in given if re.fullmatch(r"skip\d+_steps", name)):
        times = BinarySampler(steps=len(given[name])).times(config)
        fx.close(np.rint(times[::-1] * levels).astype(np.int32), name)
    for name, (found, weights, cond, steps, options) in cases.items():
        first = (jnp.asarray(given[f"{name}_init_uniforms"]) < 0.5).astype(jnp.float32)
        noise = jnp.pad(jnp.asarray(given[f"{name}_step_uniforms"]), ((0, 1), (0, 0), (0, 0), (0, 0)))
        times = BinarySampler(steps=steps).times(found)
        z = denoise_bits(found, weights, first, times, lambda i, noise=noise: noise[i], cond, **options)
        fx.close(z, f"{name}_z")
