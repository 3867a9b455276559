"""TiTok and TA-TiTok against the official code: both towers, the codebook with its restarts, and from a file."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gen
from gen import cli
from gen.nn.layers import patchify, unpatchify
from gen.nn.network import Network, param_shapes
from gen.pretrained.readers import read_weights
from gen.pretrained.systems import locate
from gen.pretrained.titok import IMPORTER
from gen.sampling.generate import quantise
from gen.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from gen.tokenizers.quantizers.vq import VQ
from gen.tokenizers.titok import TiTokConfig, Tower
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nhwc

NETWORKS = [fx for fx in fixtures("titok-vq*", "ta-titok-*") if (fx.path / "weights.safetensors").exists()]
COMMITMENT = 0.25  # the official default of commitment_cost

every_network = pytest.mark.parametrize("fx", NETWORKS, ids=str)


def given(fx: Fixture) -> dict[str, Any]:
    return fx.config["config"]["model"]["vq_model"]


def options(fx: Fixture) -> dict[str, Any]:
    """What shapes do not tell."""
    sizes, model = fx.config["sizes"], given(fx)
    heads = {f"{n}oder_heads": sizes[model[f"vit_{n}_model_size"]]["heads"] for n in ("enc", "dec")}
    return heads | {"normalize": model["use_l2_norm"]}


def expected(fx: Fixture) -> TiTokConfig:
    """The configuration that the fixture's own describes."""
    model, sizes = given(fx), fx.config["sizes"]
    side, kl = fx.config["config"]["dataset"]["preprocessing"]["crop_size"], model.get("quantize_mode", "vq") == "vae"
    encoder, decoder = (sizes[model[f"vit_{n}_model_size"]] for n in ("enc", "dec"))
    quantizer = (
        None
        if kl
        else VQ(
            model["codebook_size"],
            model["token_size"],
            normalize=model["use_l2_norm"],
            restart="closest" if model.get("clustering_vq", False) else "none",
        )
    )
    legacy = model.get("is_legacy", True)
    patch, painted = model["vit_enc_patch_size"], model["vit_dec_patch_size"]
    return TiTokConfig(
        image=(side, side, 3),
        patch=patch,
        tokens=model["num_latent_tokens"],
        channels=model["token_size"] if kl else None,
        encoder=Tower(encoder["width"], encoder["layers"], encoder["heads"]),
        decoder=Tower(decoder["width"], decoder["layers"], decoder["heads"]),
        quantizer=quantizer,
        decoder_patch=None if patch == painted else painted,
        pixels=pixel_tokenizer(fx.config["pixel"], side) if legacy else None,
        text=(model["text_context_length"], model["text_embed_dim"]) if "text_embed_dim" in model else None,
        init="normal",
    )


def pixel_tokenizer(sizes: dict[str, Any], side: int) -> MaskGITVQGANConfig:
    return MaskGITVQGANConfig(
        image=(side, side, 3),
        width=sizes["hidden"],
        mult=tuple(sizes["mult"]),
        blocks=sizes["nres"],
        quantizer=VQ(sizes["codes"], sizes["z"]),
    )


def official(tokens: jax.Array) -> jax.Array:
    """(B, K, C) -> the official (B, C, 1, K)."""
    return tokens.swapaxes(1, 2)[:, :, None]


def nchw(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, -3)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ours(tokens: np.ndarray) -> np.ndarray:
    return tokens[:, :, 0].swapaxes(1, 2)


@every_network
def test_names_and_configuration(fx: Fixture) -> None:
    assert locate(None, fx.weights).importer is IMPORTER
    config = IMPORTER.infer(fx.weights, **options(fx))
    assert config == expected(fx)
    _, params, report = IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    saved = IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)


@every_network
def test_forward(fx: Fixture) -> None:
    config, params, _ = IMPORTER.load(fx.weights, IMPORTER.infer(fx.weights, **options(fx)))
    found = jax.jit(lambda params: forward(config, params, fx.io))(params)
    assert found.keys() == fx.io.keys() - {"image", "text_guidance", "noise"}
    for name, array in found.items():
        fx.close(array, name)


