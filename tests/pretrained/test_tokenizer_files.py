"""Files of convolutional tokenizers that no fixture holds: VAR's, and those of binary latent diffusion."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gen
from gen import arrays, cli
from gen.arrays import flatten, unflatten
from gen.data.caches import BitCache
from gen.data.sources import digits
from gen.errors import GenError
from gen.nn.network import param_shapes
from gen.pretrained import binary_latents, var
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.tokenizers.binary import BinaryAutoencoderConfig
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.var_vqvae import SCALES, VARVQVAEConfig

PYRAMID = VARVQVAEConfig((256, 256, 3), Residual(12, 3), 4, (1, 2, 2, 2, 2), blocks=1, inner=3, groups=2)
BITS = BinaryAutoencoderConfig((16, 16, 3), Binary(5, squashed_loss=True), 32, (1, 2), 2, 3, 32, (1,))


def official(importer: Any, config: Any) -> tuple[dict[str, np.ndarray], Any]:
    """A file's arrays and our parameters, of random numbers."""
    rng = np.random.default_rng(0)
    shapes = flatten(param_shapes(config))
    params = unflatten({path: 0.2 * rng.normal(size=s.shape).astype(np.float32) for path, s in shapes.items()})
    return importer.save(config, params), params


def test_var_has_q_k_and_v_in_one() -> None:
    weights, params = official(var.VQVAE_IMPORTER, PYRAMID)
    assert locate(None, weights).importer is var.VQVAE_IMPORTER
    assert weights["encoder.mid.attn_1.qkv.weight"].shape == (24, 8, 1, 1)
    mid = params["encoder"]["mid"]["attn_1"]
    for i, name in enumerate(("q", "k", "v")):
        rows = slice(8 * i, 8 * (i + 1))
        np.testing.assert_array_equal(
            weights["encoder.mid.attn_1.qkv.weight"][rows, :, 0, 0].T, mid[name]["kernel"][0, 0]
        )
        np.testing.assert_array_equal(weights["encoder.mid.attn_1.qkv.bias"][rows], mid[name]["bias"])
    assert weights["quantize.quant_resi.qresi_ls.3.weight"].shape == (3, 3, 3, 3)
    inferred, loaded, report = var.VQVAE_IMPORTER.load(weights, var.config(weights, groups=2))
    assert (inferred, len(report.matched)) == (PYRAMID, len(weights))
    assert all(np.array_equal(flatten(loaded)[path], value) for path, value in flatten(params).items())
    with pytest.raises(GenError, match="no scales are published for images of 128"):
        var.config(weights, size=128)
    larger = var.config(weights, size=512, groups=2)
    assert (larger.quantizer.scales, larger.spec.shape) == (SCALES[512], (2240,))


def with_unused(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The file as published: every block has a shortcut, and the decoder a head that no image passes."""
    blocks = [n.removesuffix(".conv1.weight") for n in weights if n.endswith(".conv1.weight")]
    extra = {f"{name}.conv_out.weight": np.zeros((1, 1, 1, 1), np.float32) for name in blocks}
    return {**extra, "generator.logsigma.0.weight": np.zeros((1, 1, 3, 3), np.float32), **weights}


@pytest.mark.parametrize("normed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_binary_latents_are_flat_lists(normed: bool) -> None:
    config = dataclasses.replace(BITS, normed=normed)
    weights, params = official(binary_latents.AUTOENCODER_IMPORTER, config)
    file = with_unused(weights)
    assert locate(None, file).importer is binary_latents.AUTOENCODER_IMPORTER
    assert weights["encoder.blocks.4.conv_out.weight"].shape == (64, 32, 1, 1)  # after two blocks and a halving
    inferred = binary_latents.config(file, size=16, mult=(1, 2), attention=(1,))
    assert inferred == config
    _, loaded, report = binary_latents.AUTOENCODER_IMPORTER.load(file, inferred)
    assert (len(report.matched), len(report.ignored)) == (len(weights), len(file) - len(weights))
    assert all(np.array_equal(flatten(loaded)[path], value) for path, value in flatten(params).items())


@pytest.mark.slow
@pytest.mark.parametrize("system", ["var-vqvae", "binary-autoencoder"])
def test_from_file_to_images(system: str, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> ids and images; and back into the file."""
    importer, config, flags = {
        "var-vqvae": (var.VQVAE_IMPORTER, PYRAMID, ["--network.groups", "2"]),
        "binary-autoencoder": (
            binary_latents.AUTOENCODER_IMPORTER,
            BITS,
            ["--network.size", "16", "--network.mult", "[1, 2]", "--network.attention", "[1]"],
        ),
    }[system]
    weights, _ = official(importer, config)
    arrays.write(tmp_path / "file.safetensors", weights)
    run = str(tmp_path / "run")
    assert cli.main(["convert", str(tmp_path / "file.safetensors"), "--out", run, *flags]) == 0
    loaded = gen.load(run)
    assert loaded.tokenizer == config
    images = np.random.default_rng(0).integers(0, 256, (2, *config.image), np.uint8)
    ids = loaded.encode(images)
    assert ids.shape == (2, *config.spec.shape)
    assert loaded.decode(ids).shape == images.shape
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], array) for name, array in weights.items())


@pytest.mark.slow
def test_gen_encode_keeps_bits(tmp_path: Path) -> None:
    """gen convert -> gen encode -> the cache as training reads it -> images."""
    config = dataclasses.replace(BITS, image=(8, 8, 1))
    weights, _ = official(binary_latents.AUTOENCODER_IMPORTER, config)
    arrays.write(tmp_path / "file.safetensors", weights)
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    flags = ["--network.size", "8", "--network.mult", "[1, 2]", "--network.attention", "[1]"]
    assert cli.main(["convert", str(tmp_path / "file.safetensors"), "--out", run, *flags]) == 0
    assert cli.main(["encode", run, "--data", "digits:test", "--out", cache]) == 0
    loaded, images = gen.load(run), digits("test").arrays["image"]
    bits = loaded.encode(images)
    (batch,) = itertools.islice(BitCache(cache).batches(batch=16, seed=0, start=0), 1)
    rows = BitCache(cache).source().gather(np.arange(len(images)))
    np.testing.assert_array_equal(rows["bits"], bits)
    np.testing.assert_array_equal(rows["label"], digits("test").arrays["label"])
    assert (batch["bits"].shape, batch["bits"].dtype) == ((16, *config.spec.shape), np.uint8)
    assert loaded.decode(rows["bits"][:4]).shape == (4, 8, 8, 1)
