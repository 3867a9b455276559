"""LlamaGen's decoder against the official code: positions, blocks, logits, greedy generation with the cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.base import cross_entropy
from gen.autoregressive.blocks import Reading, run_causal
from gen.autoregressive.decoding import ConstantScale, mix
from gen.autoregressive.gpt import GPTConfig, rotation, swiglu_hidden
from gen.autoregressive.sampler import both, write
from gen.nn.rotary import rotate_pairs
from gen.pretrained.llamagen import IMPORTER
from gen.pretrained.systems import locate
from tests.parity.conftest import Fixture, fixtures

CLASSES, CAPTIONS = fixtures("llamagen-gpt-forward*"), fixtures("llamagen-gpt-t2i-forward*")


def options(fx: Fixture) -> dict[str, Any]:
    """What shapes do not tell."""
    config, side = fx.config, round(fx.config["block_size"] ** 0.5)
    found = {"heads": config["n_head"], "shape": (side, side), "theta": float(config.get("rope_base", 10000))}
    dropped = config["model_type"] == "t2i" or config["class_dropout_prob"] > 0
    return found | {"eps": config.get("norm_eps", 1e-5), "null_class": dropped}


def loaded(fx: Fixture) -> tuple[GPTConfig, Any]:
    config, params, _ = IMPORTER.load(fx.weights, IMPORTER.infer(fx.weights, **options(fx)))
    return config, params


@pytest.mark.parametrize("fx", [*CLASSES, *CAPTIONS], ids=str)
def test_names_and_configuration(fx: Fixture) -> None:
    given = fx.config
    assert locate(None, fx.weights).importer is IMPORTER
    config, params = loaded(fx)
    text = (given["cls_token_num"], given["caption_dim"]) if given["model_type"] == "t2i" else None
    kv_heads = given.get("n_kv_head")
    assert (config.vocabulary, config.width, config.depth) == (given["vocab_size"], given["dim"], given["n_layer"])
    assert config.hidden == swiglu_hidden(given["dim"], given["multiple_of"], given.get("ffn_dim_multiplier"))
    assert (config.kv_heads or config.heads, config.text) == (kv_heads or given["n_head"], text)
    assert config.num_classes == (0 if text else given["num_classes"])
    saved = IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("fx", CLASSES, ids=str)
def test_forward(fx: Fixture) -> None:
    config, params = loaded(fx)
    cos, sin = rotation(config)
    fx.close(np.stack([cos[:, ::2], sin[:, ::2]], axis=-1), "freqs_cis")
    fx.close(rotate_pairs(jnp.asarray(fx.io["rope_in"]), cos, sin), "rope_out")
    tokens, cond = jnp.asarray(fx.io["idx"]), {"label": jnp.asarray(fx.io["cond_idx"])}

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, ...]:
        module = config.net.module(params)
        x = jnp.concatenate([module.start(cond, len(tokens)), module.tokens(tokens[:, :-1])], axis=1)
        keep = tuple(range(config.depth))
        reading: Reading = module.reading(cond, 0, config.length)
        _, _, kept = run_causal(module.blocks, x, reading, config.depth, lambda b, x, r: b(x, r), keep=keep)
        draws = config.draw(jax.random.key(0), tokens, {}) | {"dropped": jnp.zeros(len(tokens), bool)}
        draws.pop("dropout", None)
        return kept, config.logits(params, tokens, cond), config.loss(params, tokens, cond, draws)[0]

    kept, logits, losses = run(params)
    for name in fx.io:
        if name.startswith("after_block_"):
            fx.close(kept[int(name.rpartition("_")[2])], name)
    fx.close(logits, "logits")
    fx.close(losses.mean(), "loss")


@pytest.mark.parametrize("fx", [fx for fx in CLASSES if "gen_cond" in fx.io], ids=str)
def test_greedy_generation_with_the_cache(fx: Fixture) -> None:
    config, params = loaded(fx)
    cond, scale = {"label": jnp.asarray(fx.io["gen_cond"])}, float(fx.io["gen_cfg_scale"])
    until = int(fx.io["gen_cfg_interval"]) + 2  # the official count starts at the token after the first
    schedules = {"cfg": ConstantScale(scale), "cfg_interval": ConstantScale(scale, until), "nocfg": ConstantScale()}

    def greedy(logits: jax.Array, at: Any) -> jax.Array:
        return logits.argmax(-1).astype(jnp.int32)

    tokens = jnp.asarray(fx.io["gen_tokens_cfg"])

    @jax.jit
    def run(params: Any) -> tuple[Any, jax.Array]:
        made = {k: write(config, params, cond, len(tokens), greedy, g) for k, g in schedules.items()}
        own, null = jnp.split(config.logits(params, jnp.concatenate([tokens, tokens]), both(config, params, cond)), 2)
        return made, mix(own, null, scale)

    made, logits = run(params)
    for name, ids in made.items():
        fx.close(ids, f"gen_tokens_{name}")
    fx.close(logits, "gen_logits_cfg")


@pytest.mark.parametrize("fx", CAPTIONS, ids=str)
def test_captions(fx: Fixture) -> None:
    config, params = loaded(fx)
    tokens, text = jnp.asarray(fx.io["idx"]), jnp.asarray(fx.io["caption"])
    module = config.net.module(params)
    fx.close(module.text(text), "caption_embedded")
    real, everywhere = jnp.asarray(fx.io["emb_mask"]).astype(bool), jnp.ones(text.shape[:2], bool)

    @jax.jit
    def run(params: Any, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        cond = {"text": text, "text_mask": mask}

        def step(cache: Any, row: Any) -> tuple[Any, jax.Array]:
            return config.step(params, cache, row[0][:, None], row[1], cond)

        cache, first = config.prefill(params, cond, len(tokens))
        _, later = jax.lax.scan(step, cache, (tokens[:, :-1].T, jnp.arange(config.length - 1)))
        cached = jnp.concatenate([first, later[:, :, 0].swapaxes(0, 1)], axis=1)
        return config.logits(params, tokens, cond), cached

    for mask, name in ((real, "valid"), (everywhere, "causal")):
        logits, cached = run(params, mask)
        np.testing.assert_allclose(cached, logits, rtol=1e-4, atol=1e-4)
        fx.close(logits, "logits" if name == "valid" else "logits_causal")
        losses, valid = cross_entropy(logits, tokens).mean(-1), jnp.asarray(fx.io["valid"])
        fx.close(losses.mean() if name == "causal" else (losses * valid).sum() / valid.sum(), f"loss_{name}")
    count = len(real) - 1
    fx.close(config.null(params, {"text": text, "text_mask": real})["text"][count], np.asarray(text[count]))
