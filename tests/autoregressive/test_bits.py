"""Models over bits: published sizes, noise, sampling, and what they refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen.autoregressive.bernoulli import Bernoulli, posterior
from gen.autoregressive.binary_diffusion import BinaryDiffusion
from gen.autoregressive.binary_sampler import BinarySampler, denoise_bits
from gen.autoregressive.binary_transformer import BinaryTransformerConfig
from gen.autoregressive.bits import BitSampler
from gen.autoregressive.decoding import ConstantScale, mix
from gen.autoregressive.generator import TokenGenerator
from gen.autoregressive.instella import InstellaDiffusionConfig
from gen.autoregressive.instella_ar import InstellaARConfig
from gen.errors import GenError
from gen.nn.network import Network, count, param_shapes

AR = InstellaARConfig(shape=(4, 3), width=16, depth=2, heads=2, text=(3, 5))


@dataclasses.dataclass(frozen=True)
class Coin:
    """A denoiser that knows the data: every bit is 1 with the same probability, whatever it sees."""

    p: float = 0.8
    levels: int | None = None
    process: Bernoulli = Bernoulli()

    def output(self, params: Any, x_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        del params, cond
        chance = self.process.chance(jnp.float32(self.p), t)[:, None, None]
        clean = self.process.keep(t)[:, None, None]
        seen = jnp.where(x_t > 0.5, 1.0 + clean, 1.0 - clean) / 2.0  # of a one
        p = self.p * seen / jnp.where(x_t > 0.5, chance, 1.0 - chance)
        return jnp.log(p / (1.0 - p))

    def clean(self, output: jax.Array, x_t: jax.Array) -> jax.Array:
        del x_t
        return output


def test_published_sizes() -> None:
    assert count(param_shapes(InstellaDiffusionConfig())) == pytest.approx(1292.5e6, abs=0.05e6)
    # the file holds an embedding of times as well, which nothing uses: 2048 + 2048 + 2048^2 + 2048
    assert count(param_shapes(InstellaARConfig())) + 4_200_448 == pytest.approx(881.4e6, abs=0.05e6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_noise_is_a_chain(schedule: Any) -> None:
    """Two steps of noise are one, and Bayes' rule gives back the mixture it came from."""
    process, p, s, t = Bernoulli(schedule), np.array([0.1, 0.7]), np.float64(0.3), np.float64(0.8)
    share = process.keep(t) / process.keep(s)
    at_s, at_t = process.chance(p, s), process.chance(p, t)
    np.testing.assert_allclose(share * at_s + (1.0 - share) / 2.0, at_t, rtol=1e-12)
    back = at_t * posterior(at_s, np.ones(2), share) + (1.0 - at_t) * posterior(at_s, np.zeros(2), share)
    np.testing.assert_allclose(back, at_s, rtol=1e-12)
    assert process.keep(np.float64(0.0)) == 1.0
    assert abs(process.keep(np.float64(1.0))) < 1e-12


def test_fresh_noise_gives_the_law_of_each_time() -> None:
    """Of independent coins, however few the steps."""
    keys = jax.random.split(jax.random.key(0), 8)

    def uniforms(step: Any) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step), (50, 20)))(keys)

    times = BinarySampler(steps=4).times(Coin())
    np.testing.assert_allclose(times, [1.0, 0.75, 0.5, 0.25])
    bits = denoise_bits(Coin(), {}, (uniforms(9) < 0.5) * 1.0, times, uniforms, {}, rule="renoise")
    assert set(np.unique(bits)) <= {0.0, 1.0}
    # the last step takes the likelier value, here the one that is seen: the law is that of the last time
    assert abs(bits.mean() - Bernoulli().chance(np.float64(0.8), np.float64(0.25))) < 0.02


@pytest.fixture(scope="module")
def written() -> Any:
    """Parameters, and a function (keys, conditions) -> bits by the cached sampler."""
    params = Network(AR).init(jax.random.key(0))
    sampler = BitSampler(ConstantScale(2.0), temperature=0.7)
    generator = sampler.generator({"net": _Model(AR)}, None)
    assert (generator.nfe, generator.shape) == (4, (4, 3))
    return params, jax.jit(lambda keys, cond: generator.tokens({"net": params}, keys, cond))


@dataclasses.dataclass(frozen=True)
class _Model:
    config: Any


def captions(count: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    real = np.arange(3) >= np.arange(count)[:, None] % 3  # padded on the left
    return {"text": jnp.asarray(rng.normal(size=(count, 3, 2, 5)), jnp.float32), "text_mask": jnp.asarray(real)}


def test_cached_writing_is_full_recomputation(written: Any) -> None:
    params, write = written
    keys, cond = jax.random.split(jax.random.key(1), 4), captions(4)
    bits = write(keys, cond)

    @jax.jit
    def again(bits: jax.Array) -> jax.Array:
        logits = mix(*(AR.logits(params, bits, c) for c in (cond, AR.null(params, cond))), 2.0)
        draw = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i), (1, 3)), (None, 0))
        uniforms = jax.vmap(lambda key: draw(key, jnp.arange(4))[:, 0])(keys)
        return (uniforms < jax.nn.sigmoid(logits / 0.7)).astype(jnp.int32)

    np.testing.assert_array_equal(bits, again(bits))
    turned = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(write(keys[turned], {k: v[turned] for k, v in cond.items()}), bits[turned])
    empty = {**cond, "empty": cond["text"], "empty_mask": cond["text_mask"]}
    null = AR.null(params, empty)
    np.testing.assert_array_equal(null["text"], empty["empty"])


def test_refusals() -> None:
    network = BinaryTransformerConfig((2, 2, 3), 16, 1, 2)
    model = BinaryDiffusion(network, levels=8)
    with pytest.raises(GenError, match="9 steps"):
        BinarySampler(steps=9).generator({"net": _Model(model)}, None)
    with pytest.raises(GenError, match="neighbouring levels"):
        BinaryDiffusion(network, posterior=0.1)
    with pytest.raises(GenError, match="uniform times"):
        BinaryDiffusion(network, levels=8, times="logit-normal")
    with pytest.raises(GenError, match="leave out solver"):
        BinarySampler().changed(solver=1)
    assert BinarySampler().changed(steps=4, guidance=2.0) == BinarySampler(steps=4, guidance=2.0)
    with pytest.raises(GenError, match="a class or a caption"):
        BinaryTransformerConfig(num_classes=3, text=(2, 2))
    with pytest.raises(GenError, match="set text to null"):
        InstellaARConfig(num_classes=3)
    with pytest.raises(GenError, match="token by token"):
        BitSampler().changed(steps=3)
    with pytest.raises(GenError, match="has tokens, and this is a model of bits"):
        model.check_tokens("the cache", "tokens", (2, 2, 3), 2, None)
    with pytest.raises(GenError, match=r"bits \(2, 2, 4\) of an image"):
        model.check_tokens("the cache", "bits", (2, 2, 4), 2, None)
    assert TokenGenerator(model, BinarySampler(steps=8)).nfe == 8