def forward(config: TiTokConfig, params: Any, io: Any) -> dict[str, jax.Array]:
    """Every array of the fixture, by name."""
    net, images = Network(config).module(params), 2.0 * nhwc(io["image"]) - 1.0
    latents = net.latents(images)

    def pixels(codes: jax.Array, text: Any = None) -> jax.Array:
        cond = {} if text is None else {"text": jnp.asarray(text)}
        return nchw(0.5 * config.decode(params, codes, cond=cond) + 0.5)

    if config.quantizer is None:
        posterior, text = config.encode(params, images), io.get("text_guidance")
        logvar = jnp.clip(posterior.logvar, -30.0, 20.0)
        z = posterior.mean + jnp.exp(0.5 * logvar) * ours(io["noise"])
        per_token = 0.5 * (posterior.mean**2 + jnp.exp(logvar) - 1.0 - logvar).sum(-1)
        return {
            "moments": official(latents),
            "mean": official(posterior.mode()),
            "logvar": official(logvar),
            "kl": per_token,
            "kl_summed_over_tokens": posterior.kl(),
            "z_sample": official(z),
            "reconstruction_from_sample": pixels(z, text),
            "reconstruction_from_mean": pixels(posterior.mode(), text),
        } | ({} if text is None else {"reconstruction_zero_text": pixels(z, 0.0 * text)})
    quantized = config.encode(params, images)
    found = {
        "z": official(latents),
        "indices": quantized.ids[:, None],
        "z_quantized": official(quantized.codes),
        "reconstruction": pixels(quantized.codes),
    }
    commitment, codebook = (quantized.losses[name].mean() for name in ("commitment", "codebook"))
    found |= {
        "commitment_loss": COMMITMENT * commitment,
        "codebook_loss": codebook,
        "quantizer_loss": COMMITMENT * commitment + codebook,
    }
    between = painted if config.pixels is None else named
    return {name: array for name, array in found.items() if name in io} | between(net, images, quantized)


def painted(net: Any, images: jax.Array, quantized: Any) -> dict[str, jax.Array]:
    """Inside a decoder of pixels."""
    del images
    config = net.config
    return {
        "dec_ffn_pixels": nchw(unpatchify(net.head(net.painted(quantized.codes)), config.image[:2], config.painted))
    }


def named(net: Any, images: jax.Array, quantized: Any) -> dict[str, jax.Array]:
    """Inside both towers of the two-stage form."""
    config, encoder = net.config, net.encoder
    tokens = jnp.broadcast_to(net.latent_tokens[...], (len(images), *net.latent_tokens.shape))
    patches = net.patch_embed(patchify(0.5 * images + 0.5, config.patch))
    start = encoder.joined(patches, tokens)
    graphdef, blocks = nnx.split(encoder.blocks)
    first = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], blocks))
    logits = net.logits(quantized.codes)
    return {
        "enc_after_ln_pre": start,
        "enc_block0": first(start),
        "enc_after_ln_post": encoder.ln_post(encoder(patches, tokens)[:, -config.tokens :]),
        "codebook_entries_of_indices": net.quantizer.embed(quantized.ids).reshape(-1, config.width),
        "dec_after_ln_post": net.painted(quantized.codes),
        "decoder_logits": nchw(logits),
        "pixel_decoder_input": nchw(net.mixed(logits)),
    }


