"""Distilled Decoding against golden numbers: the flow from noise to tokens, the teacher's conditional score."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import mix, top_k
from gen.diffusion.objectives import Draws, VelocityMatching, noised
from gen.diffusion.prediction import Prediction
from gen.diffusion.process import EDM, Linear
from gen.distill.code_flow import CodeDenoiser, code_weights, flow_to_codes, log_density
from gen.distill.distilled_decoding import answered, nearest, perturbed, sampled, spliced
from gen.distill.dmd2 import matching_gradient, matching_loss
from gen.nn.network import Network, param_shapes
from gen.pretrained.distilled_decoding import GPT_IMPORTER, VAR_IMPORTER
from gen.pretrained.rules import load
from gen.pretrained.var import quantizer_rules
from gen.sampling.solvers import Euler, Heun
from tests.parity.conftest import Fixture, fixtures

TRAJECTORIES, SCORES = fixtures("dd1-trajectory*"), fixtures("dd2-conditional-score*")
STUDENTS, VAR_STUDENTS = fixtures("dd1-llamagen-forward*"), fixtures("dd1-var-forward*")


def logs(probabilities: Any) -> jax.Array:
    return jnp.log(jnp.asarray(probabilities))


@pytest.mark.parametrize("fx", TRAJECTORIES, ids=str)
def test_velocity_of_the_flow_to_codes(fx: Fixture) -> None:
    with jax.enable_x64(True):
        codes, log_p = jnp.asarray(fx.io["codebook"]), logs(fx.io["probs"])
        found: list[list[jax.Array]] = [[], [], []]
        for t, x in zip(1.0 - fx.io["vel_t"], jnp.asarray(fx.io["vel_x"]), strict=True):
            prediction, _ = CodeDenoiser(Linear(), log_p, codes)(x, t, {}, 0, ())
            found[0].append(code_weights(Linear(), log_p, codes, x, jnp.asarray(t)))
            found[1].append(prediction.denoised)
            found[2].append(-prediction.velocity)  # the fixture's clock runs from noise to data
    for name, values in zip(("vel_weights", "vel_posterior_mean", "vel_velocity"), found, strict=True):
        fx.close(np.stack(values), name)


@pytest.mark.parametrize("fx", TRAJECTORIES, ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_flow_to_codes(fx: Fixture, wide: bool) -> None:
    with jax.enable_x64(wide):
        codes, log_p, noise = jnp.asarray(fx.io["codebook"]), logs(fx.io["probs"]), jnp.asarray(fx.io["noise"])
        for name in fx.io:
            solver, _, kind = name.partition("_")
            if kind != "id":
                continue
            method = Heun() if solver.startswith("heun") else Euler()
            steps = int(solver.removeprefix("heun").removeprefix("euler"))
            ids, path = flow_to_codes(log_p, codes, noise, steps, method)
            fx.close(ids, name)
            if not wide:
                continue
            if f"{solver}_x" in fx.io:
                fx.close(path[-1], f"{solver}_x")
            else:
                fx.close(jnp.concatenate([noise[None], path]), f"{solver}_path")


@pytest.mark.parametrize("fx", TRAJECTORIES, ids=str)
def test_tokens_written_one_after_the_other(fx: Fixture) -> None:
    with jax.enable_x64(True):
        codes, noise = jnp.asarray(fx.io["codebook"]), jnp.asarray(fx.io["chain_noise"])
        log_p, states = jnp.broadcast_to(logs(fx.io["chain_p0"]), (len(noise), len(codes))), [noise]
        ids = []
        for i in range(noise.shape[1]):
            token, _ = flow_to_codes(log_p, codes, noise[:, i], 100)
            ids.append(token)
            states.append(states[-1].at[:, i].set(codes[token]))
            log_p = logs(fx.io["chain_T"])[token]
    fx.close(np.stack(ids, axis=1), "chain_ids")
    fx.close(np.stack(states, axis=1), "chain_states")


@pytest.mark.parametrize("fx", TRAJECTORIES, ids=str)
def test_the_flow_carries_noise_onto_the_probabilities(fx: Fixture) -> None:
    codes, rows = fx.io["codebook"].astype(np.float32), 20_000
    log_p = logs(np.float32(fx.io["probs"][0]))
    noise = jax.random.normal(jax.random.key(0), (rows, codes.shape[1]))
    ids, _ = jax.jit(lambda n: flow_to_codes(log_p, jnp.asarray(codes), n, 100))(noise)
    share = np.bincount(np.asarray(ids), minlength=len(codes)) / rows
    error = 4.0 * np.sqrt(fx.io["probs"][0] / rows) + 0.01  # four deviations, and a hundred steps of Euler
    assert (np.abs(share - fx.io["probs"][0]) <= error).all()
    assert (np.abs(fx.io["pushforward_freq_row0"] - fx.io["probs"][0]) <= error).all()


@pytest.mark.parametrize("fx", SCORES, ids=str)
def test_conditional_score(fx: Fixture) -> None:
    io, process = fx.io, Linear()
    with jax.enable_x64(True):
        codes, x, t = jnp.asarray(io["codebook"]), jnp.asarray(io["x_t"]), jnp.asarray(io["t"])
        guided = mix(jnp.asarray(io["logits_cond"]), jnp.asarray(io["logits_uncond"]), io["cfg_scale"])
        top = top_k(guided, fx.config["top_k"])
        for ending, logits in (("", guided), (f"_top{fx.config['top_k']}", top)):
            log_p = jax.nn.log_softmax(logits)
            prediction: Prediction = CodeDenoiser(process, log_p, codes)(x, t, {}, 0, ())[0]
            fx.close(jnp.exp(log_p), f"probs{ending}")
            fx.close(code_weights(process, log_p, codes, x, t), f"weights{ending}")
            fx.close(prediction.denoised, f"posterior_mean{ending}")
            fx.close(prediction.score, f"score{ending}")
            fx.close(prediction.eps, f"eps_pred{ending}")
            fx.close(prediction.velocity, f"velocity{ending}")
            fx.close(log_density(process, log_p, codes, x, t), f"log_density{ending}")
        log_p = jax.nn.log_softmax(guided)
        q, noise, fake_mean = (jnp.asarray(io[name]) for name in ("q", "noise", "fake_mean"))
        draws = Draws(t, noise)
        fx.close(noised(process, q, draws), "x_t")
        exact: Prediction = CodeDenoiser(process, log_p, codes)(x, t, {}, 0, ())[0]
        fake = Prediction(fake_mean, x, t, {}, process, "x")
        fx.close(fake.score, "fake_score")
        fx.close(fake.score - exact.score, "csd_grad_raw")
        fx.close(fake_mean - exact.denoised, "csd_grad_wrt_q_weight_sigma2_over_alpha")
        gradient = matching_gradient(q, exact.denoised, fake_mean)
        fx.close(gradient, "dmd_normalised_grad")
        fx.close(matching_loss(q, gradient), "dmd_loss")
        fx.close(jax.grad(matching_loss)(q, gradient) * q.size, "dmd_normalised_grad")
        fx.close(fake.velocity, "guidance_pred_velocity")
        fx.close(noise - q, "guidance_target_velocity")
        losses, _ = VelocityMatching().loss(lambda x_t, t, c: fake, process, q, {}, draws)
        fx.close(losses.mean(), "guidance_fm_loss")
        fx.close(q + jnp.asarray(io["edm_sigma"])[..., None] * noise, "edm_x")
        edm = CodeDenoiser(EDM(), log_p, codes)(jnp.asarray(io["edm_x"]), jnp.asarray(io["edm_sigma"]), {}, 0, ())[0]
        fx.close(edm.denoised, "edm_denoised")
        fx.close(edm.score, "edm_score")


def student_options(fx: Fixture) -> dict[str, Any]:
    """What shapes do not tell."""
    side = round(fx.config["block_size"] ** 0.5)
    dropped = fx.config.get("class_dropout_prob", 0.1) > 0
    return {"heads": fx.config["n_head"], "shape": (side, side), "null_class": dropped}


@pytest.mark.parametrize("fx", STUDENTS, ids=str)
def test_student_of_llamagen(fx: Fixture) -> None:
    config, params, _ = GPT_IMPORTER.load(fx.weights, GPT_IMPORTER.infer(fx.weights, **student_options(fx)))
    saved = GPT_IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)
    io, codes, net = fx.io, jnp.asarray(fx.io["codebook"]), Network(config)
    known, cond = jnp.asarray(io["t"]), {"label": jnp.asarray(io["label"])}
    noise, data = jnp.asarray(io["noise"]), codes[io["data_ids"]]
    x = perturbed(data, noise, known)
    fx.close(x, "x_t")
    logits, vectors = net(params, x, known, cond)
    fx.close(logits, "logits")
    fx.close(vectors, "tokens")
    fx.close(nearest(codes, x), "nearest_ids")
    split = int(io["split_t"])
    ids, kept = answered(x, known, logits, vectors, codes)
    fx.close(kept, "final_tokens")
    fx.close(ids, np.argmax(io["final_logits"], axis=-1).astype(np.int32))
    fx.close(spliced(ids, kept, codes, split), "final_sequence")
    starts = tuple(int(name.removeprefix("sample_after_t")) for name in io if name.startswith("sample_after_t"))
    for number in range(len(starts)):
        made = sampled(lambda x, t: net(params, x, t, cond), noise, codes, starts[: number + 1], split)
        fx.close(made, f"sample_after_t{starts[number]}")


def var_student(fx: Fixture) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """The student, its parameters, and the quantizer's arrays that stand beside them."""
    given, quantizer = fx.config["dd"], fx.config["quantizer"]
    own = {name: a for name, a in fx.weights.items() if not name.startswith("vae_quantize.")}
    options = {
        "heads": given["num_heads"],
        "scales": tuple(given["patch_nums"]),
        "strength": quantizer["quant_resi"],
        "convolutions": quantizer["share_quant_resi"],
        "cosine": quantizer["using_znorm"],
        "eps": given["norm_eps"],
    }
    config, params, _ = VAR_IMPORTER.load(own, VAR_IMPORTER.infer(own, **options))
    saved = VAR_IMPORTER.save(config, params)
    for name in saved:
        np.testing.assert_array_equal(saved[name], own[name], err_msg=name, strict=True)
    assert set(own) - set(saved) <= set(VAR_IMPORTER.ignore)
    return config, params, {name: a for name, a in fx.weights.items() if name not in own}


