"""MaskGIT over TiTok's tokens against the official code: both networks, masks and loss, and masked decoding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import ConstantScale, PowerCosineScale
from gen.autoregressive.masked import entering, hidden, masked_accuracy, smoothed_cross_entropy, weighted
from gen.autoregressive.maskgit import MaskGITConfig
from gen.autoregressive.unmasking import RampScale, largest, unmask
from gen.nn.layers import run_stack
from gen.nn.network import Network
from gen.pretrained.maskgit_generators import BERT, SKIPS
from gen.pretrained.systems import locate
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_sdvae import check_round_trip

SAMPLING = [pytest.param(fx, k, id=f"{fx}-{k}") for fx in fixtures("maskgit-sampling*") for k in fx.config["runs"]]


def model(fx: Fixture) -> tuple[Any, Any]:
    """The configuration, as the fixture states it, and the parameters, through the importer."""
    given, codes = (fx.config["config"]["model"][name] for name in ("generator", "vq_model"))
    importer = BERT if given["model_type"] == "ViT" else SKIPS
    assert locate(None, fx.weights).importer is importer
    config = importer.infer(fx.weights, heads=given["num_attention_heads"])
    assert (config.shape, config.vocabulary, config.num_classes, config.width, config.depth, config.hidden) == (
        (given["image_seq_len"],),
        codes["codebook_size"],
        given["condition_num_classes"],
        given["hidden_size"],
        given["num_hidden_layers"],
        given["intermediate_size"],
    )
    _, params, report = importer.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    check_round_trip(importer, fx.weights, config, params)
    return config, params


@pytest.mark.parametrize("fx", fixtures("maskgit-generator-forward*"), ids=str)
def test_forward(fx: Fixture) -> None:
    config, params = model(fx)
    tokens, cond = jnp.asarray(fx.io["input_ids"]), {"label": jnp.asarray(fx.io["condition"])}

    @jax.jit
    def found(params: Any) -> dict[str, jax.Array]:
        net = Network(config).module(params)
        x = net.sequence(tokens, cond)
        logits = {"logits_cond": net(tokens, cond), "logits_uncond": net(tokens, net.null(cond))}
        if isinstance(config, MaskGITConfig):
            start = net.start(x)
            kept = run_stack(net.blocks, start, lambda block, x, _: (block(x), None), keep=(0,)).kept
            return logits | {"embeddings_out": start, "layer0_out": kept[0]}
        down, middle, up = net.halves(x, keep=(0,))
        return logits | {"in_block0_out": down.kept[0], "mid_block_out": middle, "out_block0_out": up.kept[0]}

    arrays = found(params)
    assert arrays.keys() == fx.io.keys() - {"input_ids", "condition"}
    for name, array in arrays.items():
        fx.close(array, name)


@pytest.mark.parametrize("fx", fixtures("maskgit-masking-and-loss*"), ids=str)
def test_masks_and_loss(fx: Fixture) -> None:
    given, io = fx.config, fx.io
    config = MaskGITConfig(
        shape=(given["S"],),
        vocabulary=given["N"],
        num_classes=given["num_classes"],
        smoothing=given["label_smoothing"],
        unmasked=given["loss_weight_unmasked_token"],
        cond_dropout=given["class_drop"],
        width=8,
        depth=1,
        heads=1,
        hidden=8,
    )
    tokens = jnp.asarray(io["tokens"])
    mask = hidden(config.schedule, jnp.asarray(io["uniform_ratio"]), jnp.asarray(io["uniform_permutation"]))
    fx.close(mask, "masks")
    fx.close(mask.sum(-1), io["num_masked"].astype(np.int64))
    fx.close(jnp.where(mask, config.vocabulary, tokens), "masked_tokens")

    def loss(logits: jax.Array) -> jax.Array:
        return weighted(smoothed_cross_entropy(logits, tokens, config.smoothing), mask, config.unmasked).mean()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(io["logits"]))
    fx.close(value, "loss")
    fx.close(grad, "grad_logits")
    fx.close(masked_accuracy(jnp.asarray(io["logits"]), tokens, mask).mean(), "correct_tokens")
    params, label = Network(config).init(jax.random.key(0)), jnp.asarray(io["condition"])
    dropped = {"dropped": jnp.asarray(io["uniform_class_drop"]) < config.cond_dropout}
    seen = config.trained_on(params, {"label": label}, dropped)["label"]
    fx.close(config.vocabulary + 1 + seen, "condition_ids")


def schedule(run: dict[str, Any]) -> Any:
    """The guidance of a run; scales of the first two kinds count from 0 there."""
    scale = run["guidance_scale"]
    match run["guidance_decay"]:
        case "constant":
            return ConstantScale(1.0 + scale)
        case "linear":
            return RampScale(1.0 + scale)
        case "power-cosine":
            return PowerCosineScale(scale, run["guidance_scale_pow"])


@pytest.mark.parametrize(("fx", "name"), SAMPLING)
def test_decoding(fx: Fixture, name: str) -> None:
    config, params = model(fx)
    run, guidance = fx.config["runs"][name], schedule(fx.config["runs"][name])
    own = {key.removeprefix(f"{name}_"): jnp.asarray(fx.io[key]) for key in fx.io if key.startswith(f"{name}_")}
    cond, steps = {"label": jnp.asarray(fx.io["condition"])}, run["num_sample_steps"]

    def noise(name: str, i: Any) -> jax.Array:
        uniform = own[f"uniform_{name}"][i]
        return -jnp.log(jnp.maximum(-jnp.log(jnp.maximum(uniform, 1e-20)), 1e-20))

    @jax.jit
    def found(params: Any) -> tuple[jax.Array, ...]:
        path = unmask(
            config,
            params,
            cond,
            largest(lambda i: noise("tokens", i)),
            lambda i: noise("confidence", i),
            jnp.full_like(own["ids_in"][0], config.vocabulary, dtype=jnp.int32),
            steps=steps,
            temperature=run["randomize_temperature"],
            annealed=run["softmax_temperature_annealing"],
            guidance=guidance,
        )
        null = config.null(params, cond)
        return path, *(jnp.stack([config.logits(params, ids, c) for ids in own["ids_in"]]) for c in (cond, null))

    path, conditional, null = found(params)
    fx.close(path[:-1], np.asarray(own["ids_in"][1:]).astype(np.int32))
    fx.close(path[-1], np.asarray(own["ids_final"]).astype(np.int32))
    assert entering(config.schedule, config.length, steps) == tuple((own["ids_in"] == config.vocabulary)[:, 0].sum(-1))
    uses = np.asarray(guidance.scales(steps) != 1.0)
    official = guidance.scales(steps) - (run["guidance_decay"] != "power-cosine")
    fx.close(np.float32(official), f"{name}_guidance_scale_per_step")
    fx.close(conditional, f"{name}_cond_logits")
    # a scale of 1 needs no second pass, but the official rising cosine makes it all the same
    skipped = ~uses & (run["guidance_decay"] != "power-cosine")
    fx.close(np.where(skipped[:, None, None, None], 0.0, null), f"{name}_uncond_logits")
