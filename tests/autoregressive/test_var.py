"""VAR: published sizes, cached sampling, what a sample depends on, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.decoding import ConstantScale, LinearScale, drawn, filtered, mix
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.likelihood import bits_per_image
from gen.autoregressive.scales import ScaleSampler
from gen.autoregressive.train import TokenTask
from gen.autoregressive.var import VARConfig, var
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes
from gen.tokenizers.quantizers.residual import Residual
from gen.tokenizers.var_vqvae import SCALES, VARVQVAEConfig

CODES = Residual(12, 4, (1, 2, 3), convolutions=2)
MODEL = VARConfig(CODES, num_classes=3, width=16, depth=2, heads=2, hidden=32, gain=1.0)
TOKENIZER = VARVQVAEConfig((6, 6, 1), CODES, width=4, mult=(1, 1), blocks=1, inner=4, groups=2)
SAMPLER = ScaleSampler(LinearScale(3.0), top_k=8, top_p=0.9)


@pytest.mark.parametrize(
    ("depth", "scales", "shared", "parameters"),
    [
        (16, SCALES[256], False, 310_283_520),
        (20, SCALES[256], False, 600_917_136),
        (24, SCALES[256], False, 1_033_399_360),
        (30, SCALES[256], False, 2_010_020_356),
        (36, SCALES[512], True, 2_353_893_904),
    ],
)
def test_published_sizes(depth: int, scales: tuple[int, ...], shared: bool, parameters: int) -> None:
    model = var(depth, scales=scales, shared=shared)
    assert count(param_shapes(model)) == parameters
    assert model.shape == (sum(side**2 for side in scales),)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    net = Network(MODEL).init(jax.random.key(0))
    head = net["head"]["kernel"]
    net["head"]["kernel"] = 50.0 * head  # the fresh head is nearly silent
    return {"net": net, "tokenizer": Network(TOKENIZER).init(jax.random.key(1))}


@pytest.fixture(scope="module")
def sampled(params: dict[str, Any]) -> Any:
    """(keys, labels) -> tokens."""
    generator = SAMPLER.generator(TokenTask(model=MODEL).models(), TOKENIZER)
    assert (generator.nfe, generator.shape) == (3, (6, 6, 1))
    return jax.jit(lambda keys, label: generator.tokens(params, keys, {"label": label}))


def test_cached_sampling_is_full_recomputation(params: dict[str, Any], sampled: Any) -> None:
    """The drawn tokens, shown to the model all at once, give the logits from which the same keys draw them again."""
    keys, label = jax.random.split(jax.random.key(2), 4), jnp.array([0, 1, 2, 0])
    ids = sampled(keys, label)

    @jax.jit
    def again(ids: jax.Array) -> Any:
        cond = {"label": label, **MODEL.forced({"tokenizer": params["tokenizer"]}, ids)}
        own, null = (MODEL.logits(params["net"], ids, c) for c in (cond, MODEL.null(params["net"], cond)))
        found = []
        for i, w in enumerate(SAMPLER.guidance.scales(len(MODEL.scales))):
            part = slice(sum(MODEL.groups[:i]), sum(MODEL.groups[: i + 1]))
            kept = filtered(mix(own[:, part], null[:, part], float(w)), k=SAMPLER.top_k, p=SAMPLER.top_p)
            found.append(drawn(keys, kept, i))
        bits = bits_per_image(MODEL, params, ids, {"label": label})
        said = jnp.take_along_axis(jax.nn.log_softmax(own), ids[..., None], axis=-1).sum((1, 2)) / -jnp.log(2.0)
        return jnp.concatenate(found, axis=1), bits, said

    found, bits, said = again(ids)
    np.testing.assert_array_equal(ids, found)
    np.testing.assert_allclose(bits, said, rtol=1e-5)
    assert len(np.unique(ids)) > 3


def test_a_sample_depends_on_its_key_and_class(sampled: Any) -> None:
    keys, label = jax.random.split(jax.random.key(2), 4), jnp.array([0, 1, 2, 0])
    ids, turned = sampled(keys, label), np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(sampled(keys[turned], label[turned]), ids[turned])
    assert (np.asarray(ids[0]) != np.asarray(ids[3])).any()


def test_what_training_draws() -> None:
    tokens = jnp.zeros((4, *MODEL.shape), jnp.int32)
    assert "kept" not in MODEL.draw(jax.random.key(0), tokens, {})
    kept = dataclasses.replace(MODEL, drop_path=0.5).draw(jax.random.key(0), tokens, {})["kept"]
    assert kept.shape == (4, 2, 2)
    assert (kept[:, 0] == 1.0).all()
    assert set(np.unique(kept[:, 1])) <= {0.0, 2.0}


def test_refusals(params: dict[str, Any]) -> None:
    tokens = jnp.zeros((1, *MODEL.shape), jnp.int32)
    with pytest.raises(GenError, match="frozen role 'tokenizer'"):
        MODEL.forced({}, tokens)
    assert TOKENIZER.scaled((1, 2, 5)).spec.image == (10, 10, 1)
    with pytest.raises(GenError, match="for 3 maps"):
        TOKENIZER.scaled((1, 2))
    with pytest.raises(GenError, match="give its tokenizer"):
        TokenGenerator(MODEL, SAMPLER).tokens(params, jax.random.split(jax.random.key(0), 1), {"label": jnp.zeros(1)})
    other = dataclasses.replace(CODES, scales=(1, 3))
    with pytest.raises(GenError, match=r"token maps of the sides \(1, 3\), and the model \(1, 2, 3\)"):
        TokenGenerator(MODEL, SAMPLER, dataclasses.replace(TOKENIZER, quantizer=other))
    with pytest.raises(GenError, match="vocabulary of 9, and the model one of 12"):
        TokenGenerator(
            MODEL, SAMPLER, dataclasses.replace(TOKENIZER, quantizer=dataclasses.replace(CODES, vocabulary=9))
        )
    with pytest.raises(GenError, match="leave out steps"):
        SAMPLER.changed(steps=4)
    assert SAMPLER.changed(guidance=2.0).guidance == LinearScale(2.0)
    with pytest.raises(GenError, match="do not divide the width"):
        dataclasses.replace(MODEL, heads=3)
    with pytest.raises(GenError, match="top_p 2"):
        ScaleSampler(ConstantScale(), top_p=2.0)
    with pytest.raises(GenError, match="begins with a class"):
        VARConfig(CODES, num_classes=0)
