"""FlexTok against the official code: encoder, decoder, sampling with guidance, embeddings, nested dropout, noise."""

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.scipy.special import ndtri
from safetensors.numpy import save_file

import gen
from gen import cli
from gen.diffusion.denoiser import Predict, drop
from gen.diffusion.objectives import Draws, noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import Linear
from gen.diffusion.times import TimeSampler
from gen.errors import GenError
from gen.nn.layers import TimeEmbedder, run_stack, sinusoid
from gen.nn.network import Network, param_shapes
from gen.pretrained.flextok import IMPORTER, decoder_rules, encoder_rules
from gen.pretrained.readers import read_weights
from gen.pretrained.rules import load, save
from gen.pretrained.sdvae import DIFFUSERS
from gen.pretrained.systems import locate
from gen.sampling.guidance import AdaptiveProjected, Arch, ClassifierFree
from gen.sampling.integrate import Problem, integrate
from gen.tokenizers.flextok import PREVIEW, FlexTokConfig, Pixels, euler_apg
from gen.tokenizers.flextok_decoder import nested_dropout
from gen.tokenizers.flextok_layers import GridPositions, sincos_table
from gen.tokenizers.flextok_train import KeepLaw
from gen.tokenizers.kl_vae import KLVAEConfig
from gen.tokenizers.quantizers.fsq import FSQ
from gen.tokenizers.trunk import Tower
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_dit import nchw, nhwc


def of(pattern: str) -> list[Fixture]:
    """FlexTok's fixtures of one name. The compact set has only the smaller ones of this system."""
    return [fx for fx in fixtures("flextok-[!a]*") if fnmatch.fnmatchcase(fx.name, pattern)]


