"""MaskGen-VQ's network against the official code."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.errors import GenError
from gen.nn.conditions import make_conditions
from gen.nn.network import Network
from gen.pretrained.maskgen import IMPORTER
from gen.pretrained.readers import read_weights
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
    cond = {"prompt": io["text"], "pooled": io["text_pooled"][:, 0], "aesthetic": io.get("aesthetic_score")}
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


@pytest.mark.parametrize("fx", fixtures("maskgen-vq-forward*"), ids=str)
def test_from_file_to_tokens(fx: Fixture, tmp_path: Path) -> None:
    """Official file -> gen convert -> gen.load -> tokens of captions, and back into the file."""
    given, codes = fx.config["config"]["model"]["maskgen"], fx.config["config"]["model"]["vq_model"]
    run, length = str(tmp_path / "run"), fx.io["text"].shape[1]
    sizes = {"heads": given["decoder_num_heads"], "vocabulary": codes["codebook_size"], "length": length}
    flags = [word for name, value in sizes.items() for word in (f"--network.{name}", str(value))]
    assert cli.main(["convert", str(fx.path / "weights.safetensors"), "--out", run, *flags]) == 0
    loaded = gen.load(run)
    cond = {"prompt": fx.io["text"], "pooled": fx.io["text_pooled"][:, 0]}
    rows = range(len(fx.io["text"]))
    with pytest.raises(GenError, match="sample without guidance"):
        loaded.sample(rows, cond=cond)
    empty = {name: np.zeros(value.shape[1:], np.float32) for name, value in cond.items()}
    whole = dataclasses.replace(loaded, params={**loaded.params, "empty": empty})
    made = whole.generator(whole.params, jax.random.split(jax.random.key(0), len(rows)), made_of(whole, cond))
    assert made.shape == (len(rows), codes["num_latent_tokens"])
    assert (made.min() >= 0, made.max() < codes["codebook_size"]) == (True, True)
    assert cli.main(["convert", run, "--out", str(tmp_path / "back.safetensors")]) == 0
    back = read_weights(tmp_path / "back.safetensors")
    assert back.keys() == fx.weights.keys()
    assert all(np.array_equal(back[name], array) for name, array in fx.weights.items())


def made_of(loaded: Any, cond: Any) -> dict[str, jax.Array]:
    """The conditions of as many samples as there are captions."""
    made = make_conditions(loaded.generator.conditions, range(len(cond["pooled"])), cond)
    return {name: jnp.asarray(value) for name, value in made.items()}
