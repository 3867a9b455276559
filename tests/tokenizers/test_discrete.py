"""Tokenizers of tokens and of bits: published sizes, both ways, caches, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.data.sources import ArraySource, Digits
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.runs import Loaded
from gen.tokenizers.binary import BinaryAutoencoderConfig
from gen.tokenizers.encode import encode_images
from gen.tokenizers.instella import DecodedSize, InstellaConfig
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.patch_vq import PatchVQConfig
from gen.tokenizers.quantizers.binary import Binary
from gen.tokenizers.quantizers.lfq import BSQ, LFQ
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import Tower
from gen.tokenizers.train import TokenizerTask
from gen.tokenizers.var_vqvae import SCALES, VARVQVAEConfig, var_vqvae
from gen.tokenizers.vqgan import VQGANConfig, vqgan
from gen.training.ema import Constant
from gen.training.optim import OptimConfig
from gen.training.part import with_buffers
from gen.training.run import RunConfig
from gen.training.task import Model
from tests.training.conformance import check_devices, check_task

IMAGE = (8, 8, 1)
TINY: dict[str, Any] = {
    "vqgan": VQGANConfig(IMAGE, VQ(16, 3, normalize=True), 8, (1, 2), (2, 1), 1, 4, groups=4),
    "lfq": VQGANConfig(IMAGE, LFQ(5), 8, (1, 2), blocks=1, inner=4, groups=4),
    "maskgit": MaskGITVQGANConfig(IMAGE, 8, (1, 2), 1, VQ(16, 4), groups=4),
    "patch": PatchVQConfig(IMAGE, 4, VQ(16, 16)),
    "var": VARVQVAEConfig(IMAGE, Residual(16, 3, (1, 2, 4)), 8, (1, 2), (), 1, 4, groups=4),
    "binary": BinaryAutoencoderConfig(IMAGE, Binary(6), 8, (1, 2), 1, 1, 8, (1,), groups=4),
    "instella": InstellaConfig(
        IMAGE, 2, 3, Tower(16, 2, 2), Tower(16, 2, 2), (0,), (0,), (2, 4, 2), 16, Binary(6), scan=False
    ),
}
COUNTS = {  # as published: LlamaGen's and VAR's code counted, Instella's 427.8 M, MaskGIT's towers 23.78 M and 30.48 M
    "vq-16": (vqgan("vq-16"), 71_883_403),
    "vq-8": (vqgan("vq-8"), 70_109_835),
    "maskgit": (MaskGITVQGANConfig(), 23_775_104 + 30_478_339 + 1024 * 256),
    "var": (var_vqvae(512), 108_948_355 + 10 * 4096),  # with the running hits
    "instella": (InstellaConfig(), 427_754_560),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    config, expected = COUNTS[name]
    assert count(param_shapes(config)) == expected


QUICK = ("binary", "patch")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY])
def test_what_a_cache_keeps_decodes(name: str, tmp_path: Path) -> None:
    """Images -> cache -> ids as a run gives them -> codes -> images; keys, which draw in training, change nothing."""
    config = TINY[name]
    params = jax.tree.map(np.asarray, jax.jit(Network(config).init)(jax.random.key(0)))
    images = np.random.default_rng(0).integers(0, 256, (5, *IMAGE), np.uint8)
    run = Loaded(tmp_path, RunConfig("t", models={"tokenizer": Model(config)}), {"tokenizer": params}, "raw", 0)
    ids = run.encode(images)
    bits = config.spec.kind == "bits"
    assert (ids.dtype, ids.shape) == (np.uint8 if bits else np.int32, (5, *config.spec.shape))
    assert len(np.unique(ids)) == 2 if bits else len(np.unique(ids)) > 2
    cache = encode_images(config, params, ArraySource(image=images), tmp_path / "c", batch=5, label="")
    np.testing.assert_array_equal(cache.source().gather(np.arange(5))["bits" if bits else "tokens"], ids)
    codes = config.embed(params, jnp.asarray(ids))
    assert codes.shape == (5, *codes.shape[1:-1], config.spec.width)
    if name != "var":  # coarse maps of a sum of maps are others
        np.testing.assert_array_equal(config.snap(params, codes).ids, ids)
    decoded = run.decode(ids)
    assert (decoded.dtype, decoded.shape) == (np.uint8, images.shape)
    assert len({image.tobytes() for image in decoded}) == 5


def build(name: str) -> tuple[Any, Any, Any]:
    """(task, data, frozen) in a fresh process. A large eps: Adam would blow up the rounding of gradients of zero."""
    quantizer = {"commitment": 0.25, "codebook": 1.0, "entropy": 0.1}
    task = TokenizerTask(TINY[name], optim=OptimConfig(1e-3, eps=1e-2), emas=(Constant(0.9),), quantizer=quantizer)
    return task, Digits(), {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["var", "binary", "lfq", "maskgit"])
def test_training(name: str, tmp_path: Path) -> None:
    """The engine's demands; and one device does as eight do, codebook statistics included."""
    check_task(*build(name), tmp_path / "one")
    if name in ("var", "binary"):
        check_devices(f"{__name__}:build({name})", tmp_path / "eight", steps=6)