@pytest.mark.parametrize("form", ["plain", "l2"])
@pytest.mark.parametrize("fx", fixtures("titok-vq-losses*"), ids=str)
def test_codebook(fx: Fixture, form: str) -> None:
    """Codes, losses, and gradients of quantizer loss + mean(W z_quantized)."""
    sizes, io = fx.config, fx.io
    config = VQ(sizes["N"], sizes["C"], normalize=form == "l2")
    weights = ours(io["loss_weights_on_zq"])

    def loss(params: Any, z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = Network(config)(params, z)
        commitment = sizes["commitment_cost"] * found.losses["commitment"].mean()
        codebook = found.losses["codebook"].mean()
        total = commitment + codebook
        named = {"commitment_loss": commitment, "codebook_loss": codebook, "quantizer_loss": total}
        named |= {"z_quantized": official(found.codes), "indices": found.ids[:, None]}
        return total + (weights * found.codes).mean(), named

    params = {"embedding": jnp.asarray(io["codebook"])}
    (to_codebook, to_z), named = jax.grad(loss, (0, 1), has_aux=True)(params, jnp.asarray(ours(io["z"])))
    named |= {"grad_z": official(to_z), "grad_codebook": to_codebook["embedding"]}
    mixed = io[f"{form}_soft_weights"] @ io["codebook"]
    named |= {"soft_weights": io[f"{form}_soft_weights"], "soft_entry": unit(mixed) if form == "l2" else mixed}
    assert {f"{form}_{name}" for name in named} == {name for name in io if name.startswith(form)}
    for name, array in named.items():
        fx.close(array, f"{form}_{name}")


@pytest.mark.parametrize("fx", fixtures("titok-vq-losses*"), ids=str)
def test_restarts_of_the_closest(fx: Fixture) -> None:
    """Three training calls: each sees the codebook before its own update."""
    sizes, io = fx.config, fx.io
    config = VQ(sizes["N"], sizes["C"], restart="closest", decay=sizes["clustering_decay"])
    net, params = Network(config), Network(config).init(jax.random.key(0))
    params["embedding"] = jnp.asarray(io["codebook"])
    for i, z in enumerate(io["clustering_z"]):
        found = net(params, jnp.asarray(ours(z)))
        loss = sizes["commitment_cost"] * found.losses["commitment"].mean() + found.losses["codebook"].mean()
        params |= found.statistics
        named = {
            "z_quantized": official(found.codes),
            "indices": found.ids[:, None],
            "quantizer_loss": loss,
            "codebook_after": net.module(params).codes,
            "embed_prob_after": params["usage"],
        }
        for name, array in named.items():
            fx.close(array, io[f"clustering_{name}"][i], rtol=1e-5, atol=1e-6)


@every_network
def test_from_file_to_images(fx: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> the tokenizer; and back into the file."""
    run = str(tmp_path / "run")
    flags = [word for name, value in options(fx).items() for word in (f"--network.{name}", str(value))]
    assert cli.main(["convert", str(fx.path / "weights.safetensors"), "--out", run, *flags]) == 0
    loaded = gen.load(run)
    images = np.rint(255.0 * np.asarray(nhwc(fx.io["image"]))).astype(np.uint8)
    cond = {"text": fx.io["text_guidance"]} if "text_guidance" in fx.io else None
    made = loaded.decode(loaded.encode(images, cond=cond), cond=cond)
    name = "reconstruction" if cond is None else "reconstruction_from_mean"
    wanted = np.asarray(quantise(2.0 * nhwc(fx.io[name]) - 1.0), np.float32)
    # the input is rounded to 8 bits on the way in, and the images on the way out
    assert np.abs(made - wanted).mean() < 2.0
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    assert all(np.array_equal(back[k], v) for k, v in fx.weights.items())


def test_restarted_codes_are_exported_as_one_codebook() -> None:
    """The official file keeps the sum of what the optimiser and the restarts made of the codes."""
    config = TiTokConfig((8, 8, 1), 4, 2, None, Tower(16, 1, 2), Tower(16, 1, 2), VQ(4, 3, restart="closest"))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), param_shapes(config))
    params["quantizer"]["offset"] += 1.0
    saved = IMPORTER.save(config, params)
    np.testing.assert_array_equal(saved["quantize.embedding.weight"], np.full((4, 3), 2.0, np.float32))
    _, again, _ = IMPORTER.load(saved, config)
    np.testing.assert_array_equal(Network(config).module(again).quantizer.codes, saved["quantize.embedding.weight"])
    assert IMPORTER.infer(saved, encoder_heads=2, decoder_heads=2).quantizer == config.quantizer