def described(config: dict[str, Any]) -> FlexTokConfig:
    """The tokenizer that a fixture's config.json describes, over the latents themselves."""
    towers = [
        Tower(config[f"{side}_dim"], config[f"{side}_depth"], config[f"{side}_dim"] // config["head_dim"])
        for side in ("enc", "dec")
    ]
    return FlexTokConfig(
        first=Pixels((*config["latent_hw"], config["channels"])),
        patch=config["patch"],
        tokens=config["n_reg"],
        encoder=towers[0],
        decoder=towers[1],
        quantizer=FSQ(tuple(config["levels"])),
        positions={"learnable_sum": "sum", "learnable_prod": "product"}.get(config["patch_posemb"], "sincos"),
        length=max(config["pos_max"]),
        frequencies=config["freq_dim"],
        max_time=config["max_timestep"],
        remat="none",
    )


def model(fx: Fixture, part: str) -> tuple[FlexTokConfig, Any]:
    """The configuration, and the parameters of one part under its official names; saved again, they are the file."""
    config = described(fx.config)
    table = (encoder_rules if part == "encoder" else decoder_rules)(config)
    params, report = load(table, fx.weights, {part: param_shapes(config)[part]})
    assert len(report.matched) == len(fx.weights)
    saved = save(table, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)
    return config, params


@pytest.mark.parametrize("fx", of("flextok-encoder*"), ids=str)
def test_encoder(fx: Fixture) -> None:
    config, params = model(fx, "encoder")
    decoder = jax.tree.map(lambda a: jnp.zeros(a.shape), param_shapes(config)["decoder"])
    module = Network(config).module({**params, "decoder": decoder})
    latents, mask = jnp.asarray(nhwc(fx.io["vae_latents"])), module.encoder.mask()
    fx.close(mask.astype(np.int32), "attention_mask")
    start, call = module.encoder.start(latents), lambda block, x, _: (block(x, jnp.asarray(mask)), None)
    fx.close(run_stack(module.encoder.blocks, start, call, stop=1).x, "seq_after_block0")
    fx.close(module.encoder(latents), "z_pre_quant")
    found = jax.jit(config.encode)({**params, "decoder": decoder}, latents)
    fx.close(found.codes, "quant")
    fx.close(found.ids, "tokens")
    assert [config.spec.vocabulary] == list(fx.io["codebook_size"])


@pytest.mark.parametrize("fx", of("flextok-decoder-forward*"), ids=str)
def test_decoder(fx: Fixture) -> None:
    config, params = model(fx, "decoder")
    flow, own = config.flow, params["decoder"]
    module, io = flow.net.module(own), {name: jnp.asarray(array) for name, array in fx.io.items()}
    fx.close(config.quantizer.build(None).embed(io["tokens"]), "quant")
    _, (clock,) = flow.parameterization.inputs(flow.process, io["noised_latents"], io["t"])
    fx.close(sinusoid(clock, config.frequencies, 256.0), "timestep_frequencies_embedding")
    fx.close(module.time(clock), "time_embedding")
    fx.close(module.embed(io["quant"]), "registers_projected_posemb")
    every = flow.net.apply(own, io["quant"], jnp.full(len(io["t"]), config.tokens), method="condition")
    kept = flow.net.apply(own, io["quant"], io["keep_k"], method="condition")
    dropped = drop(flow.net, own, kept, io["drop_condition"] > 0)
    fx.close(kept["registers"], "registers_after_nested_dropout")
    fx.close(dropped["registers"], "registers_after_null_condition")
    tap, count = f"block_{fx.config['repa_layer']}", config.grid[0] * config.grid[1]

    @jax.jit
    def call(cond: Any) -> Prediction:
        return flow(own, jnp.asarray(nhwc(fx.io["noised_latents"])), io["t"], cond, taps=(tap,))

    for cond, name in ((every, "all_tokens"), (kept, "keep_k"), (dropped, "keep_k_null")):
        fx.close(nchw(call(cond).velocity), f"velocity_{name}")
    features = call(kept).extra[tap]
    fx.close(features[:, :count], "repa_layer_patches")
    fx.close(features[:, count:], "repa_layer_registers")


@pytest.mark.parametrize("fx", of("flextok-decode-sampling*"), ids=str)
def test_decoding(fx: Fixture) -> None:
    """Mixed numbers of tokens in one batch, from a given noise."""
    config, params = model(fx, "decoder")
    flow, own, keep = config.flow, params["decoder"], jnp.asarray(fx.io["keep_k"])
    padded = np.where(np.arange(config.tokens) < fx.io["keep_k"][:, None], fx.io["tokens"], 0)
    fx.close(padded, "padded_tokens")
    codes = config.quantizer.build(None).embed(jnp.asarray(padded))
    fx.close(codes, "quant_padded")
    cond, x = flow.net.apply(own, codes, keep, method="condition"), jnp.asarray(nhwc(fx.io["initial_noise"]))

    def sampled(guidance: Any, steps: int) -> np.ndarray:
        sampler = dataclasses.replace(euler_apg(steps=steps), guidance=guidance)
        grid, guided = sampler.times(flow.process), sampler.guided(flow, own)

        def run(x: jax.Array) -> jax.Array:
            return integrate(sampler.solver, Problem(guided, x, grid, lambda i: x, cond, guidance.init(x)))

        return nchw(jax.jit(run)(x))

    plain, scale, steps = ClassifierFree(fx.config["cfg_scale"]), fx.config["apg_scale"], fx.config["steps"]
    apg = euler_apg(scale).guidance
    fx.close(sampled(ClassifierFree(), steps), "latents_no_guidance")
    fx.close(sampled(ClassifierFree(), 1), "latents_one_step_no_guidance")
    fx.close(sampled(plain, steps), "latents_cfg")
    fx.close(sampled(apg, steps), "latents_apg")
    fx.close(sampled(apg, 1), "latents_one_step_apg")
    fx.close(sampled(dataclasses.replace(apg, scale=Arch(scale)), steps), "latents_apg_scheduled")

    c, u = (nhwc(fx.io[f"guidance_pred_{name}"]) for name in ("cond", "uncond"))

    def guided(guidance: Any, calls: list[np.ndarray]) -> list[np.ndarray]:
        """What guidance makes of given conditional predictions, call after call."""
        carry, out = guidance.init(jnp.asarray(c)), []
        for given in calls:

            def denoise(x: Any, t: Any, cond: Any, step: Any, carry: Any, given: Any = given) -> Any:
                return Prediction(jnp.concatenate([given, u]), x, t, {}, Linear(), "velocity"), carry

            call = guidance(denoise, lambda cond: cond)
            found, carry = call(jnp.asarray(c), jnp.float32(0.5), {"registers": jnp.zeros(len(c))}, 0, carry)
            out.append(nchw(found.velocity))
        return out

    fx.close(guided(plain, [c])[0], "guidance_cfg")
    first, second = guided(apg, [c, np.float32(0.7) * c])
    fx.close(first, "guidance_apg_call1")
    fx.close(second, "guidance_apg_call2")
    free = AdaptiveProjected(scale, eta=0.3, space="velocity")
    fx.close(guided(free, [c])[0], "guidance_apg_eta03_nothreshold")


@pytest.mark.parametrize("fx", of("flextok-embeddings*"), ids=str)
def test_embeddings(fx: Fixture) -> None:
    """All but pooled registers, which no published model has."""
    h, w = fx.config["hw"]
    assert list(fx.io["sizes_hw"]) == [h, w]
    for name in ("sincos_table", "sincos_square_table"):
        *_, rows, columns = fx.io[name].shape
        fx.close(sincos_table((rows, columns), fx.config["dim"]).transpose(2, 0, 1)[None], name)
    for kind in ("sum", "product"):
        name = {"sum": "learnable_sum", "product": "learnable_prod"}[kind]
        axes = fx.weights[f"{name}.posembs"][:, 0].transpose(0, 2, 1)
        positions = GridPositions(kind, fx.config["dim"], axes.shape[1], (h, w), nnx.Rngs(0))
        positions.axes[...] = jnp.asarray(axes)
        for stretch, how in ((False, "absolute_crop"), (True, "interpolated")):
            found = positions((h, w), stretch=stretch).reshape(h, w, -1)
            fx.close(found.transpose(2, 0, 1)[None], f"{name}_{how}")
    places = fx.weights["learnable_1d.posembs"][0, 0]
    fx.close(places[None, :, : fx.io["learnable_1d_first11"].shape[-1]], "learnable_1d_first11")
    for top in (1, 1000):
        for width in (32, 33):
            clock = jnp.asarray(fx.io["t_unit"]) * 1000.0
            fx.close(sinusoid(clock, width, 256.0), f"time_freq_max{top}_f{width}")
            time = TimeEmbedder(fx.config["dim"], frequencies=width, max_period=256.0, rngs=nnx.Rngs(0))
            for ours, official in ((time.fc1, 0), (time.fc2, 2)):
                ours.kernel[...] = jnp.asarray(fx.weights[f"time_f{width}.mlp.{official}.weight"].T)
                ours.bias[...] = jnp.asarray(fx.weights[f"time_f{width}.mlp.{official}.bias"])
            fx.close(time(clock), f"time_emb_max{top}_f{width}")


@pytest.mark.parametrize("fx", of("flextok-flow-noise*"), ids=str)
def test_flow_noise(fx: Fixture) -> None:
    io = {name: jnp.asarray(array) for name, array in fx.io.items()}
    process, x, eps = Linear(), nhwc(fx.io["clean"]), nhwc(fx.io["noise"])
    stratified = TimeSampler("logit-normal", stratified=True)
    times = {
        "logit_normal": TimeSampler("logit-normal").times(process, io["normal"]),
        "logit_normal_stratified": stratified.times(process, ndtri(stratified.strata(io["uniform"]))),
        "uniform": TimeSampler("uniform").times(process, io["uniform"]),
        "mode_025": TimeSampler("mode", scale=0.25).times(process, io["uniform"]),
        "mode_129": TimeSampler("mode", scale=1.29).times(process, io["uniform"]),
    }
    assert {f"sigma_{name}" for name in times} == {name for name in io if name.startswith("sigma_")}
    for name, t in times.items():
        fx.close(process.sigma(t), f"sigma_{name}")
        fx.close(nchw(noised(process, jnp.asarray(x), Draws(t, jnp.asarray(eps)))), f"noised_{name}")
    velocity = Predict("velocity").target(process, x, eps, times["uniform"])
    fx.close(nchw(velocity), "velocity_target")


@pytest.mark.parametrize("fx", of("flextok-nested-dropout*"), ids=str)
def test_nested_dropout(fx: Fixture) -> None:
    io = {name: jnp.asarray(array) for name, array in fx.io.items()}
    np.testing.assert_array_equal(fx.weights["dropout_mask_token"], io["mask_token"])
    fx.close(nested_dropout(io["x"], io["keep_k"], io["mask_token"]), "out_keep_k", rtol=0, atol=0)
    every = jnp.full(len(io["x"]), io["x"].shape[1])
    fx.close(nested_dropout(io["x"], every, io["mask_token"]), "out_without_key", rtol=0, atol=0)

    def total(x: jax.Array, mask: jax.Array) -> jax.Array:
        return (nested_dropout(x, io["train_keep_k"], mask) * io["upstream_grad"]).sum()

    for gradient, name in zip(jax.grad(total, (0, 1))(io["x"], io["mask_token"]), ("x", "mask_token"), strict=True):
        fx.close(gradient, f"grad_{name}")
    table = fx.io["uniform_pow2_rounding_table"]
    rounded = KeepLaw("uniform-pow2").kept(jnp.arange(1, len(table)), len(table) - 1)
    np.testing.assert_array_equal(rounded, table[1:])
    np.testing.assert_array_equal(KeepLaw("pow2").powers(len(table) - 1), fx.io["pow2_values"])


def whole() -> list[Any]:
    """Pairs of an encoder's and a decoder's fixture that describe one FlexTok."""
    pairs = [(a, b) for a in of("flextok-encoder*") for b in of("flextok-decode-sampling*") if a.config == b.config]
    return [pytest.param(a, b, id=f"{a}-{b}") for a, b in pairs]


def options(config: dict[str, Any], side: int) -> list[str]:
    """What a file does not tell, as flags of gen convert."""
    told = {
        "size": side,
        "head_size": config["head_dim"],
        "levels": config["levels"],
        "patch": config["patch"],
        "max_time": config["max_timestep"],
    }
    return [word for name, value in told.items() for word in (f"--network.{name}", json.dumps(value))]


@pytest.mark.parametrize(("encoder", "decoder"), whole())
def test_from_file_to_tokens(encoder: Fixture, decoder: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> the tokenizer; and back into the file."""
    weights, file, run = encoder.weights | decoder.weights, tmp_path / "flextok.safetensors", str(tmp_path / "run")
    save_file(weights, file)
    assert locate(None, weights).importer is IMPORTER
    flags = options(encoder.config, encoder.config["latent_hw"][0])
    assert cli.main(["convert", str(file), "--out", run, *flags]) == 0
    loaded = gen.load(run)
    tokenizer, params = loaded.tokenizer, loaded.params["tokenizer"]
    assert dataclasses.replace(tokenizer, remat="none") == described(encoder.config)
    found = tokenizer.encode(params, jnp.asarray(nhwc(encoder.io["vae_latents"])))
    encoder.close(found.ids, "tokens")
    keep, flow = jnp.asarray(decoder.io["keep_k"]), tokenizer.flow
    codes, keys = tokenizer.embed(params, jnp.asarray(decoder.io["tokens"])), jax.random.split(jax.random.key(0), 3)
    decoded = tokenizer.decode(params, codes, cond={"keep": keep}, keys=keys, options=PREVIEW)
    noise = jax.vmap(lambda key: jax.random.normal(key, flow.network.shape))(keys)
    cond = flow.net.apply(params["decoder"], codes, keep, method="condition")
    np.testing.assert_allclose(decoded, flow(params["decoder"], noise, 1.0, cond).denoised, rtol=1e-4, atol=1e-4)
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], array) for name, array in weights.items())


@pytest.mark.parametrize(("encoder", "decoder"), whole())
def test_a_file_with_its_autoencoder(encoder: Fixture, decoder: Fixture) -> None:
    """The first stage lies inside the file, and the latents that the transformers see are scaled."""
    (h, w), channels = encoder.config["latent_hw"], encoder.config["channels"]
    vae = KLVAEConfig((2 * h, 2 * w, 3), 8, (1, 2), 1, channels, channels, groups=4)
    inside = {f"vae.vae.{name}": a for name, a in DIFFUSERS.save(vae, Network(vae).init(jax.random.key(0))).items()}
    weights = encoder.weights | decoder.weights | inside
    with pytest.raises(GenError, match="scaling_factor"):
        IMPORTER.infer(weights, size=2 * h, groups=4)
    config = IMPORTER.infer(
        weights,
        size=2 * h,
        groups=4,
        scaling=0.5,
        head_size=encoder.config["head_dim"],
        levels=encoder.config["levels"],
        patch=encoder.config["patch"],
        max_time=encoder.config["max_timestep"],
    )
    assert config == dataclasses.replace(described(encoder.config), first=vae, scaling=0.5, remat="dots")
    _, params, report = IMPORTER.load(weights, config)
    assert len(report.matched) == len(weights)
    back = IMPORTER.save(config, params)
    assert all(np.array_equal(back[name], array) for name, array in weights.items())
    images = jax.random.uniform(jax.random.key(1), (2, 2 * h, 2 * w, 3), minval=-1.0)
    latents = jax.jit(config.latents)(params, images)
    expected = jax.jit(vae.encode)(params["first"], images).mean
    np.testing.assert_allclose(latents, 0.5 * expected, rtol=1e-5, atol=1e-5)
    codes = jnp.zeros((2, config.tokens, config.spec.width))
    keys = jax.random.split(jax.random.key(2), 2)
    plain = dataclasses.replace(config, first=Pixels(latents.shape[1:]), scaling=1.0)
    made, flowed = (
        jax.jit(lambda p, c=c: c.decode(p, codes, keys=keys, options=PREVIEW))(params) for c in (config, plain)
    )
    np.testing.assert_allclose(made, jax.jit(vae.decode)(params["first"], 2.0 * flowed), rtol=1e-4, atol=1e-4)