@pytest.mark.slow
def test_bits_decode_at_another_size() -> None:
    config = TINY["instella"]
    params = Network(config).init(jax.random.key(0))
    codes = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 3, 6)).astype(jnp.float32)
    assert config.decode(params, codes, options=DecodedSize(16, 8)).shape == (2, 16, 8, 1)
    with pytest.raises(GenError, match="images of 14x8; this tokenizer takes sides that are multiples of 4"):
        config.decode(params, codes, options=DecodedSize(14, 8))


def test_bits_are_drawn_for_training_alone() -> None:
    z = jnp.broadcast_to(jnp.array([[-6.0, -1.0, 1.0, 6.0]]), (512, 1, 4))
    keys = jax.random.split(jax.random.key(0), 512)
    for activation, low in (("sigmoid", 0.0), ("tanh", -1.0)):
        config = Binary(4, activation, temperature=2.0)
        found = config.build(None)(z, keys)
        assert (np.asarray(found.ids) == [0, 0, 1, 1]).all()
        np.testing.assert_allclose(found.mode()[0, 0], [low, low, 1.0, 1.0], atol=1e-6)
        drawn = np.asarray(found.sample(keys))
        odds = jax.nn.sigmoid(z[0, 0] / 2) if activation == "sigmoid" else 0.5 + 0.5 * jnp.tanh(z[0, 0] / 2)
        np.testing.assert_allclose((drawn > 0.5).mean((0, 1)), odds, atol=0.06)
        np.testing.assert_array_equal(config.build(None)(z[3:5], keys[3:5]).sample(keys), drawn[3:5])
        without = config.build(None)(z)
        np.testing.assert_array_equal(without.sample(keys), without.codes)


@pytest.mark.slow
def test_entropies_fall_and_rise_with_the_use_of_bits() -> None:
    """Decided bits that all codes use are the best, one code for all is the worst; groups add up."""
    signs = 2.0 * jax.random.bernoulli(jax.random.key(0), 0.5, (64, 8, 4)) - 1.0
    for config in (LFQ(4), LFQ(4, group=2), BSQ(4, temperature=0.01), BSQ(4, temperature=0.01, group=4)):
        module = config.build(None)
        spread, same, weak = (module(z).losses["entropy"].mean() for z in (signs, jnp.ones_like(signs), 1e-4 * signs))
        assert spread == pytest.approx(-4 * np.log(2), abs=0.05)
        assert abs(same) < 1e-3
        assert weak > spread or config.unit  # a unit vector is never weak


@pytest.mark.slow
def test_hits_are_those_of_the_whole_batch() -> None:
    config = Residual(8, 2, (1, 2, 4), decay=0.5)
    params = Network(config).init(jax.random.key(0))
    params["embedding"] = jax.random.normal(jax.random.key(1), (8, 2))
    z = jax.random.normal(jax.random.key(2), (4, 4, 4, 2))
    net = Network(config)
    whole, halves = net(params, z).statistics["hits"], [net(params, z[i : i + 2]).statistics["hits"] for i in (0, 2)]
    np.testing.assert_allclose((halves[0] + halves[1]) / 2, whole, rtol=1e-6)
    np.testing.assert_allclose(whole.sum(axis=1), [0.5, 2.0, 8.0], rtol=1e-6)
    used = net.module({**params, "hits": whole}).used()
    np.testing.assert_allclose(used, (np.asarray(whole) >= 0.08 * np.asarray(whole).mean(1, keepdims=True)).mean(1))


@pytest.mark.slow
def test_scales_of_another_size_and_the_inputs_of_the_next_scale() -> None:
    assert (var_vqvae(512).spec.shape, var_vqvae().spec.scales) == ((2240,), SCALES[256])
    config, params = TINY["var"], {"quantizer": Network(TINY["var"].quantizer).init(jax.random.key(0))}
    ids = jax.random.randint(jax.random.key(1), (2, 21), 0, 16)
    assert config.inputs(params, ids).shape == (2, 20, 3)