@pytest.mark.parametrize("fx", VAR_STUDENTS, ids=str)
def test_student_of_var(fx: Fixture) -> None:
    config, params, beside = var_student(fx)
    quantizer = config.of.quantizer
    shapes = param_shapes(quantizer)
    hits = {"hits": np.zeros(shapes["hits"].shape, np.float32)}  # of training alone
    codebook = load(quantizer_rules(quantizer, "vae_quantize.", ""), beside, shapes, fresh=hits)[0]
    codes, io, net = jnp.asarray(codebook["embedding"]), fx.io, Network(config)
    groups = np.cumsum([0, *config.of.groups])  # the fixture counts scales
    known, cond = jnp.asarray(groups[io["t"]], jnp.int32), {"label": jnp.asarray(io["label"])}
    np.testing.assert_array_equal(known, io["noise_idx"] - 1)
    fx.close(np.asarray(net.module(params).mask()).astype(np.int32), "attn_allowed")
    noise, data = jnp.asarray(io["noise"]), codes[io["data_ids"]]
    fx.close(data, "data")
    x = perturbed(data, noise, known)
    fx.close(x, "x_t")
    logits, vectors = net(params, x, known, cond)
    fx.close(logits, "logits")
    fx.close(vectors, "tokens")
    split = int(groups[int(io["split_t"])])
    ids, kept = answered(x, known, logits, vectors, codes)
    fx.close(kept, "final_tokens")
    fx.close(ids, np.argmax(io["final_logits"], axis=-1).astype(np.int32))
    fx.close(spliced(ids, kept, codes, split), "final_sequence")
    scales = [int(name.removeprefix("sample_after_t")) for name in io if name.startswith("sample_after_t")]
    made = noise
    for number in range(len(scales)):
        starts = tuple(int(groups[t]) for t in scales[: number + 1])
        made = sampled(lambda x, t: net(params, x, t, cond), noise, codes, starts, split)
        fx.close(made, f"sample_after_t{scales[number]}")
    latents = Network(quantizer).apply(codebook, made, method="together")
    fx.close(jnp.moveaxis(latents, -1, 1), "sample_f_hat")
