"""l-DeTok against the authors' release: posterior, reconstructions, training with hidden patches, gradients."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.nn.network import Network
from gen.pretrained.detok import IMPORTER
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.tokenizers.detok import DenoisingDraws, DeTokConfig, LatentDenoising, rotation
from gen.tokenizers.trunk import Tower
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sdvae import check_round_trip

FIXTURES = fixtures("detok-autoencoder*")


@functools.cache
def model(fx: Fixture) -> tuple[DeTokConfig, dict[str, Any]]:
    assert locate(None, fx.weights).importer is IMPORTER
    given = fx.config
    config = IMPORTER.infer(fx.weights, heads=given["enc"]["heads"], decoder_heads=given["dec"]["heads"])
    encoder, decoder = (Tower(given[s]["width"], given[s]["layers"], given[s]["heads"]) for s in ("enc", "dec"))
    side = given["img_size"]
    assert config == DeTokConfig((side, side, 3), given["patch_size"], given["token_channels"], encoder, decoder)
    _, params, _ = IMPORTER.load(fx.weights, config)
    check_round_trip(IMPORTER, fx.weights, config, params)
    return config, params


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_autoencoder(fx: Fixture) -> None:
    config, params = model(fx)
    cos, sin = rotation(config.grid, config.encoder.width // config.encoder.heads)
    fx.close(np.concatenate([cos, sin], axis=1), "rope_table")
    posterior = jax.jit(config.encode)(params, nhwc(fx.io["image"]))
    moments = jnp.concatenate([posterior.mean, jnp.clip(posterior.logvar, -30.0, 20.0)], axis=-1)
    fx.close(moments.reshape(fx.io["eval_moments"].shape), "eval_moments")
    mean, std = fx.io["latent_mean"], fx.io["latent_std"]
    normalised = (posterior.mode() - mean) / std
    fx.close(nchw(normalised), "eval_latent")
    decoded = jax.jit(config.decode)(params, normalised * std + mean)
    fx.close(nchw(jnp.clip(0.5 * decoded + 0.5, 0.0, 1.0)), "eval_recon")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_training(fx: Fixture) -> None:
    """The release keeps the visible patches in a shuffled list; here they stay in place among hidden ones."""
    config, params = model(fx)
    given, io, images = fx.config, fx.io, nhwc(fx.io["image"])
    order = np.argsort(io["mask_order_draw"], axis=1)
    fx.close(np.argsort(order, axis=1).astype(np.int32), "ids_restore")
    tokens, rows = order.shape[1], np.arange(len(order))[:, None]
    kept = order[:, : int(np.ceil(tokens * (1.0 - given["mask_ratio"])))]
    assert kept.shape[1] == given["num_kept"]

    def placed(listed: np.ndarray) -> np.ndarray:
        """(B, kept, C) in the release's order -> (B, h, w, C) with zeros elsewhere."""
        whole = np.zeros((len(order), tokens, listed.shape[2]), listed.dtype)
        whole[rows, kept] = listed
        return whole.reshape(len(order), *config.grid, -1)

    visible = placed(np.ones((*kept.shape, 1), bool))[..., 0]
    level = io["noise_level_draw"][..., None]
    draws = DenoisingDraws(visible, placed(io["posterior_normal_draw"]), placed(io["noise_normal_draw"]), level)
    training = LatentDenoising(gamma=given["gamma"], additive=given["use_additive_noise"])

    def loss(params: Any) -> tuple[jax.Array, Any]:
        posterior, latents = training.encode(config, params, images, draws)
        decoded = training.decode(config, params, latents, draws)
        l2, kl = jnp.square(decoded - images).mean(), posterior.kl().mean()
        return l2 + given["kl_weight_in_fixture"] * kl, (decoded, posterior, latents, l2, kl)

    (_, (decoded, posterior, latents, l2, kl)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    def listed(whole: jax.Array) -> np.ndarray:
        return np.asarray(whole).reshape(len(order), tokens, -1)[rows, kept]

    logvar = jnp.clip(posterior.logvar, -30.0, 20.0)
    fx.close(np.concatenate([listed(posterior.mean), listed(logvar)], axis=-1), "train_moments")
    fx.close(listed(latents), "train_latent")
    fx.close(nchw(decoded), "train_recon")
    fx.close(l2, "l2")
    fx.close(kl, "kl")
    named = IMPORTER.save(config, gradient)
    names = [name for name in io if name.startswith("grad.")]
    scale = max(np.abs(io[name]).max() for name in names)
    for name in names:
        fx.close(named[name.removeprefix("grad.")], name, rtol=0.0, atol=1e-4 * scale)


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_from_file_to_images(fx: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> the tokenizer; and back into the file."""
    file, run = str(fx.path / "weights.safetensors"), str(tmp_path / "run")
    heads = (("heads", "enc"), ("decoder_heads", "dec"))
    flags = [part for name, side in heads for part in (f"--network.{name}", str(fx.config[side]["heads"]))]
    assert cli.main(["convert", file, "--out", run, *flags]) == 0
    loaded = gen.load(run)
    params = loaded.params["tokenizer"]
    latents = loaded.tokenizer.encode(params, nhwc(fx.io["image"])).mode()
    fx.close(nchw(jnp.clip(0.5 * loaded.tokenizer.decode(params, latents) + 0.5, 0.0, 1.0)), "eval_recon")
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    assert all(np.array_equal(back[k], v) for k, v in fx.weights.items())


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_draws(fx: Fixture) -> None:
    """Each sample draws from its own key: some patches, and the first always."""
    config, _ = model(fx)
    keys = jax.random.split(jax.random.key(0), 64)
    training = LatentDenoising()
    draws = jax.jit(lambda keys: training.draw(config, keys))(keys)
    shares = 1.0 - np.asarray(draws.visible).reshape(64, -1).mean(1)
    assert shares.min() == 0.0
    assert 0.5 < shares.max() <= 0.7
    alone = training.draw(config, keys[5:6])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[5:6], b), draws, alone)
    assert Network(config).buffers == frozenset()
