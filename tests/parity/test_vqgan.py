"""LlamaGen's VQ tokenizer and MaskGIT's VQGAN against the official code: activations, ids, losses, gradients, files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.nn.network import Network
from gen.pretrained import llamagen, maskgit
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.vqgan import VQGANConfig
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sdvae import check_round_trip


def llamagen_model(fx: Fixture) -> tuple[VQGANConfig, Any]:
    given, shape = fx.config["model"], fx.io["x"].shape
    expected = VQGANConfig(
        image=(256, 256, shape[1]),
        quantizer=VQ(
            given["codebook_size"], given["codebook_embed_dim"], normalize=given.get("codebook_l2_norm", True)
        ),
        width=fx.config["encoder_decoder"]["ch"],
        mult=tuple(given["encoder_ch_mult"]),
        decoder_mult=() if given["decoder_ch_mult"] == given["encoder_ch_mult"] else tuple(given["decoder_ch_mult"]),
        blocks=fx.config["encoder_decoder"]["num_res_blocks"],
        inner=given["z_channels"],
    )
    assert llamagen.VQ_IMPORTER.infer(fx.weights) == expected
    _, params, report = llamagen.VQ_IMPORTER.load(fx.weights, expected)
    assert len(report.matched) == len(fx.weights)
    return dataclasses.replace(expected, quantizer=dataclasses.replace(expected.quantizer, temperature=0.01)), params


@pytest.mark.parametrize("fx", fixtures("llamagen-vq*"), ids=str)
def test_llamagen(fx: Fixture) -> None:
    config, params = llamagen_model(fx)
    check_round_trip(llamagen.VQ_IMPORTER, fx.weights, config, params)
    given, probe = fx.config["model"], nhwc(fx.io["grad_probe_w"])
    net, quantizer = Network(config), Network(config.quantizer)

    @jax.jit
    def forward(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        module = net.module(params)
        found = config.encode(params, x)
        decoded = config.decode(params, config.embed(params, found.ids))
        out = {"encoder_out": module.encoder(x), "z": module.features(x), "indices": found.ids, "quant": found.codes}
        return out | {"recon": config.decode(params, found.codes), "recon_from_code": decoded}

    def loss(z: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        found = quantizer(params, z)
        losses = {name: value.mean() for name, value in found.losses.items()}
        terms = {
            "vq_loss": losses["codebook"],
            "commit_loss": given.get("commit_loss_beta", 0.25) * losses["commitment"],
            "entropy_loss": given["entropy_loss_ratio"] * losses["entropy"],
        }
        return (found.codes * probe).sum() + sum(terms.values()), terms

    for name, array in forward(params, nhwc(fx.io["x"])).items():
        fx.close(array if name == "indices" else nchw(array), name)
    z = jnp.asarray(nhwc(fx.io["z"]))
    (grad_z, grad_params), terms = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(z, params["quantizer"])
    for name, value in terms.items():
        fx.close(value, name)
    fx.close(nchw(grad_z), "grad_z")
    fx.close(grad_params["embedding"], "grad_codebook")


def maskgit_model(fx: Fixture) -> tuple[MaskGITVQGANConfig, Any]:
    given = fx.config
    expected = MaskGITVQGANConfig(
        image=(given["resolution"], given["resolution"], given["num_channels"]),
        width=given["hidden_channels"],
        mult=tuple(given["channel_mult"][: given["num_resolutions"]]),
        blocks=given["num_res_blocks"],
        quantizer=VQ(given["codes"], given["z_channels"]),
    )
    assert maskgit.IMPORTER.infer(fx.weights, size=given["resolution"]) == expected
    _, params, report = maskgit.IMPORTER.load(fx.weights, expected)
    assert len(report.matched) == len(fx.weights)
    return expected, params


@pytest.mark.parametrize("fx", fixtures("maskgit-vqgan*"), ids=str)
def test_maskgit(fx: Fixture) -> None:
    config, params = maskgit_model(fx)
    check_round_trip(maskgit.IMPORTER, fx.weights, config, params)

    @jax.jit
    def forward(params: Any, image: jax.Array) -> dict[str, jax.Array]:
        module, x = Network(config).module(params), 2.0 * image - 1.0
        found, hidden, encoder, decoder = config.encode(params, x), module.features(x), module.encoder, module.decoder
        mean = {name: value.mean() for name, value in found.losses.items()}
        distances = jnp.square(hidden[..., None, :] - module.quantizer.codes).sum(-1)
        last = len(config.mult) - 1
        return {
            "hidden": hidden,
            "indices": found.ids.reshape(len(image), -1),
            "z_quantized": found.codes,
            "quantizer_loss": mean["commitment"] + 0.25 * mean["codebook"],
            "reconstruction": 0.5 * config.decode(params, found.codes) + 0.5,
            "soft_code": jax.nn.softmax(-distances / 0.5).reshape(len(image), -1, config.quantizer.vocabulary),
            "enc_down0": encoder.level(encoder.conv_in(image), 0),
            "dec_first_up": decoder.level(decoder.mid(decoder.conv_in(found.codes)), last),
            "widening_block_out": widening(config, encoder)(jnp.asarray(nhwc(fx.io["widening_block_in"]))),
        }

    for name, array in forward(params, nhwc(fx.io["image"])).items():
        fx.close(nchw(array) if array.ndim == 4 else array, name)


def widening(config: MaskGITVQGANConfig, encoder: Any) -> Any:
    """The encoder's first block whose channel count changes."""
    before = (config.width, *config.widths)
    level = next(i for i, width in enumerate(config.widths) if before[i] != width)
    return encoder.down[f"level{level}"].res["block0"]


@pytest.mark.parametrize(("system", "model"), [("llamagen-vq", llamagen_model), ("maskgit-vqgan", maskgit_model)])
def test_from_file_to_images(system: str, model: Any, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> the tokenizer; and back into the file."""
    for fx in fixtures(f"{system}*"):
        folder, images = tmp_path / fx.name, fx.io["x" if system == "llamagen-vq" else "image"]
        config, params = model(fx)
        assert locate(None, fx.weights).importer.name == system
        size = str(images.shape[2] if images.shape[2] == images.shape[3] else 4 * config.factor)
        file, run = str(fx.path / "weights.safetensors"), str(folder / "run")
        assert cli.main(["convert", file, "--out", run, "--network.size", size]) == 0
        loaded = gen.load(run)
        assert loaded.tokenizer == dataclasses.replace(
            llamagen.VQ_IMPORTER.infer(fx.weights) if system == "llamagen-vq" else config,
            image=(int(size), int(size), images.shape[1]),
        )
        levels = np.random.default_rng(0).integers(0, 256, (2, *loaded.tokenizer.spec.image), np.uint8)
        ids = loaded.encode(levels)
        assert ids.shape == (2, *loaded.tokenizer.spec.shape)
        expected = config.decode(params, config.embed(params, jnp.asarray(ids)))
        expected = np.clip(np.asarray(expected) * 127.5 + 127.5, 0, 255)
        assert np.abs(loaded.decode(ids).astype(np.float32) - expected).max() <= 1.01
        assert cli.main(["convert", run, "--out", str(folder / "back.safetensors")]) == 0
        back = read_weights(folder / "back.safetensors")
        assert back.keys() == fx.weights.keys()
        assert all(np.array_equal(back[name], array) for name, array in fx.weights.items())
