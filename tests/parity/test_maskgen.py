"""MaskGen-VQ's network against the official code."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gen.nn.network import Network
from gen.pretrained.maskgen import IMPORTER
from gen.pretrained.systems import locate
from tests.parity.conftest import Fixture, fixtures
from tests.parity.test_sdvae import check_round_trip


@pytest.mark.parametrize("fx", fixtures("maskgen-vq-forward*"), ids=str)
def test_forward(fx: Fixture) -> None:
    given, codes, io = fx.config["config"]["model"]["maskgen"], fx.config["config"]["model"]["vq_model"], fx.io
    assert locate(None, fx.weights).importer is IMPORTER
    config = IMPORTER.infer(
        fx.weights,
        heads=given["decoder_num_heads"],
        vocabulary=codes["codebook_size"],
        length=io["text"].shape[1],
    )
    score = given["micro_condition_embed_dim"] if given["micro_condition"] else 0
    assert (config.length, config.spare, config.text.width, config.text.score) == (
        codes["num_latent_tokens"],
        given["condition_num_classes"] + 1,
        codes["text_embed_dim"],
        score,
    )
    assert (config.trunk.width, config.trunk.depth) == (given["decoder_embed_dim"], given["decoder_depth"])
    _, params, report = IMPORTER.load(fx.weights, config)
    assert len(report.matched) == len(fx.weights)
    check_round_trip(IMPORTER, fx.weights, config, params)
    cond = {"prompt": io["text"], "pooled": io["text_pooled"][:, 0], "aesthetic": io["aesthetic_score"]}
    cond = {name: jnp.asarray(cond[name]) for name in config.conditions}

    @jax.jit
    def found(params: Any) -> dict[str, jax.Array]:
        net, tokens = Network(config).module(params), jnp.asarray(io["input_ids"])
        trunk = net.trunk
        streams, c = trunk.start(net.embedding(tokens), cond)
        image, text = trunk.run(streams, c, keep=(0,)).kept[0]
        return {
            "pooled_with_micro_condition": config.text.vector(cond)[:, None],
            "block0_image": image,
            "block0_text": text,
            "logits": net(tokens, cond),
        }

    for name, array in found(params).items():
        fx.close(array, name)
