"""MAR: published sizes, patches, masks that training draws, what a sample depends on, refusals; learning digits."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gen
from gen import cli
from gen.autoregressive.infilling import InfillingSampler, KnownScale, LatentTokenGenerator, fullest
from gen.autoregressive.mar import MARConfig, mar
from gen.diffusion.ddpm import DDPM
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from tests.autoregressive.drawn import drawn
from tests.autoregressive.learned import agreement
from tests.conformance.examples import TOKENIZER

MODEL = MARConfig(
    shape=(4, 4, 2),
    patch=2,
    num_classes=3,
    width=16,
    depth=1,
    heads=2,
    buffer=2,
    head_width=16,
    head_depth=1,
    process=DDPM("linear"),
    mask_least=0.5,
    scan=False,
)
SAMPLER = InfillingSampler(3, 3, guidance=KnownScale(2.0))


@pytest.mark.parametrize(
    ("size", "whole", "head"),
    [("B", 207_924_768, 35_749_920), ("L", 478_326_304, 72_230_432), ("H", 942_403_104, 151_206_944)],
)
def test_published_sizes(size: str, whole: int, head: int) -> None:
    shapes = param_shapes(mar(size))
    assert (count(shapes), count(shapes["head"])) == (whole, head)


def test_patches_have_the_channel_first() -> None:
    latents = jnp.arange(32.0).reshape(1, 4, 4, 2)
    tokens = MODEL.sequence(latents)
    assert tokens.shape == (1, 4, 8)
    np.testing.assert_array_equal(tokens[0, 1], [4, 6, 12, 14, 5, 7, 13, 15])
    np.testing.assert_array_equal(MODEL.stored(tokens), latents)
    line = dataclasses.replace(MODEL, shape=(6, 2), patch=3)
    assert line.sequence(jnp.zeros((1, 6, 2))).shape == (1, 2, 6)


@pytest.fixture(scope="module")
def params() -> Any:
    return drawn(MODEL)


def test_a_sample_depends_on_its_key_and_class(params: Any) -> None:
    generator = LatentTokenGenerator(MODEL, SAMPLER)
    assert (generator.nfe, generator.shape, fullest(MODEL, 3)) == (3, (4, 4, 2), 2)
    sample = jax.jit(lambda keys, label: generator({"net": params}, keys, {"label": label}))
    keys, label, turned = jax.random.split(jax.random.key(1), 3), jnp.array([0, 1, 2]), np.array([2, 0, 1])
    found = np.asarray(sample(keys, label))
    np.testing.assert_allclose(sample(keys[turned], label[turned]), found[turned], rtol=1e-4, atol=1e-4)
    assert np.isfinite(found).all()
    assert (found[0] != found[1]).any()


def test_training_masks_and_drops(params: Any) -> None:
    tokens, label = jax.random.normal(jax.random.key(3), (3, 4, 8)), jnp.array([0, 1, 2])
    several = jax.jit(jax.vmap(MODEL.draw, (0, None)))(jax.random.split(jax.random.key(0), 12), tokens)
    draws = {name: value[0] for name, value in several.items()}
    assert {name: value.shape for name, value in draws.items()} == {
        "order": (3, 4),
        "count": (3,),
        "t": (3, 4, 4),
        "eps": (3, 4, 4, 8),
        "dropped": (3,),
        "dropout": (3,),
    }
    np.testing.assert_array_equal(np.sort(draws["order"], axis=1), np.tile(np.arange(4), (3, 1)))
    counts = np.asarray(several["count"])
    assert (counts == counts[:, :1]).all()
    assert (set(counts[:, 0]) <= {2, 3, 4}, len(set(counts[:, 0])) > 1) == (True, True)
    loss = jax.jit(lambda tokens, draws, label: MODEL.loss(params, tokens, {"label": label}, draws)[0])
    losses = loss(tokens, draws, label)
    assert losses.shape == (3,)
    gone = draws | {"dropped": jnp.ones(3, bool)}
    np.testing.assert_array_equal(loss(tokens, gone, label), loss(tokens, gone, label[::-1]))
    other = draws | {"dropout": draws["dropout"][::-1]}
    assert float(jnp.abs(loss(tokens, other, label) - losses).max()) > 0.0


def test_refusals(params: Any) -> None:
    with pytest.raises(GenError, match="use fewer"):
        LatentTokenGenerator(MODEL, InfillingSampler(5))
    with pytest.raises(GenError, match="give the tokenizer that it was trained on"):
        LatentTokenGenerator(MODEL, SAMPLER, TOKENIZER)
    with pytest.raises(GenError, match="neither solver nor grid"):
        SAMPLER.changed(grid=1)
    assert SAMPLER.changed(steps=2, guidance=3.0) == InfillingSampler(2, 3, guidance=KnownScale(3.0))
    with pytest.raises(GenError, match="at least 1 step of both"):
        InfillingSampler(1, 0)
    with pytest.raises(GenError, match="patches of 3"):
        dataclasses.replace(MODEL, patch=3)
    with pytest.raises(GenError, match="a width that the heads divide"):
        dataclasses.replace(MODEL, heads=3)
    with pytest.raises(GenError, match="0 <= least <= mean <= 1"):
        dataclasses.replace(MODEL, mask_least=1.5)
    with pytest.raises(GenError, match="dropout 1"):
        dataclasses.replace(MODEL, dropout=1.0)
    with pytest.raises(GenError, match="unknown MAR size 'M'"):
        mar("M")
    unknown = dataclasses.replace(MODEL, num_classes=0)
    with pytest.raises(GenError, match="sample it without guidance"):
        Network(unknown).apply(param_shapes(unknown), {}, method="null")
    with pytest.raises(GenError, match="this MAR takes"):
        MODEL.z(params, jnp.zeros((1, 3, 8)), np.ones((1, 3), bool), {"label": np.zeros(1, np.int32)})


@pytest.mark.slow
def test_smoke_preset_learns_digits(tmp_path: Path) -> None:
    out = str(tmp_path / "mar")
    words = ["train", "mar-smoke", "--outdir", out, "--engine.quiet", "true", "--stages.0.steps"]
    assert cli.main([*words, "1200"]) == 0
    images = gen.load(out).sample(range(100), [i % 10 for i in range(100)])
    assert images.shape == (100, 8, 8, 1)
    assert agreement(images) > 0.6
