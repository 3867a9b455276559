"""Masks and masked decoding: schedules, counts, guidance by step, what a sample depends on, what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import ConstantScale
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.masked import entering, hidden, masked_share
from gen.autoregressive.maskgit import MaskGITConfig
from gen.autoregressive.unmasking import MaskedSampler, RampScale, RisenCosineScale, largest, unmask
from gen.errors import GenError
from gen.nn.network import Network
from tests.autoregressive.drawn import drawn
from tests.conformance.examples import TOKENIZER

MODEL = MaskGITConfig(
    shape=(6,), vocabulary=8, num_classes=3, width=16, depth=2, heads=2, hidden=32, dropout=0.1, scan=False
)
SAMPLER = MaskedSampler(4, 3.0, guidance=ConstantScale(2.0))


@pytest.mark.parametrize(
    ("tokens", "steps", "expected"),
    [
        (32, 8, (32, 29, 26, 24, 21, 18, 14, 10)),
        (64, 8, (64, 58, 53, 48, 42, 36, 29, 20)),
        (4, 8, (4, 3, 2, 1, 1, 1, 1, 1)),
    ],
)
def test_masked_counts_of_the_arccos_schedule(tokens: int, steps: int, expected: tuple[int, ...]) -> None:
    assert entering("arccos", tokens, steps) == expected


@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "root"])
def test_schedules_fall_from_all_to_none(schedule: Any) -> None:
    done = np.linspace(0.0, 1.0, 11)
    share = masked_share(schedule, done)
    assert (share[0], abs(share[-1]) < 1e-15) == (1.0, True)
    assert (np.diff(share) < 0).all()
    np.testing.assert_allclose(masked_share(schedule, jnp.asarray(done, jnp.float32)), share, atol=1e-6)
    counts = entering(schedule, 40, 10)
    assert (counts[0], len(counts), min(counts) >= 1) == (40, 10, True)
    order = jnp.tile(jnp.linspace(0.0, 0.9, 40), (11, 1))
    np.testing.assert_array_equal(
        hidden(schedule, jnp.asarray(done, jnp.float32), order).sum(-1), np.maximum(np.round(40 * share), 1)
    )


def test_guidance_by_step() -> None:
    np.testing.assert_allclose(RampScale(5.0).scales(4), [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(RisenCosineScale(13.0).scales(2), [7.5, 13.0])
    assert not RampScale().guides
    np.testing.assert_array_equal(RisenCosineScale().scales(3), 1.0)


@pytest.fixture(scope="module")
def params() -> Any:
    return drawn(MODEL)


@pytest.fixture(scope="module")
def sampled(params: Any) -> Any:
    generator = TokenGenerator(MODEL, SAMPLER)
    assert generator.nfe == 4
    return jax.jit(lambda keys, label: generator.tokens({"net": params}, keys, {"label": label}))


def test_a_sample_depends_on_its_key_and_class(sampled: Any) -> None:
    keys, label = jax.random.split(jax.random.key(2), 4), jnp.array([0, 1, 2, 0])
    ids, turned = np.asarray(sampled(keys, label)), np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(sampled(keys[turned], label[turned]), ids[turned])
    assert (ids[0] != ids[3]).any()
    assert (ids.min() >= 0, ids.max() < MODEL.vocabulary) == (True, True)


def test_tokens_are_drawn_by_their_probabilities_at_every_step() -> None:
    """MaskGIT's rule, of a network that says the same at every step; surest first favours what is likely."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.1, 0.1]))

    class Says(MaskGITConfig):
        def logits(self, params: Any, tokens: Any, cond: Any) -> Any:
            return jnp.broadcast_to(logits, (*tokens.shape, 4))

    model, blank = Says(shape=(4,), vocabulary=4), jnp.full((4000, 4), 4, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 8)

    @jax.jit
    def shares(temperature: Any, token_temperature: Any) -> Any:
        draw = largest(lambda i: jax.random.gumbel(keys[2 * i], (4000, 4, 4)))

        def order(i: Any) -> jax.Array:
            return jax.random.gumbel(keys[2 * i + 1], (4000, 4))

        settings = {"temperature": temperature, "annealed": False, "token_temperature": token_temperature}
        ids = unmask(model, {}, {}, draw, order, blank, steps=4, **settings)[-1]
        return jnp.stack([(ids == v).mean() for v in range(4)])

    np.testing.assert_allclose(shares(1e6, 1.0), [0.5, 0.3, 0.1, 0.1], atol=0.015)
    sharp = np.array([0.25, 0.09, 0.01, 0.01]) / 0.36
    np.testing.assert_allclose(shares(1e6, 0.5), sharp, atol=0.015)
    assert shares(0.0, 1.0)[0] > 0.6


def test_training_draws_and_drops(params: Any) -> None:
    tokens, label = jnp.arange(12).reshape(2, 6) % 8, jnp.array([0, 1])
    draws = jax.jit(MODEL.draw)(jax.random.key(0), tokens, {})
    assert {name: value.shape for name, value in draws.items()} == {
        "dropped": (2,),
        "dropout": (2,),
        "ratio": (2,),
        "order": (2, 6),
    }
    loss = jax.jit(lambda draws, label: MODEL.loss(params, tokens, {"label": label}, draws))
    losses, terms = loss(draws, label)
    assert losses.shape == terms["accuracy"].shape == (2,)
    other = loss(draws | {"dropout": draws["dropout"][::-1]}, label)[0]
    assert (np.asarray(losses) != np.asarray(other)).all()
    gone = draws | {"dropped": jnp.ones(2, bool)}
    np.testing.assert_array_equal(loss(gone, label)[0], loss(gone, label[::-1])[0])


def test_refusals(params: Any) -> None:
    with pytest.raises(GenError, match="expected at least 1 step"):
        MaskedSampler(0)
    with pytest.raises(GenError, match="tokens drawn at temperature 0"):
        MaskedSampler(token_temperature=0.0)
    with pytest.raises(GenError, match="neither solver nor grid"):
        SAMPLER.changed(solver=1)
    assert SAMPLER.changed(steps=2, guidance=3.0) == dataclasses.replace(SAMPLER, steps=2, guidance=ConstantScale(3.0))
    with pytest.raises(GenError, match="a model of tokens; give what was encoded"):
        TokenGenerator(MODEL, SAMPLER, TOKENIZER)
    with pytest.raises(GenError, match="takes \\(B, 6\\)"):
        Network(MODEL).apply(params, jnp.zeros((1, 5), jnp.int32), {"label": jnp.zeros(1, jnp.int32)})
    with pytest.raises(GenError, match="MaskGITConfig's schedule is 'square'"):
        dataclasses.replace(MODEL, schedule="square")
    with pytest.raises(GenError, match="smoothing 1"):
        dataclasses.replace(MODEL, smoothing=1.0)
    with pytest.raises(GenError, match="in 0 steps"):
        entering("linear", 4, 0)
