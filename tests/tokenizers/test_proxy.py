"""TiTok in two stages: codes of a frozen 2D tokenizer first, then pixels by the decoder alone."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from gen.data.sources import digits
from gen.errors import GenError
from gen.nn.discriminators import PatchGAN
from gen.nn.network import Network
from gen.tokenizers.adversarial import AdversarialTask
from gen.training.optim import OptimConfig
from tests.conformance import examples

OPTIM = OptimConfig(lr=1e-3, eps=1e-2, weight_decay=0.01)
PROXY = examples.PROXY
FIRST = dataclasses.replace(examples.example("proxy-task"), optim=OPTIM)
SECOND = AdversarialTask(
    tokenizer=FIRST.tokenizer,
    discriminator=PatchGAN(channels=1, width=4, layers=1),
    optim=OPTIM,
    discriminator_optim=OPTIM,
    train=("decoder*", "mask_token", "head/*", "pixel_*"),
)


def frozen() -> dict[str, Any]:
    return {"proxy": jax.jit(Network(PROXY).init)(jax.random.key(3))}


@pytest.mark.slow
def test_stages_train_what_they_should() -> None:
    batch = {"image": digits("train").gather(np.arange(8))["image"]}
    given = frozen()
    state = jax.jit(FIRST.init, static_argnums=2)(jax.random.key(0), given, None)
    start = state.params["tokenizer"]
    jax.tree.map(np.testing.assert_array_equal, start["pixel_decoder"], given["proxy"]["decoder"])
    program = jax.jit(FIRST.update)
    losses = []
    for step in range(30):
        state, metrics = program(state, given, batch, FIRST.inputs(step, 30), jax.random.key(step))
        losses.append(float(metrics["code_loss"]))
    assert losses[-1] < 0.9 * losses[0]
    first = state.params["tokenizer"]
    jax.tree.map(np.testing.assert_array_equal, first["pixel_decoder"], start["pixel_decoder"])
    second = SECOND.init(jax.random.key(1), {}, state)
    second, _ = jax.jit(SECOND.update_both)(second, {}, batch, SECOND.inputs(0, 2), jax.random.key(9))
    tuned = second.params["tokenizer"]
    for name in ("encoder", "quantizer", "latent_tokens", "encoder_out"):
        jax.tree.map(np.testing.assert_array_equal, tuned[name], first[name])
    assert (np.asarray(tuned["pixel_codes"]) != np.asarray(first["pixel_codes"])).any()


def test_a_tokenizer_without_a_2d_one_is_refused() -> None:
    with pytest.raises(GenError, match="set its `pixels`"):
        dataclasses.replace(FIRST, tokenizer=examples.CODES)
    with pytest.raises(GenError, match="frozen role 'proxy'"):
        FIRST.init(jax.random.key(0), {}, None)
