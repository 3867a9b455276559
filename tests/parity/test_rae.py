"""RAE against the authors' release: features, latents, the decoder step by step, training with noise, gradients."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import gen
from gen import cli
from gen.errors import GenError
from gen.features.alignment import seen
from gen.nn.network import Network
from gen.pretrained.rae import IMPORTER
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.tokenizers.rae import LatentNoise, NoiseDraws, RAEConfig
from gen.tokenizers.trunk import Tower
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sdvae import check_round_trip

FIXTURES = fixtures("rae-autoencoder*")


@functools.cache
def model(fx: Fixture) -> tuple[RAEConfig, dict[str, Any]]:
    assert locate(None, fx.weights).importer is IMPORTER
    given = fx.config
    config = IMPORTER.infer(fx.weights, heads=given["enc_heads"], decoder_heads=given["dec_heads"])
    encoder = config.encoder
    assert (config.image[0], config.patch, config.hidden) == (given["image_size"], given["dec_patch"], given["dec_mlp"])
    assert config.decoder == Tower(given["dec_hidden"], given["dec_layers"], given["dec_heads"])
    assert (encoder.size, encoder.patch, encoder.width) == (
        given["enc_table_image"],
        given["enc_patch"],
        given["enc_hidden"],
    )
    assert (encoder.depth, encoder.registers, encoder.affine) == (
        given["enc_layers"],
        given["num_registers"],
        not given["normalize"],
    )
    assert config.grid[0] * encoder.patch == given["encoder_input_size"]
    assert (encoder.eps, given["dec_ln_eps"]) == (given["enc_ln_eps"], 1e-12)
    _, params, _ = IMPORTER.load(fx.weights, config)
    check_round_trip(IMPORTER, fx.weights, config, params)
    return config, params


def pixels(image: np.ndarray) -> np.ndarray:
    """(B, C, H, W) in [0, 1] -> (B, H, W, C) in [-1, 1]."""
    return 2.0 * nhwc(image) - 1.0


def unit(images: jax.Array) -> jax.Array:
    """The inverse."""
    return nchw(0.5 * (images + 1.0))


def affine(fx: Fixture) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale of the latents, at each position and channel."""
    return tuple(
        array.transpose(1, 2, 0)
        for array in (fx.io["latent_mean"], np.sqrt(fx.io["latent_var"] + fx.config["eps"]).astype(np.float32))
    )


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_encoder(fx: Fixture) -> None:
    config, params = model(fx)
    images, (shift, scale) = pixels(fx.io["image"]), affine(fx)
    shown = seen(images, fx.config["encoder_input_size"])
    fx.close(nchw(shown), "encoder_input")
    encoder = Network(config.encoder).module(params["encoder"])
    fx.close(encoder.embed(shown), "encoder_embeddings")
    fx.close(encoder.final(encoder(shown)["prenorm"]), "encoder_tokens")
    encode = jax.jit(config.encode)
    latents = encode(params, images).mode()
    fx.close(nchw(latents), "eval_latent_unnormalised")
    fx.close(nchw((latents - shift) / scale), "eval_latent")
    # an image of the encoder's own size is shown as it is
    native = encoder(seen(pixels(fx.io["native_image"]), fx.config["encoder_input_size"]))["patches"]
    fx.close(nchw((native.reshape(latents.shape) - shift) / scale), "native_latent")
    draws = NoiseDraws(fx.io["noise_normal"].reshape(latents.shape), fx.io["noise_uniform"][..., None])
    noisy = LatentNoise(fx.config["noise_tau"]).latents(encode(params, images), draws)
    fx.close(nchw(noisy), "train_latent_unnormalised")
    fx.close(nchw((noisy - shift) / scale), "train_latent")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_decoder(fx: Fixture) -> None:
    config, params = model(fx)
    shift, scale = affine(fx)
    raw = nhwc(fx.io["eval_latent"]) * scale + shift
    decoder = Network(config).module(params).decoder
    x = decoder.tokens(raw)
    fx.close(x, "decoder_hidden_0")
    layers = config.decoder.depth
    kept = decoder.trunk.run(x, keep=tuple(range(layers))).kept
    for i in range(layers):
        fx.close(kept[i], f"decoder_hidden_{i + 1}")
    fx.close(decoder(raw), "decoder_logits")
    decode = jax.jit(config.decode)
    for latents, name in (("eval_latent", "recon_eval"), ("random_latent", "recon_random")):
        fx.close(unit(decode(params, nhwc(fx.io[latents]) * scale + shift)), name)


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_training(fx: Fixture) -> None:
    config, params = model(fx)
    images, target = pixels(fx.io["image"]), pixels(fx.io["target"])
    shape = (len(images), *config.spec.shape)
    draws = NoiseDraws(fx.io["noise_normal"].reshape(shape), fx.io["noise_uniform"][..., None])
    training = LatentNoise(fx.config["noise_tau"])

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        _, latents = training.encode(config, params, images, draws)
        decoded = training.decode(config, params, latents, draws)
        return 0.5 * jnp.abs(decoded - target).mean(), decoded

    (value, decoded), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    fx.close(unit(decoded), "train_recon")
    fx.close(value, "train_l1_loss")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["encoder"]))
    named = IMPORTER.save(config, gradient)
    names = [name for name in fx.io if name.startswith("grad.")]
    largest = max(np.abs(fx.io[name]).max() for name in names)
    for name in names:
        fx.close(named[name.removeprefix("grad.")], name, rtol=0.0, atol=1e-4 * largest)


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_from_files_to_images(fx: Fixture, tmp_path: Path) -> None:
    """A decoder's file and its encoder's -> gen convert -> gen.load -> the tokenizer; and back into one file."""
    prefix = "encoder.encoder."
    own = {name.removeprefix(prefix): array for name, array in fx.weights.items() if name.startswith(prefix)}
    rest = {name.removeprefix("decoder."): array for name, array in fx.weights.items() if not name.startswith(prefix)}
    encoder, decoder, run = tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors", str(tmp_path / "run")
    extra = {} if any(name.startswith("layernorm") for name in own) else {"layernorm.weight": np.ones(3, np.float32)}
    save_file(own | extra, encoder)
    save_file(rest, decoder)
    heads = (("heads", "enc_heads"), ("decoder_heads", "dec_heads"))
    flags = [part for name, key in heads for part in (f"--network.{name}", str(fx.config[key]))]
    assert cli.main(["convert", str(decoder), "--out", run, "--encoder", str(encoder), *flags]) == 0
    loaded = gen.load(run)
    params, (shift, scale) = loaded.params["tokenizer"], affine(fx)
    if fx.config["normalize"]:
        latents = loaded.tokenizer.encode(params, pixels(fx.io["image"])).mode()
        fx.close(nchw((latents - shift) / scale), "eval_latent")
    decoded = loaded.tokenizer.decode(params, nhwc(fx.io["eval_latent"]) * scale + shift)
    fx.close(unit(decoded), "recon_eval")
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    expected = {name for name in fx.weights if not name.startswith(f"{prefix}layernorm")}
    assert back.keys() == expected
    assert all(np.allclose(back[name], fx.weights[name], atol=1e-6) for name in expected)
    with pytest.raises(GenError, match="has a decoder alone; give the file of its encoder"):
        IMPORTER.infer(rest)
