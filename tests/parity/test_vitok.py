"""ViTok against its first author's release: tokens, rotation, posterior and reconstructions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.nn.layers import patchify
from gen.nn.network import Network
from gen.nn.rotary import rotate_pairs
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.tokenizers.trunk import Tower
from gen.tokenizers.vitok import ViTokConfig, rotation
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_sdvae import check_round_trip

FIXTURES = fixtures("vitok-autoencoder*")
ROTARY = {"1d_axial": "1d", "2d_axial": "2d"}
POSITIONS = {"nope": "none", "sincos1d": "1d", "sincos2d": "2d", "sincos3d": "3d"}


def options(fx: Fixture) -> dict[str, object]:
    """What shapes do not tell."""
    given = fx.config
    return {
        "size": given["img_size"],
        "frames": given["num_frames"],
        "heads": given["num_heads"],
        "rotary": ROTARY[given["rope_style"]],
        "theta": given["rope_theta"],
    }


def expected(fx: Fixture) -> ViTokConfig:
    """The configuration that config.json states."""
    given = fx.config
    assert (given["simple"], given["variational"], given["norm_layer"]) == (True, True, "layer")
    side, q = given["img_size"], given["tubelet_size"]
    video = q > 1 or given["num_frames"] > 1
    return ViTokConfig(
        image=(given["num_frames"], side, side, given["channels"]) if video else (side, side, given["channels"]),
        patch=given["patch_size"],
        frames=q,
        channels=given["code_width"],
        encoder=Tower(given["width"], given["encoder_depth"], given["num_heads"]),
        decoder=Tower(given["width"], given["decoder_depth"], given["num_heads"]),
        rotary=ROTARY[given["rope_style"]],
        positions=POSITIONS[given["posemb"]],
        theta=given["rope_theta"],
    )


def ours(video: np.ndarray, config: ViTokConfig) -> np.ndarray:
    """(B, C, T, H, W) -> (B, *config.image)."""
    return video.transpose(0, 2, 3, 4, 1).reshape(len(video), *config.image)


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_autoencoder(fx: Fixture) -> None:
    importer = locate(None, fx.weights).importer
    assert importer.name == "vitok"
    config = importer.infer(fx.weights, **options(fx))
    assert config == expected(fx)
    _, params, _ = importer.load(fx.weights, config)
    check_round_trip(importer, fx.weights, config, params)
    module, images = Network(config).module(params), ours(fx.io["image"], config)
    fx.close(np.asarray(config.grid if len(config.grid) == 3 else (1, *config.grid), np.int32), "grid_size")
    cos, sin = rotation(config, config.encoder)
    fx.close(cos[:, ::2], "rope_cos")
    fx.close(sin[:, ::2], "rope_sin")
    x = module.embed(patchify(jnp.asarray(images), config.sides))
    fx.close(x, "patch_embed")
    if config.positions != "none":
        x = x + fx.weights["posemb"]
    kept = module.encoder.run(x, lambda q: rotate_pairs(q, cos, sin), keep=(0,)).kept
    fx.close(kept[0], "act_enc_block0")
    posterior = jax.jit(config.encode)(params, images)
    flat = {"mean": posterior.mean, "logvar": jnp.clip(posterior.logvar, -30.0, 20.0)}
    flat["moments"] = jnp.concatenate([posterior.mean, posterior.logvar], -1)
    for name, array in flat.items():
        fx.close(array.reshape(fx.io[name].shape), name)
    fx.close(posterior.kl() / fx.io["mean"][0].size, "kl")  # the release takes the mean
    fx.close(
        posterior.mean + jnp.exp(0.5 * posterior.logvar) * fx.io["noise"].reshape(posterior.mean.shape),
        fx.io["z_sample"].reshape(posterior.mean.shape),
    )
    fx.close(module.from_code(fx.io["z_sample"]), "decoder_in")
    decode = jax.jit(config.decode)
    for latents, name in (("z_sample", "recon_from_sample"), ("mean", "recon_from_mean")):
        found = decode(params, fx.io[latents].reshape(posterior.mean.shape))
        fx.close(found, ours(fx.io[name], config))


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_from_file_to_images(fx: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> the tokenizer; and back into the file."""
    file, run = str(fx.path / "weights.safetensors"), str(tmp_path / "run")
    flags = [part for name, value in options(fx).items() for part in (f"--network.{name}", str(value))]
    assert cli.main(["convert", file, "--out", run, *flags]) == 0
    loaded = gen.load(run)
    params, images = loaded.params["tokenizer"], ours(fx.io["image"], loaded.tokenizer)
    latents = loaded.tokenizer.encode(params, images).mode()
    found = loaded.tokenizer.decode(params, latents)
    fx.close(found, ours(fx.io["recon_from_mean"], loaded.tokenizer))
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    assert all(np.allclose(back[k], v, atol=1e-6) for k, v in fx.weights.items())
