"""`gen.features.clip` against transformers' CLIPModel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.errors import GenError
from gen.nn.network import Network
from gen.pretrained.clip import IMPORTER
from tests.parity.conftest import fixtures

FIXTURES = fixtures("clip-towers*")


@functools.cache
def _loaded(fx):
    options = {
        "vision_heads": fx.config["vision_config"]["num_attention_heads"],
        "text_heads": fx.config["text_config"]["num_attention_heads"],
        "activation": fx.config["hidden_act"],
        "end_token": fx.config["text_config"]["eos_token_id"],
    }
    config = dataclasses.replace(IMPORTER.infer(fx.weights, **options), eps=fx.config["layer_norm_eps"])
    assert config.size == fx.config["vision_config"]["image_size"]
    _, params, _ = IMPORTER.load(fx.weights, config)
    return config, params


def _hidden(found, depth):
    return jnp.stack([found["embedded"], *(found[f"block_{i}"] for i in range(depth))])


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_towers(fx):
    config, params = _loaded(fx)
    module = Network(config).module(params)
    images = fx.io["pixel_values"].transpose(0, 2, 3, 1)
    image = jax.jit(lambda x: module.encode_image(x, keep=tuple(range(config.vision.depth))))(images)
    fx.close(_hidden(image, config.vision.depth), "vision_hidden")
    fx.close(image["pooled"], "vision_pooled")
    fx.close(image["embedding"], "image_embeds")
    encode = jax.jit(lambda x, mask: module.encode_text(x, mask, keep=tuple(range(config.text.depth))))
    for prefix, mask in (("", fx.io["attention_mask"] != 0), ("nomask.", None)):
        text = encode(fx.io["input_ids"], mask)
        fx.close(_hidden(text, config.text.depth), f"{prefix}text_hidden")
        fx.close(text["last"], f"{prefix}text_last")
        fx.close(text["pooled"], f"{prefix}text_pooled")
        fx.close(text["embedding"], f"{prefix}text_embeds")
        if not prefix:
            fx.close(module.similarity(image["embedding"], text["embedding"]), "logits_per_image")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_another_end_token(fx):
    config, params = _loaded(fx)
    other = dataclasses.replace(config, end_token=fx.config["alternative_eos_token_id"])
    found = Network(other).module(params).encode_text(fx.io["input_ids"], fx.io["attention_mask"] != 0)
    fx.close(found["pooled"], "eos.text_pooled")
    fx.close(found["embedding"], "eos.text_embeds")


@pytest.mark.parametrize("fx", FIXTURES, ids=str)
def test_names(fx):
    config, params = _loaded(fx)
    saved = IMPORTER.save(config, params)
    assert saved.keys() == fx.weights.keys()
    for name, array in fx.weights.items():
        np.testing.assert_array_equal(saved[name], array)
    with pytest.raises(GenError, match="reads"):
        Network(config).module(params).encode_text(np.zeros((1, config.length + 1), np.int32))