def test_codes_of_patches_become_the_data() -> None:
    """Fresh codes are small; one update puts those that were hardly used on patches, which then come back exactly."""
    config = PatchVQConfig(IMAGE, 4, VQ(16, 16, averages=True, restart="random"))
    images = jax.random.uniform(jax.random.key(1), (4, *IMAGE), minval=-1.0)
    params = Network(config).init(jax.random.key(0))
    assert 0 < np.abs(config.embed(params, jnp.arange(16)[None])).max() <= 1 / 16
    found = config.encode(params, images, keys=jax.random.split(jax.random.key(2), 4))
    params = with_buffers(params, found.statistics)
    back = config.decode(params, config.encode(params, images).codes)
    wrong = np.abs(np.asarray(back - images)).reshape(4, 2, 4, 2, 4).max(axis=(2, 4))
    assert (wrong < 1e-5).sum() >= 15


def test_refusals() -> None:
    with pytest.raises(GenError, match="unknown VQ tokenizer 'vq-4'; did you mean 'vq-"):
        vqgan("vq-4")
    with pytest.raises(GenError, match="no scales are published for images of 384"):
        var_vqvae(384)
    with pytest.raises(GenError, match="maps of 16x16, and the last scale is 8"):
        VARVQVAEConfig(quantizer=Residual(scales=(1, 8)))
    with pytest.raises(GenError, match="the encoder has 5 levels and the decoder 2"):
        VQGANConfig(decoder_mult=(1, 2))
    with pytest.raises(GenError, match="an odd kernel"):
        VQGANConfig(quant_kernel=2)
    with pytest.raises(GenError, match="a binary autoencoder needs a quantizer of bits; got one of tokens"):
        BinaryAutoencoderConfig(quantizer=VQ(4, 4))
    with pytest.raises(GenError, match=r"scales .* are not the sides of growing maps"):
        Residual(scales=(4, 2))
    with pytest.raises(GenError, match="5 bits do not divide into groups of 2"):
        LFQ(5, group=2)
    with pytest.raises(GenError, match="expected at least one bit and a temperature above 0"):
        Binary(4, temperature=0.0)
    with pytest.raises(GenError, match="images of 520x512; this tokenizer takes sides that are multiples of 32"):
        InstellaConfig(image=(520, 512, 3))
    with pytest.raises(GenError, match="encoder heads of 768 / 12 channels are not turned by axes"):
        InstellaConfig(axes=(8, 8, 8))
    with pytest.raises(GenError, match="the decoder has blocks 0 to 15; \\(16,\\) are not some of them"):
        InstellaConfig(double_after=(16,))
    with pytest.raises(GenError, match="images of 8x8 do not divide into patches of 3"):
        PatchVQConfig(IMAGE, 3, VQ(16, 9))
    with pytest.raises(GenError, match="codes have width 4, and a patch 16 entries"):
        PatchVQConfig(IMAGE, 4, VQ(16, 4))
    patches = TINY["patch"]
    with pytest.raises(GenError, match=r"images are \(8, 4, 1\), and the tokenizer takes \(8, 8, 1\)"):
        jax.eval_shape(patches.encode, param_shapes(patches), jnp.zeros((1, 8, 4, 1)))
    small = TINY["binary"]
    with pytest.raises(GenError, match=r"images are \(1, 7, 8, 1\); this autoencoder takes"):
        jax.eval_shape(small.encode, param_shapes(small), jnp.zeros((1, 7, 8, 1)))
    with pytest.raises(GenError, match=r"latents are \(1, 4, 4, 2\); this autoencoder decodes"):
        jax.eval_shape(small.decode, param_shapes(small), jnp.zeros((1, 4, 4, 2)))
    with pytest.raises(GenError, match=r"ids are \(1, 20\); these scales have \(B, 21\)"):
        jax.eval_shape(TINY["var"].embed, param_shapes(TINY["var"]), jnp.zeros((1, 20), jnp.int32))
    with pytest.raises(GenError, match=r"features are \(1, 2, 2, 3\); these scales take \(B, 4, 4, 3\)"):
        jax.eval_shape(TINY["var"].snap, param_shapes(TINY["var"]), jnp.zeros((1, 2, 2, 3)))
    assert dataclasses.replace(small, quantizer=BSQ(6)).spec.shape == small.spec.shape
