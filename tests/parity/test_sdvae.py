"""The KL autoencoder under its three namings against the official code: encode, posterior, decode, and from a file."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.nn.network import Network
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import Importer
from gen.pretrained.sdvae import COMPVIS, DIFFUSERS, DIFFUSERS_OLD
from gen.pretrained.systems import locate
from gen.tokenizers.kl_vae import KLVAEConfig
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def groups(fx: Fixture) -> int:
    return int(fx.config.get("diffusers", {}).get("norm_num_groups", 32))


def model(fx: Fixture, importer: Importer, weights: dict[str, np.ndarray]) -> tuple[KLVAEConfig, dict[str, Any]]:
    """The fixture's network through the importer; the configuration is inferred from its weights."""
    given = fx.config["ddconfig"]
    config = importer.infer(weights, size=given["resolution"], groups=groups(fx))
    nominal = tuple(i for i in range(len(given["ch_mult"])) if given["resolution"] >> i in given["attn_resolutions"])
    expected = KLVAEConfig(
        image=(given["resolution"], given["resolution"], given["in_channels"]),
        width=given["ch"],
        mult=tuple(given["ch_mult"]),
        blocks=given["num_res_blocks"],
        channels=fx.config["embed_dim"],
        inner=given["z_channels"],
        attention=nominal,
        decoder_attention=nominal,
        middle_attention=fx.config.get("diffusers", {}).get("mid_block_add_attention", True),
        quant_conv=fx.config.get("diffusers", {}).get("use_quant_conv", True),
        groups=groups(fx),
    )
    assert config == expected
    _, params, report = importer.load(weights, config)
    assert len(report.matched) == len(weights)
    return config, params


def check_round_trip(importer: Importer, weights: dict[str, np.ndarray], config: Any, params: Any) -> None:
    saved = importer.save(config, params)
    assert saved.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)


@functools.cache
def namings(fx: Fixture) -> dict[str, dict[str, np.ndarray]]:
    """The fixture's weights under the three namings; its key map tells CompVis's."""
    rows = json.loads((fx.path / "key_map.json").read_text())
    assert {name for _, name, _ in rows} == set(fx.weights)
    compvis = {}
    for theirs, name, transform in rows:
        array = fx.weights[name]
        compvis[theirs] = array[:, :, None, None] if transform == "squeeze_1x1" and array.ndim == 2 else array
    new = (".to_q.", ".to_k.", ".to_v.", ".to_out.0.")
    old = (".query.", ".key.", ".value.", ".proj_attn.")

    def renamed(name: str) -> str:
        return functools.reduce(lambda n, pair: n.replace(*pair), zip(new, old, strict=True), name)

    return {"diffusers": fx.weights, "old": {renamed(k): v for k, v in fx.weights.items()}, "compvis": compvis}


@pytest.mark.parametrize(
    ("naming", "importer"), [("diffusers", DIFFUSERS), ("old", DIFFUSERS_OLD), ("compvis", COMPVIS)]
)
@pytest.mark.parametrize("fx", fixtures("sdvae-diffusers-autoencoder*"), ids=str)
def test_namings_give_the_same_network(fx: Fixture, naming: str, importer: Importer) -> None:
    weights = namings(fx)[naming]
    if naming != "old" or weights.keys() != fx.weights.keys():  # the two namings differ in the attentions only
        assert locate(None, weights).importer is importer
    config, params = model(fx, importer, weights)
    check_round_trip(importer, weights, config, params)
    _, expected = model(fx, DIFFUSERS, fx.weights)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("fx", fixtures("*vae-*autoencoder*"), ids=str)
def test_autoencoder(fx: Fixture, remat: Any) -> None:
    """Posterior and images of SD-VAE and VA-VAE files; whatever steps between the fixture holds."""
    importer = locate(None, fx.weights).importer
    config, params = model(fx, importer, fx.weights)
    config = dataclasses.replace(config, remat=remat)
    check_round_trip(importer, fx.weights, config, params)
    posterior = jax.jit(config.encode)(params, nhwc(fx.io["image"]))
    logvar = jnp.clip(posterior.logvar, -30.0, 20.0)
    decode = jax.jit(config.decode)
    found = {
        "moments": jnp.concatenate([posterior.mean, posterior.logvar], axis=-1),
        "mean": posterior.mode(),
        "logvar": logvar,
        "std": jnp.exp(0.5 * logvar),
        "recon_from_mean": decode(params, nhwc(fx.io["mean"])),
    }
    if "latent_scaled" in fx.io:
        found["latent_scaled"] = posterior.mode() * fx.config["diffusers"]["scaling_factor"]
    if "z_sample" in fx.io:
        found["recon_from_sample"] = decode(params, nhwc(fx.io["z_sample"]))
        fx.close(posterior.kl(), "kl")
        found |= between(config, params, fx.io)
    for name, array in found.items():
        if name in fx.io:
            fx.close(nchw(array), name)


def between(config: KLVAEConfig, params: Any, io: Any) -> dict[str, jax.Array]:
    """Activations inside both towers, by the fixture's names."""
    module = Network(config).module(params)
    encoder, decoder = module.encoder, module.decoder
    z = module.post_quant(jnp.asarray(nhwc(io["mean"])))
    found = {"post_quant_conv_of_mean": z}
    found["act_dec_mid_attn_1"] = decoder.mid.attn_1(decoder.mid.block_1(decoder.conv_in(z)))
    x = encoder.down["level0"](encoder.conv_in(jnp.asarray(nhwc(io["image"]))))
    found["act_enc_after_downsample0"] = x
    for i in range(1, len(config.mult)):
        x = encoder.down[f"level{i}"](x)
    found["act_enc_mid_block_1"] = encoder.mid.block_1(x)
    found["act_enc_mid_attn_1"] = encoder.mid.attn_1(found["act_enc_mid_block_1"])
    x = encoder.mid.block_2(found["act_enc_mid_attn_1"])
    found["act_enc_out"] = encoder.conv_out(jax.nn.silu(encoder.norm_out(x)))
    return found


@pytest.mark.parametrize("fx", fixtures("sdvae-diffusers-autoencoder*"), ids=str)
def test_from_file_to_images(fx: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> the tokenizer; and back into the file."""
    file, run = str(fx.path / "weights.safetensors"), str(tmp_path / "run")
    size = str(fx.config["ddconfig"]["resolution"])
    options = ["--network.size", size, "--network.groups", str(groups(fx))]
    assert cli.main(["convert", file, "--out", run, *options]) == 0
    loaded = gen.load(run)
    images = nhwc(fx.io["image"])
    assert loaded.tokenizer.spec.shape[2] == fx.io["mean"].shape[1]
    latents = loaded.tokenizer.encode(loaded.params["tokenizer"], images).mode()
    fx.close(nchw(latents), "mean")
    decoded = loaded.tokenizer.decode(loaded.params["tokenizer"], latents)
    fx.close(nchw(decoded), "recon_from_mean")
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    assert all(np.array_equal(back[k], v) for k, v in fx.weights.items())
