"""Instella's 1D tokenizer against the official code: every part, both codings of positions, training, and its file."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.nn.network import Network
from gen.pretrained.instella import TOKENIZER_IMPORTER
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.tokenizers.instella import DecodedSize, InstellaConfig, positions, rotate
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.trunk import Tower
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc
from tests.parity.test_sdvae import check_round_trip

every_fixture = pytest.mark.parametrize("fx", fixtures("instella-tokenizer*"), ids=str)


def options(fx: Fixture, case: str) -> dict[str, Any]:
    """What shapes do not tell; the scale of the second case stands in the README."""
    scale = re.search(r"set_scale\((\d+)\)", (fx.path / "README.md").read_text())
    assert scale is not None
    return {
        "size": fx.config["image"][0],
        "span": None if case == "noscale" else int(scale[1]),
        "axes": tuple(fx.config["axes_dims_rope"]),
        "halve_after": tuple(fx.config["downsample_idx"]),
        "double_after": tuple(fx.config["upsample_idx"]),
        "aligned_after": fx.config.get("repa_index", 0) if fx.config.get("use_repa") else 0,
        "temperature": fx.config["train_temp"],
    }


def model(fx: Fixture, case: str) -> tuple[InstellaConfig, Any]:
    given, words = fx.config, options(fx, case)
    sizes = [given[f"{side}_head_dim"] * given[f"{side}_num_heads"] for side in ("encoder", "decoder")]
    expected = InstellaConfig(
        image=(words["size"], words["size"], given["in_channels"]),
        patch=given["patch_size"],
        tokens=given["num_latent_tkns"],
        encoder=Tower(sizes[0], given["encoder_layers"], given["encoder_num_heads"]),
        decoder=Tower(sizes[1], given["decoder_layers"], given["decoder_num_heads"]),
        halve_after=words["halve_after"],
        double_after=words["double_after"],
        axes=words["axes"],
        span=words["span"],
        quantizer=Binary(given["codebook_size"], temperature=given["train_temp"]),
        aligned_width=given["repa_dim"] if given.get("use_repa") else 0,
        aligned_after=words["aligned_after"],
    )
    assert TOKENIZER_IMPORTER.infer(fx.weights, **words) == expected
    _, params, report = TOKENIZER_IMPORTER.load(fx.weights, expected)
    assert len(report.matched) == len(fx.weights)
    height, width = given["image"]
    return dataclasses.replace(expected, image=(height, width, given["in_channels"]), scan=False), params


@pytest.mark.parametrize("case", ["noscale", "scaled"])
@every_fixture
def test_images_to_bits_and_back(fx: Fixture, case: str) -> None:
    config, params = model(fx, case)
    check_round_trip(TOKENIZER_IMPORTER, fx.weights, config, params)

    @jax.jit
    def forward(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        module = Network(config).module(params)
        found = config.encode(params, images)
        hidden, _ = module.decoder(module.embedded(found.codes), images.shape[1:3])
        return {
            "encoder_out": module.encoder(images),
            "logits": module.features(images),
            "code": found.ids,
            "decoder_hidden": hidden.reshape(len(images), -1, hidden.shape[-1]),
            "reconstruction": config.decode(params, found.codes),
        }

    for name, array in forward(params, nhwc(fx.io["image"])).items():
        fx.close(nchw(array) if array.ndim == 4 else array, f"{case}_{name}")
    height, width = (side // config.patch for side in config.image[:2])
    span = None if config.span is None else config.span / config.patch
    angles = positions(config.tokens, (height, width), config.axes, span)
    for array, name in zip(angles, ("cos", "sin"), strict=True):
        fx.close(array, f"{case}_rope_{name}")


@every_fixture
def test_training_and_parts(fx: Fixture) -> None:
    plain, params = model(fx, "noscale")
    scaled, _ = model(fx, "scaled")

    @jax.jit
    def forward(params: Any, io: Any) -> dict[str, jax.Array]:
        module = Network(plain).module(params)
        found = module.quantizer.quantize(module.features(io["image"]), io["train_uniforms"])
        drawn = found.sample(jax.random.key(0))
        out = {"train_reconstruction": module.decode(drawn)}
        if plain.aligned_width:
            image, out["train_repa_feature"] = module.decode_aligned(drawn)
            out["train_reconstruction"] = image
        grid = [side // plain.patch for side in plain.image[:2]]
        assert scaled.span is not None
        angles = positions(plain.tokens, grid, plain.axes, scaled.span / plain.patch)
        blocks = module.encoder.trunk.blocks
        first = jax.tree.map(lambda a: a[0], blocks)
        out["attn_out"] = first.attn(io["attn_in"], rotate=lambda x: rotate(x, *angles))
        out["block_out"] = first(io["attn_in"], lambda x: rotate(x, *angles))
        for name, trunk, after in (
            ("down", module.encoder.trunk, plain.halve_after),
            ("up", module.decoder.trunk, plain.double_after),
        ):
            if f"{name}_in" in io:
                y = trunk.resize[f"after{after[0]}"](io[f"{name}_in"])
                out[f"{name}_out"] = y.reshape(len(y), -1, y.shape[-1])
        return out

    io = {name: jnp.asarray(array) for name, array in fx.io.items()} | {"image": jnp.asarray(nhwc(fx.io["image"]))}
    for name, array in forward(params, io).items():
        fx.close(nchw(array) if array.ndim == 4 else array, name)


@every_fixture
def test_from_file_to_images(fx: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> bits and images, of other sizes too; and back into the file."""
    file, run = str(fx.path / "weights.safetensors"), str(tmp_path / "run")
    assert locate(None, fx.weights).importer is TOKENIZER_IMPORTER
    flags = [part for name, value in options(fx, "scaled").items() for part in (f"--network.{name}", json.dumps(value))]
    assert cli.main(["convert", file, "--out", run, *flags]) == 0
    loaded = gen.load(run)
    config, params = loaded.tokenizer, loaded.params["tokenizer"]
    images = np.random.default_rng(0).integers(0, 256, (2, *config.spec.image), np.uint8)
    bits = loaded.encode(images)
    assert (bits.dtype, bits.shape) == (np.uint8, (2, *config.spec.shape))
    decoded = config.decode(params, config.embed(params, jnp.asarray(bits)))
    expected = np.clip(np.asarray(decoded) * 127.5 + 127.5, 0, 255)
    assert np.abs(loaded.decode(bits).astype(np.float32) - expected).max() <= 1.01
    side = 2 * config.image[0]
    assert loaded.decode(bits, options=DecodedSize(side, side)).shape == (2, side, side, config.image[2])
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    assert all(np.array_equal(back[name], array) for name, array in fx.weights.items())
